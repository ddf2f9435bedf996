"""The extension's CUDA part, run on the CPU: the bits of the reference, aligned accesses, lanes that meet."""

import shutil
from typing import Any

import pytest
import torch
from emulated import Emulated
from regimes import pairwise
from samples import DTYPES, normal, packed, scattered
from tolerance import assert_bit_identical
from torch import Tensor

from kvlock_kernels import reference

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no g++ to compile the kernels for the CPU")

INT8, FP8 = torch.int8, torch.float8_e4m3fn
TOKENS = 11
AXES: dict[str, Any] = {
    "rows": (1, 3, 4, 5, 9),
    "heads": (1, 3, 12),
    "dtype": DTYPES,
    "storage": (INT8, FP8),
    "mean": (False, True),
    "samples": ((1, 1), (2, 1), (2, 2)),  # of the tensor and of its source or mean
    "layout": ("dense", "padded", "8 bytes off", "4 bytes off"),
    "ratio": (0.0, 0.3, 1.0),
}
each_dim = pytest.mark.parametrize("dim", [8, 16, 24, 32, 64, 96, 128, 160, 256])


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    assert COMPILER is not None
    return Emulated(COMPILER, tmp_path_factory.mktemp("emulated"))


def laid_out(layout: str, x: Tensor) -> Tensor:
    """The same numbers in rows side by side, in rows that are all aligned to 16 bytes, to 8 bytes, or to 4."""
    codes = x.view(torch.uint8) if x.dtype in reference.EIGHT_BIT else x
    if layout == "padded":
        codes = torch.nn.functional.pad(codes, (0, 16 + -x.shape[-1] % 16))[..., : x.shape[-1]]
    elif layout.endswith("off"):
        skipped = int(layout[0]) // x.element_size()
        codes = torch.cat([codes[..., :1].expand(*codes.shape[:-1], skipped), codes], -1)[..., skipped:]
    return codes.view(x.dtype)


def whole(x: Tensor) -> Tensor:
    """All of the memory that x is a part of."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


@each_dim
def test_rows_are_packed_to_the_bits_of_the_reference(emulated: Emulated, dim: int) -> None:
    for n, regime in enumerate(pairwise(AXES)):
        (b, means), h = regime["samples"], regime["heads"]
        x = laid_out(regime["layout"], normal(b, TOKENS, h, dim, seed=n, dtype=regime["dtype"]))
        index = scattered(TOKENS, regime["rows"])
        mean = normal(means, h, dim, seed=n + 1) if regime["mean"] else None
        expected = reference.pack_kv(x, index, regime["storage"], mean=mean)
        for actual, wanted in zip(emulated.pack_kv(x, index, regime["storage"], mean=mean), expected, strict=True):
            assert_bit_identical(actual, wanted)


@each_dim
def test_source_rows_are_mixed_to_the_bits_of_the_reference(emulated: Emulated, dim: int) -> None:
    for n, regime in enumerate(pairwise(AXES | {"storage": (*DTYPES, INT8, FP8)})):
        (b, sources), h, rows, storage = (regime[name] for name in ("samples", "heads", "rows", "storage"))
        options: dict[str, Tensor | None] = {"source_scale": None, "source_mean": None}
        source = normal(sources, rows, h, dim, seed=n, dtype=storage if storage in DTYPES else torch.float32)
        if storage in reference.EIGHT_BIT:
            source, options["source_scale"], options["source_mean"] = packed(
                storage, sources, rows, h, dim, seed=n, mean=regime["mean"]
            )
        source = laid_out(regime["layout"], source)
        x, x_alone = (laid_out("padded", normal(b, TOKENS, h, dim, seed=3, dtype=regime["dtype"])) for _ in "01")
        index, ratio = scattered(TOKENS, rows), torch.tensor([regime["ratio"], 0.77])[:b]
        emulated.kv_lerp_(x, source, index, ratio, **options)
        reference.kv_lerp_(x_alone, source, index, ratio, **options)
        assert_bit_identical(whole(x), whole(x_alone))


@each_dim
def test_all_codes_are_unpacked_to_the_bits_of_the_reference(emulated: Emulated, dim: int) -> None:
    for layout, storage, rows in [(a, b, c) for a in AXES["layout"] for b in (INT8, FP8) for c in AXES["rows"]]:
        codes = torch.arange(rows * 3 * dim).mul(37).to(torch.uint8)
        codes = torch.where(codes & 127 == 127, 0, codes) if storage == FP8 else codes  # NaN, of which there are many
        data = laid_out(layout, codes.reshape(1, rows, 3, dim).view(storage))
        scale, out = normal(1, rows, 3).abs(), torch.zeros(1, rows, 3, dim, dtype=torch.bfloat16)
        emulated.kv_lerp_(out, data, None, None, source_scale=scale, source_mean=None)
        assert_bit_identical(out, reference.unpack_kv(data, scale, mean=None, dtype=out.dtype))


@pytest.mark.parametrize("dim", [16, 24, 128])
@pytest.mark.parametrize("layout", AXES["layout"])
def test_lanes_exchange_codes_where_16_of_them_are_aligned(emulated: Emulated, dim: int, layout: str) -> None:
    data, scale, _ = packed(INT8, 1, 4, 2, dim, seed=0)
    emulated.shuffles()
    emulated.kv_lerp_(normal(1, 4, 2, dim), laid_out(layout, data), None, None, source_scale=scale, source_mean=None)
    assert (emulated.shuffles() > 0) == (dim % 16 == 0 and layout in ("dense", "padded"))


def test_codes_are_exchanged_before_they_are_stored(emulated: Emulated) -> None:
    emulated.shuffles()
    shuffles = []
    for dim in (8, 16):  # for both, 4 lanes take a head
        emulated.pack_kv(normal(1, 4, 2, dim), torch.arange(4, dtype=torch.int32), INT8, mean=None)
        shuffles.append(emulated.shuffles())
    assert shuffles[0] < shuffles[1]
