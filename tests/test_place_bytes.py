"""The bytes of source rows at each place, counted in an edit on the miniature, are those that were foretold."""

from __future__ import annotations

import dataclasses
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
from kvlock.transit import Courier

STEPS = 2
HEADER = 2**17  # bytes of a file of rows that are no rows


@pytest.fixture(scope="module")
def pipe():
    return tiny.miniature()


def edit(pipe: Any, config: KVLockConfig, **options: Any) -> list[dict[str, Any]]:
    """The trace of a locked edit on the miniature."""
    masks = kvlock.Masks.from_pixels(tiny.pixel_mask(), pipe)
    embeds = pipe.encode_prompt("a star", do_classifier_free_guidance=False)[0]
    conditions = {"prompt": "a circle", "negative_prompt": "", "height": tiny.SIZE, "width": tiny.SIZE}
    conditions |= {"video": torch.rand(1, tiny.FRAMES, 3, tiny.SIZE, tiny.SIZE), "num_frames": tiny.FRAMES}
    conditions |= {"mask": tiny.pixel_mask()[None, :, None].float(), "output_type": "latent"}
    given = {"config": config, "source_prompt_embeds": embeds, **options}
    with kvlock.attach(pipe, tiny.source_latents(), masks, **given) as session:
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
            self.host = max(self.host, sum(there.bytes_kept for there, _ in shelf._rooms.values()))

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
        assert watch.host == 0  # between files and a GPU a few layers go through host memory; the CPU reads them
    assert watch.moved == cost.locked_steps * cost.bytes_moved_replay  # all layers for both branches, and one once more
    assert cost.bytes_moved == kept + cost.bytes_moved_replay


@pytest.fixture
def nothing_else():
    """What there is already is left out where tensors are counted: it stays the same, and takes long to go through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def living_bytes() -> int:
    """Bytes of the storages of all tensors there are; those of compilers, which have no values, are of other types."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [tensor for tensor in tensors if tensor.layout == torch.strided and tensor.device.type == "cpu"]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def more_than_with_one_layer(pipe: Any, config: KVLockConfig, **options: Any) -> int:
    """By how many bytes all tensors there are outgrow those of an edit that locks the last layer, at their most."""

    def seen(layers: tuple[int, ...]) -> list[int]:
        found: list[int] = []
        hook = pipe.transformer.blocks[-1].register_forward_hook(lambda *_: found.append(living_bytes()))
        edit(pipe, dataclasses.replace(config, layers=layers), **options)
        hook.remove()
        return found

    layers = len(pipe.transformer.blocks)
    few, all_ = seen((layers - 1,)), seen(tuple(range(layers)))
    assert len(few) == len(all_) == 3 * STEPS  # forwards, of which the source has one in each step
    return max(more - less for less, more in zip(few, all_, strict=True))


@pytest.mark.usefixtures("nothing_else")
@pytest.mark.parametrize(
    ("kernel", "fusion", "store"),
    [
        *((kernel, 0.5, Store()) for kernel in KERNELS),
        ("backend", "full", Store()),
        ("hooks", 0.5, Store("int8")),
        ("hooks", 0.5, Store(place="host")),
        ("hooks", 0.5, Store("int8", place="host")),
        ("hooks", 0.5, Store(place="disk")),
    ],
    ids=lambda value: f"{value.dtype}-{value.place}" if isinstance(value, Store) else str(value),
)
def test_all_tensors_there_are_take_the_bytes_of_the_estimate(pipe, tmp_path, kernel, fusion, store):
    """Of both locked steps: the rows of one are gone when the next has its own."""
    there = dataclasses.replace(store, folder=tmp_path) if store.place == "disk" else store
    config = KVLockConfig(kappa=2, window=2, fusion=fusion)
    found = more_than_with_one_layer(pipe, config, kernel=kernel, store=there)
    one, all_ = (foretold(pipe, dataclasses.replace(config, layers=layers), kernel=kernel, store=store)
                 for layers in ((len(pipe.transformer.blocks) - 1,), None))  # fmt: skip
    wanted = all_.bytes_device - one.bytes_device
    if store.place == "host":
        wanted += all_.bytes_host - one.bytes_host  # it is the device too, and both are in its memory
    assert within(found, wanted) and wanted > 0
    if store.place == "device":
        assert all_.bytes_device == all_.bytes_kept
        assert (all_.bytes_host, all_.bytes_disk, all_.bytes_moved) == (0, 0, 0)
