"""The bytes of source rows at each place, counted in an edit on the miniature, are those that were foretold."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import kvlock
from kvlock import KVLockConfig, Store, places
from kvlock.adapters.kernels import KERNELS
from kvlock.cost import Cost, ModelSizes, estimate
from kvlock.places import Courier

STEPS = 2
HEADER = 2**17  # bytes of a file of rows that are no rows


@pytest.fixture(scope="module")
def pipe():
    return tiny.miniature()


def edit(pipe: Any, config: KVLockConfig, **options: Any) -> list[dict[str, Any]]:
    """The trace of a locked edit on the miniature."""
    latents = kvlock.encode_source(pipe, torch.rand(tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3))
    masks = kvlock.Masks.from_pixels(tiny.pixel_mask(), pipe)
    embeds = pipe.encode_prompt("a star", do_classifier_free_guidance=False)[0]
    conditions = {"prompt": "a circle", "negative_prompt": "", "height": tiny.SIZE, "width": tiny.SIZE}
    conditions |= {"video": torch.rand(1, tiny.FRAMES, 3, tiny.SIZE, tiny.SIZE), "num_frames": tiny.FRAMES}
    conditions |= {"mask": tiny.pixel_mask()[None, :, None].float(), "output_type": "latent"}
    with kvlock.attach(pipe, latents, masks, config=config, source_prompt_embeds=embeds, **options) as session:
        pipe(**conditions, num_inference_steps=STEPS, guidance_scale=5.0)
    return session.trace.rows()


def foretold(pipe: Any, config: KVLockConfig, **options: Any) -> Cost:
    masks = kvlock.Masks.from_pixels(tiny.pixel_mask(), pipe)
    options |= {"tokens": masks.num_tokens, "background_rows": masks.background_rows, "bytes_per_value": 4}
    return estimate(ModelSizes.of(pipe.transformer.config), config, num_steps=STEPS, **options)


def within(found: int, wanted: int) -> bool:
    return abs(found - wanted) <= 0.1 * wanted


class Watch:
    """The most bytes of source rows at each place, and those that were brought to the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.device = self.host = self.disk = self.moved = 0
        fetch, send, put = Courier.fetch, Courier._send, places.HostShelf._put

        def fetched(courier, piece, order, load):
            rows = fetch(courier, piece, order, load)
            here = sum(part.bytes_kept for slot in courier._slots for part in slot.rows.values())
            self.device = max(self.device, here)
            files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
            self.disk = max(self.disk, sum(files) - HEADER * len(files))
            return rows

        def sent(courier, layer, rows, kept):
            self.moved += sum(part.bytes_kept for part in rows.values())
            return send(courier, layer, rows, kept)

        def kept(shelf, piece, rows):
            put(shelf, piece, rows)
            self.host = max(self.host, sum(there.bytes_kept for there in shelf._kept.values()))

        monkeypatch.setattr(Courier, "fetch", fetched)
        monkeypatch.setattr(Courier, "_send", sent)
        monkeypatch.setattr(places.HostShelf, "_put", kept)


@pytest.mark.parametrize("store", [Store("int8", place="host"), Store(place="disk"), Store("fp8", place="disk")])
def test_rows_elsewhere_take_the_bytes_of_the_estimate(pipe, monkeypatch, tmp_path, store):
    config = KVLockConfig(kappa=2, window=2, fusion=0.5)
    there = Store(store.dtype, store.k_mean, store.place, tmp_path if store.place == "disk" else None)
    watch = Watch(monkeypatch, tmp_path)
    trace = edit(pipe, config, store=there)
    cost = foretold(pipe, config, store=there)
    kept = max(row["source_bytes"] for row in trace)
    assert kept == cost.bytes_kept > 0
    assert within(watch.device, cost.bytes_device) and watch.device < kept / 2
    assert within(watch.disk, cost.bytes_disk)
    if store.place == "host":
        assert within(watch.host, cost.bytes_host)
    else:
        assert watch.host == 0  # between a file and a GPU two layers go through host memory; the CPU reads the file
    assert watch.moved == cost.locked_steps * cost.bytes_moved_replay  # all layers for both branches, and one once more
    assert cost.bytes_moved == kept + cost.bytes_moved_replay


def living_bytes() -> int:
    """Bytes of the storages of all tensors there are; those of compilers, which have no values, are of other types."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [tensor for tensor in tensors if tensor.layout == torch.strided and tensor.device.type == "cpu"]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(
    ("kernel", "fusion", "store"),
    [*((kernel, 0.5, Store()) for kernel in KERNELS), ("backend", "full", Store()), ("hooks", 0.5, Store("int8"))],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "dtype", None),
)
def test_rows_on_the_device_take_the_bytes_of_the_estimate(pipe, kernel, fusion, store):
    def most(layers: tuple[int, ...]) -> int:
        """Bytes of all tensors there are, at their most, in an edit that locks these layers."""
        seen: list[int] = []
        hook = pipe.transformer.blocks[-1].register_forward_hook(lambda *_: seen.append(living_bytes()))
        edit(pipe, KVLockConfig(kappa=1, window=2, fusion=fusion, layers=layers), kernel=kernel, store=store)
        hook.remove()
        return max(seen)

    first, *others = range(len(pipe.transformer.blocks))
    most((first,))  # what a first edit leaves behind
    few, all_ = most((first,)), most((first, *others))
    cost = foretold(pipe, KVLockConfig(fusion=fusion, layers=tuple(others)), kernel=kernel, store=store)
    assert within(all_ - few, cost.bytes_device) and cost.bytes_device == cost.bytes_kept > 0
    assert (cost.bytes_host, cost.bytes_disk, cost.bytes_moved) == (0, 0, 0)
