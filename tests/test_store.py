"""How source rows are stored: in the dtype of the model or in 8 bits, whatever it is that locks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVACEPipeline

import kvlock
from kvlock import KVLockConfig, Store
from kvlock.adapters.kernels import KERNELS
from kvlock.cost import ModelSizes, estimate
from kvlock_kernels import pack_kv, unpack_kv

STEPS, LAYERS, HEADS, HEAD_DIM = 5, 2, 2, 12
WINDOW: dict[str, Any] = {"kappa": 3, "window": 3, "tau": 0.6}
PACKED = tuple(Store(dtype, k_mean=k_mean) for dtype in ("fp8", "int8") for k_mean in (False, True))
BOTH = [(kernel, store) for kernel in KERNELS for store in PACKED if not (kernel == "fused" and store.k_mean)]
INDEX = torch.tensor([4, 0, 2], dtype=torch.int32)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pipes():
    return {"wan": tiny.pipeline(WanPipeline), "vace": tiny.pipeline(WanVACEPipeline)}


@pytest.fixture(scope="module")
def as_given(pipes):
    """The latents of a locked call with rows as given, and of a plain one, by pipeline and kernel; made once."""

    @functools.cache
    def run(name: str, kernel: str, config: KVLockConfig):
        return locked(pipes[name], config, None, kernel)[0], tiny.call(pipes[name], steps=STEPS)

    return run


def locked(pipe, config: KVLockConfig, store: Store | None, kernel: str = "hooks"):
    """The final latents of a locked call, and its trace."""
    masks, options = tiny.masks(pipe), {"kernel": kernel, "store": store}
    with kvlock.attach(
        pipe, tiny.source_latents(), masks, config=config, source_prompt_embeds=tiny.SOURCE_PROMPT, **options
    ) as session:
        latents = tiny.call(pipe, steps=STEPS)
    tiny.assert_locked(session.trace.rows(), config)
    return latents, session.trace.rows()


@pytest.mark.parametrize("store", PACKED, ids=str)
def test_rows_come_back_as_pack_kv_and_unpack_kv_give_them(store):
    x = rand(2, 6, HEADS, HEAD_DIM)
    mean = x[:, INDEX.long()].mean(1) if store.k_mean else None
    data, scale = pack_kv(x, INDEX, store.storage_dtype(x.dtype), mean=mean)
    for given in (x, x.flatten(2)):
        rows = store.keep(given, INDEX, HEADS, keys=True)
        assert torch.equal(rows.data.view(torch.uint8), data.view(torch.uint8)) and torch.equal(rows.scale, scale)
        expected = unpack_kv(data, scale, mean=mean, dtype=torch.bfloat16)
        assert torch.equal(rows.unpacked(torch.bfloat16), expected)
        assert rows.bytes_kept == data.nbytes + scale.nbytes + (0 if mean is None else mean.nbytes)
    assert store.keep(x, INDEX, HEADS, keys=False).mean is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_8_bits_take_the_mean_wherever_the_kernel_has_a_place_for_it(pipes, kernel):
    config = KVLockConfig(**WINDOW)
    latents, _ = locked(pipes["wan"], config, Store("int8"), kernel)
    expected, _ = locked(pipes["wan"], config, Store("int8", k_mean=kernel != "fused"), kernel)
    assert torch.equal(latents, expected)
    if kernel != "fused":
        assert not torch.equal(latents, locked(pipes["wan"], config, Store("int8", k_mean=False), kernel)[0])


def test_rows_of_the_model_are_copies_of_its_own():
    x = rand(1, 6, HEADS * HEAD_DIM).bfloat16()
    rows = Store().keep(x, INDEX, HEADS, keys=True)
    assert torch.equal(rows.data, x[:, INDEX.long()]) and rows.scale is None and rows.mean is None
    assert rows.unpacked(torch.bfloat16) is rows.data and rows.bytes_kept == 3 * HEADS * HEAD_DIM * 2


@pytest.mark.parametrize(("kernel", "store"), BOTH, ids=str)
@pytest.mark.parametrize("name", ["wan", "vace"])
def test_packed_rows_change_an_edit_as_little_as_their_steps_are_small(pipes, as_given, name, kernel, store):
    expected, plain = as_given(name, kernel, KVLockConfig(**WINDOW))
    latents, _ = locked(pipes[name], KVLockConfig(**WINDOW), store, kernel)
    off, effect = (latents - expected).abs().max(), (expected - plain).abs().max()
    assert 0 < off < effect / 20


@pytest.mark.parametrize("store", PACKED, ids=str)
def test_a_full_lock_by_the_backend_decodes_them(pipes, as_given, store):
    config = KVLockConfig(fusion="full", kappa=3, window=3)
    expected, plain = as_given("wan", "backend", config)
    latents, _ = locked(pipes["wan"], config, store, "backend")
    assert 0 < (latents - expected).abs().max() < (expected - plain).abs().max() / 20


@pytest.mark.parametrize("fusion", ["variance", "full"])
@pytest.mark.parametrize(("kernel", "store"), [("hooks", Store()), ("backend", Store()), *BOTH], ids=str)
def test_the_bytes_of_a_step_are_those_of_the_estimate(pipes, kernel, store, fusion):
    config, masks = KVLockConfig(**WINDOW, fusion=fusion), tiny.masks(pipes["wan"])
    _, trace = locked(pipes["wan"], config, store, kernel)
    sizes = ModelSizes(LAYERS, HEADS, HEAD_DIM, 64)
    rows = {"tokens": masks.num_tokens, "background_rows": masks.background_rows}
    options: dict[str, Any] = {"num_steps": STEPS, "bytes_per_value": 4, "kernel": kernel}
    cost = estimate(sizes, config, **rows, **options, store=store)
    assert {row["source_bytes"] for row in trace if row["locked"]} == {cost.bytes_kept}
    given = estimate(sizes, config, **rows, **options)
    assert store == Store() or cost.bytes_kept < given.bytes_kept / 2
    with_room = (kernel, fusion) == ("backend", "full")
    assert given.bytes_kept == (given.bytes_full if with_room else given.bytes_background)
    assert given.bytes_recording == given.locked_steps * given.bytes_background


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_rows_go_through_a_regional_fullgraph_compile(kernel):
    config, store = KVLockConfig(**WINDOW), Store("int8")
    expected, _ = locked(tiny.pipeline(WanPipeline), config, store, kernel)
    pipe = tiny.pipeline(WanPipeline)
    torch.compiler.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    latents, _ = locked(pipe, config, store, kernel)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bf16"}, "dtype='bf16' is not known; wanted one of 'model', 'fp8', 'int8'"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not known"),
        ({"dtype": "int8", "k_mean": 1}, "k_mean=1 is not allowed; wanted True, False or None"),
        ({"k_mean": True}, "k_mean=True has no effect with dtype='model'"),
    ],
)
def test_a_store_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        Store(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "int8"}, "store is a str; wanted a kvlock.Store"),
        ({"store": Store("int8"), "config": KVLockConfig(source="batch")}, "source=\"batch\" stores no rows"),
        ({"store": Store("int8", k_mean=True), "kernel": "fused"}, "kernel=\"fused\" stores keys as they are"),
    ],
)
def test_a_store_that_does_not_go_with_the_rest_is_refused(pipes, options, message):
    pipe = pipes["wan"]
    with pytest.raises(ValueError) as error, kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **options):
        pass
    assert message in str(error.value)
    assert tiny.leftovers(pipe) == []
    if "config" not in options:
        with pytest.raises(ValueError, match="store"):
            kvlock.KVLockPipeline(pipe, **options)
