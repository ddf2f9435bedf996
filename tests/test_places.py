"""Source rows in host memory and on disk: the same edit from another place, and no more memory than was foretold."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVACEPipeline

import kvlock
from kvlock import KVLockConfig, Store, places
from kvlock.adapters.kernels import KERNELS
from kvlock.locked_layers import AFTER_ROPE
from kvlock.step_file import Piece
from kvlock.store import LAYERS_AT_ONCE, Rows
from kvlock.transit import Courier

STEPS = 5
WINDOW: dict[str, Any] = {"kappa": 3, "window": 3, "tau": 0.6}
ELSEWHERE = ("host", "disk")


@pytest.fixture(scope="module")
def pipes():
    return {"wan": tiny.pipeline(WanPipeline), "vace": tiny.pipeline(WanVACEPipeline)}


def locked(pipe: Any, config: KVLockConfig, **options: Any):
    """The final latents of a locked call, and its trace."""
    masks = tiny.masks(pipe)
    with kvlock.attach(
        pipe, tiny.source_latents(), masks, config=config, source_prompt_embeds=tiny.SOURCE_PROMPT, **options
    ) as session:
        latents = tiny.call(pipe, steps=STEPS)
    tiny.assert_locked(session.trace.rows(), config)
    return latents, session.trace.rows()


@pytest.mark.parametrize("place", ELSEWHERE)
@pytest.mark.parametrize(("name", "kernel", "dtype"), [
    ("wan", "hooks", "model"), ("vace", "hooks", "int8"), ("vace", "fused", "model"), ("wan", "fused", "fp8"),
    ("vace", "backend", "model"), ("wan", "backend", "int8"),
])  # fmt: skip
def test_an_edit_is_the_same_from_every_place(pipes, tmp_path, name, kernel, dtype, place):
    config = KVLockConfig(control_blocks=name == "vace", **WINDOW)
    expected, trace = locked(pipes[name], config, kernel=kernel, store=Store(dtype))
    folder = tmp_path if place == "disk" else None
    there = Store(dtype, place=place, folder=folder)
    latents, trace_there = locked(pipes[name], config, kernel=kernel, store=there)
    assert torch.equal(latents, expected)
    assert [row["source_bytes"] for row in trace_there] == [row["source_bytes"] for row in trace]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ELSEWHERE)
def test_a_full_lock_by_the_backend_is_the_same_from_every_place(pipes, place):
    config = KVLockConfig(fusion="full", kappa=3, window=3)
    expected, _ = locked(pipes["wan"], config, kernel="backend")
    latents, _ = locked(pipes["wan"], config, kernel="backend", store=Store(place=place))
    assert torch.equal(latents, expected)


def two_experts() -> Any:
    """As Wan2.2 has them: one transformer for the noisy steps, another one for the rest."""
    pipe = tiny.pipeline(WanPipeline)
    pipe.register_modules(transformer_2=tiny.transformer(seed=9))
    pipe.register_to_config(boundary_ratio=0.6)
    return pipe


@pytest.mark.parametrize("place", [*ELSEWHERE, "recording"])
def test_two_transformers_take_turns(tmp_path, place):
    pipe, config = two_experts(), KVLockConfig(fusion=0.5, kappa=4, window=3)
    expected, trace = locked(pipe, config)
    if place == "recording":
        source, masks = {"source_prompt_embeds": tiny.SOURCE_PROMPT, "config": config}, tiny.masks(pipe)
        with kvlock.record(pipe, tmp_path / "source", tiny.source_latents(), masks, **source):
            tiny.call(pipe, steps=STEPS)
        latents, there = locked(pipe, config, recording=kvlock.Recording(tmp_path / "source"))
    else:
        latents, there = locked(pipe, config, store=Store(place=place))
    assert torch.equal(latents, expected)
    kept = [row["source_bytes"] for row in there]
    assert kept == [row["source_bytes"] for row in trace] and len(set(kept)) == 2  # none in the first step


def bytes_here(courier: Courier) -> int:
    """Bytes of the rows that a courier holds on the device."""
    return sum(rows.bytes_kept for slot in courier._slots for rows in slot.rows.values())


def pieces(*blocks: int) -> list[Piece]:
    return [Piece(0, "blocks", block, tensor) for block in blocks for tensor in "vk"]


def test_the_layer_behind_sets_off_before_it_is_asked_for():
    sent = []

    def load(layer):
        sent.append(layer[2])
        return {name: Rows(torch.full((1,), float(layer[2]))) for name in "kv"}

    courier, order = Courier(torch.device("cpu")), [(0, "blocks", block) for block in range(3)]
    seen = []
    for piece in 2 * pieces(0, 1, 2):  # both guidance branches
        assert courier.fetch(piece, order, load).data.item() == piece.block
        seen.append(list(sent))
        assert bytes_here(courier) == 2 * 2 * 4  # two layers, K and V
    assert seen[0] == [0, 1] and seen[2] == [0, 1, 2] and seen[4] == [0, 1, 2, 0]
    assert sent == [0, 1, 2, 0, 1, 2, 0]
    courier.forget()
    assert bytes_here(courier) == 0


def test_rows_of_another_size_get_room_of_their_own():
    """A copy into too much room would fill it."""
    shelf, key, value = places.HostShelf(), *pieces(0)[::-1]
    shelf.serve(torch.device("cpu"), ())
    for size in (3, 1, 5):
        shelf.turn_to(0)
        for piece in (value, key):
            shelf.put(piece, Rows(torch.full((1, size, 2), float(size))), AFTER_ROPE)
        shelf.seal()
        assert torch.equal(shelf.get(key).data, torch.full((1, size, 2), float(size)))
        assert shelf.bytes_kept == 2 * 2 * size * 4


@pytest.mark.parametrize("place", ELSEWHERE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_compiled_transformer_is_refused_with_the_way_out(kernel, place):
    pipe = tiny.pipeline(WanPipeline)
    masks = tiny.masks(pipe)
    options = {"source_prompt_embeds": tiny.SOURCE_PROMPT, "kernel": kernel, "store": Store(place=place)}
    with pytest.raises(ValueError, match=r"is compiled .*wanted a transformer that is not compiled"):
        with kvlock.attach(pipe, tiny.source_latents(), masks, **options):
            pipe.transformer.compile_repeated_blocks(backend="eager")
            tiny.call(pipe, steps=STEPS)
    assert tiny.leftovers(pipe) == []
    with pytest.raises(ValueError, match=r"is compiled \(blocks\.0\)"):
        with kvlock.attach(pipe, tiny.source_latents(), masks, **options):
            pass
    pipe = tiny.pipeline(WanPipeline)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match=r"is compiled, and"):
        with kvlock.attach(pipe, tiny.source_latents(), masks, **options):
            pass


@pytest.mark.parametrize(("place", "hint"), [("device", "host"), ("host", "disk"), ("disk", None)])
def test_an_edit_that_runs_out_of_memory_is_told_of_the_next_place(pipes, place, hint):
    pipe = pipes["wan"]
    options = {"source_prompt_embeds": tiny.SOURCE_PROMPT, "store": Store(place=place)}
    with pytest.raises(RuntimeError) as error:
        with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **options):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    notes = getattr(error.value, "__notes__", [])
    wanted = f"source rows are kept on the {place}; Store(place={hint!r}) or --place {hint} has more room"
    assert notes == ([wanted] if hint else [])
    with pytest.raises(RuntimeError) as error:
        with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **options):
            raise RuntimeError("shapes do not match")
    assert not hasattr(error.value, "__notes__")


def test_an_error_inside_leaves_no_file(pipes, tmp_path):
    pipe, store = pipes["wan"], Store(place="disk", folder=tmp_path)

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        assert any(tmp_path.rglob("*.safetensors")) == (step >= 2)
        if step == 3:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt), kvlock.attach(
        pipe, tiny.source_latents(), tiny.masks(pipe), config=KVLockConfig(**WINDOW), store=store,
        source_prompt_embeds=tiny.SOURCE_PROMPT,
    ):  # fmt: skip
        tiny.call(pipe, steps=STEPS, callback_on_step_end=stop)
    assert list(tmp_path.iterdir()) == []
    assert tiny.leftovers(pipe) == []


def test_every_step_of_a_session_writes_over_the_same_files_which_its_end_removes(pipes, tmp_path):
    (tmp_path / "rows").mkdir()
    pipe, store, same = pipes["wan"], Store(place="disk", folder=tmp_path / "rows"), []

    def look(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        files = {file.name: file for file in (tmp_path / "rows").rglob("*.safetensors")}
        names = [f"{tensor}{number}.safetensors" for tensor in "kv" for number in range(LAYERS_AT_ONCE)]
        assert sorted(files) == (names if step >= 2 or same else [])
        for name, file in files.items():
            if not (tmp_path / name).exists():
                (tmp_path / name).hardlink_to(file)  # whose file no other can be, however numbers are used again
            same.append(file.samefile(tmp_path / name))
        return kwargs

    options = {"config": KVLockConfig(**WINDOW), "store": store, "source_prompt_embeds": tiny.SOURCE_PROMPT}
    with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **options):
        for _ in range(2):
            tiny.call(pipe, steps=STEPS, callback_on_step_end=look)
    assert same == [True] * 2 * LAYERS_AT_ONCE * (3 + STEPS)
    assert list((tmp_path / "rows").iterdir()) == []


def test_a_folder_that_is_not_there_is_named(pipes, tmp_path):
    pipe, store = pipes["wan"], Store(place="disk", folder=tmp_path / "none")
    with pytest.raises(ValueError, match=r"cannot write source rows to .*none: No such file or directory"):
        with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), store=store):
            pass
    assert tiny.leftovers(pipe) == []


def test_a_folder_that_cannot_be_a_name_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write source rows to .*a\x00b: embedded null (byte|character)"):
        places.shelf_of(Store(place="disk", folder=tmp_path / "a\0b"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"place": "gpu"}, "place='gpu' is not known; wanted one of 'device', 'host', 'disk'"),
        ({"place": "disk", "folder": 3}, "folder=3 is not allowed; wanted a path or None"),
        ({"place": "disk", "folder": ""}, "folder='' names nothing; wanted a path or None"),
        ({"place": "host", "folder": "x"}, "folder='x' has no effect with place='host'; leave it out"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        Store(**arguments)
    assert str(error.value) == message


def alive() -> tuple[int, int, int]:
    """Tensors, threads and open files of this process."""
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return tensors, threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_fifty_edits_leak_nothing(pipes, tmp_path):
    pipe, config = pipes["wan"], KVLockConfig(kappa=1, window=2, fusion=0.5)
    masks, path = tiny.masks(pipe), tmp_path / "source.kvlock"
    source = {"config": config, "source_prompt_embeds": tiny.SOURCE_PROMPT}
    with kvlock.record(pipe, path, tiny.source_latents(), masks, **source):
        tiny.call(pipe, steps=2)
    recording = kvlock.Recording(path)
    ways = [{"store": Store()}, {"store": Store(place="host")}, {"store": Store("int8", place="disk")}]
    ways += [{"recording": recording}, *({"store": Store(), "kernel": kernel} for kernel in ("backend", "fused"))]

    def edit(number: int) -> None:
        with kvlock.attach(pipe, tiny.source_latents(), masks, **source, **ways[number % len(ways)]):
            tiny.call(pipe, steps=2)

    for number in range(len(ways)):
        edit(number)
    before = alive()
    for number in range(50):
        edit(number)
    assert alive() == before


@pytest.mark.gpu
@pytest.mark.parametrize("place", ELSEWHERE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_edit_on_a_gpu_is_the_same_from_every_place(tmp_path, kernel, place):
    pipe, config = tiny.pipeline(WanPipeline).to("cuda"), KVLockConfig(**WINDOW)
    expected, _ = locked(pipe, config, kernel=kernel, store=Store("int8"))
    for _ in range(3):  # a race would not lose every time
        assert torch.equal(locked(pipe, config, kernel=kernel, store=Store("int8", place=place))[0], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["host", "disk", "recording"])
def test_on_a_gpu_the_rows_of_two_layers_are_there_and_no_more(tmp_path, place):
    """The host queues a whole forward in one go: room must not be taken as fast as it queues."""
    pipe, config = tiny.pipeline(WanPipeline, layers=24).to("cuda"), KVLockConfig(kappa=2, window=2, fusion=0.5)
    masks, source = tiny.masks(pipe), {"source_prompt_embeds": tiny.SOURCE_PROMPT, "config": config}
    options: dict[str, Any] = {"store": Store(place=place)} if place != "recording" else {}
    if place == "recording":
        with kvlock.record(pipe, tmp_path / "source", tiny.source_latents(), masks, **source):
            tiny.call(pipe, steps=4)
        options["recording"] = kvlock.Recording(tmp_path / "source")

    def peak(**more: Any) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with kvlock.attach(pipe, tiny.source_latents(), masks, **source, **more) as session:
            tiny.call(pipe, steps=4)
        assert session.trace.rows()[-1]["source_bytes"] > 0
        return torch.cuda.max_memory_allocated()

    peak(), peak(**options)  # workspaces of libraries
    plain, elsewhere = peak(), peak(**options)
    kept = 24 * 2 * masks.background_rows * 24 * 4
    assert plain - elsewhere > kept / 2


@pytest.mark.parametrize("place", ["device", *ELSEWHERE])
def test_a_call_in_inference_mode_and_one_outside_share_a_block(pipes, place):
    pipe, config = pipes["wan"], KVLockConfig(**WINDOW)
    options: dict[str, Any] = {"config": config, "store": Store(place=place)}
    options |= {"source_prompt_embeds": tiny.SOURCE_PROMPT}
    with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **options):
        with torch.inference_mode():
            first = tiny.call(pipe, steps=STEPS)
        assert torch.equal(tiny.call(pipe, steps=STEPS), first)
        with torch.inference_mode():
            assert torch.equal(tiny.call(pipe, steps=STEPS), first)
