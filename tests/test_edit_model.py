"""The predicted steps of whole edits: counted by hand, and moved by what moves them."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import _edit_model, _edits
from benchmarks._case import RATES, Rates
from benchmarks._eager_bytes import Counting
from benchmarks._edits import SHAPES
from benchmarks._modes import HALF, MODES, USUAL, Mode
from kvlock import Store, preset

GPU, SHARE = RATES["NVIDIA H200"], 0.8
ONLY_PRODUCTS, ONLY_BYTES = Rates(float("inf"), 6e14), Rates(3e12, float("inf"))


def locked(mode: str, gpu: Rates = GPU, shape: str = "1.3b", share: float = SHARE) -> float:
    return _edit_model.seconds(shape, MODES[mode], share, gpu).locked


@pytest.mark.parametrize("shape", SHAPES)
def test_the_flop_of_a_forward_are_those_of_its_attention_and_its_weights(shape: str) -> None:
    n, prompt, sizes = 32760, 512, SHAPES[shape]
    c, wide = 128 * sizes["num_attention_heads"], sizes["ffn_dim"]
    of_tokens, of_prompt = 6 * c * c + 2 * c * wide, 2 * c * c  # weights; cross-attention has its k and v of the prompt
    block = 2 * n * of_tokens + 2 * prompt * of_prompt + 4 * n * n * c + 4 * n * prompt * c
    assert _edit_model.forward(shape).flop == pytest.approx(sizes["num_layers"] * block, rel=1e-3)


def test_blocks_are_counted_once_each() -> None:
    one, two, three = (_edit_model._counted("1.3b", layers) for layers in (1, 2, 3))
    assert [c - b for b, c in zip(two, three, strict=True)] == [b - a for a, b in zip(one, two, strict=True)]
    assert all(more > 0 for more in (two.flop - one.flop, two.bytes - one.bytes))
    assert (_edit_model.forward("1.3b", 1), _edit_model.forward("1.3b", 3)) == (one, three)
    assert _edit_model.forward("1.3b") == _edit_model.forward("1.3b", 30)


def test_a_step_without_a_lock_is_two_forwards_and_a_locked_one_three_or_four_and_its_bytes() -> None:
    forward = _edit_model.forward("1.3b").seconds(GPU)
    for mode in MODES:
        assert _edit_model.seconds("1.3b", MODES[mode], SHARE, GPU).plain == 2 * forward
    assert locked("preset plain") == 2 * forward
    flop = _edit_model.forward("1.3b").flop / ONLY_PRODUCTS.products
    for mode, forwards in {USUAL: 3, "store, fused": 3, "batch, hooks": 4, "recording, hooks": 2}.items():
        assert locked(mode, ONLY_PRODUCTS) == pytest.approx(forwards * flop)
    elements = 26216 * 12 * 128 * 30  # of the locked rows of K, or of V, in all layers
    forward = _edit_model.forward("1.3b").bytes
    copied, mixed = 2 * 4 * elements, 2 * 2 * 6 * elements  # K and V; in both branches
    code = 1 + 4 / 128  # and its scale
    packed, mean, of_codes = 2 * (2 + code) * elements, 6 * elements, 2 * 2 * (4 + code) * elements
    for mode, moved in {
        USUAL: 3 * forward + copied + mixed, "recording, hooks": 2 * forward + mixed,
        "batch, hooks": 4 * forward + 2 * copied + mixed,
        "store int8, hooks": 3 * forward + packed + mean + of_codes, "recording fp8, hooks": 2 * forward + of_codes,
    }.items():  # fmt: skip
        assert locked(mode, ONLY_BYTES) == pytest.approx(moved / 3e12), mode


def test_one_pass_takes_the_place_of_norm_and_rope_in_every_forward_of_a_locked_step() -> None:
    eager, elements, rows = 3488808960, 32760 * 12 * 128, 26216 * 12 * 128
    model = _edits.transformer("meta", SHAPES["1.3b"] | {"num_layers": 1})
    attention, x = model.blocks[0].attn1, torch.empty(1, 32760, 12 * 128, device="meta", dtype=torch.bfloat16)
    angles = torch.empty(2, 1, 32760, 1, 128, device="meta")
    with torch.no_grad(), Counting() as counting:
        attention(x, rotary_emb=tuple(angles))
    assert counting.bytes == eager  # but for products and attention it is norm and RoPE
    one = 8 * elements + 2 * 32760 * 128 * 4  # q and k, read and written, and the angles
    lerp, pack = one + (4 + 4) * rows, one + (2 + 4) * rows
    forward = _edit_model.forward("1.3b").bytes
    wanted = 3 * forward + 30 * (2 * lerp + pack - 3 * eager)
    assert locked("store, fused", ONLY_BYTES) == pytest.approx(wanted / 3e12)


@pytest.mark.parametrize(
    "mode",
    [
        MODES["batch, hooks"]._replace(kernel="fused"),
        MODES["store, backend, full"]._replace(kernel="hooks"),
        MODES["store, backend, full"]._replace(store=Store("int8")),
        MODES["store, backend, full"]._replace(config=preset("full-lock", kappa=3, source="batch")),
    ],
)
def test_a_mode_that_nothing_counts_is_refused(mode: Mode) -> None:
    with pytest.raises(ValueError, match="has no prediction"):
        _edit_model.seconds("1.3b", mode, SHARE, GPU)


def test_an_edit_is_two_fifths_locked_steps() -> None:
    assert _edit_model.Seconds(2.0, 3.0).edit_ratio == pytest.approx(1.2)
    assert _edit_model.seconds("1.3b", MODES["preset plain"], SHARE, GPU).edit_ratio == 1


def test_what_moves_less_takes_less() -> None:  # 8-bit rows are fewer bytes, but for the mean of the keys
    order = ["preset plain", "recording int8, hooks", "recording, hooks", HALF, "store, fused",
             USUAL, "store int8, hooks", "batch, hooks"]  # fmt: skip
    assert [*sorted(order, key=locked)] == order and len({*map(locked, order)}) == len(order)
    assert locked(USUAL) == locked("store, backend") == locked("store on the host, hooks")
    assert locked(USUAL, share=0.4) < locked(USUAL)


def test_half_the_layers_lock_half_as_much_and_the_source_runs_half_of_the_blocks() -> None:
    plain, half, whole = (locked(mode) for mode in ("preset plain", HALF, USUAL))
    source, to_the_middle = (_edit_model.forward("1.3b", blocks).seconds(GPU) for blocks in (30, 15))
    assert half - plain - to_the_middle == pytest.approx((whole - plain - source) / 2)
    assert to_the_middle / source == pytest.approx(0.5, abs=1e-3)


def test_a_full_lock_copies_all_rows_of_the_source_and_the_others_of_the_edit() -> None:
    n, rows = 32760, 26216
    elements = 12 * 128 * 30 * 2 * (n + 2 * (n - rows))
    forward = _edit_model.forward("1.3b").bytes
    assert locked("store, backend, full", ONLY_BYTES) == pytest.approx((3 * forward + 4 * elements) / 3e12, rel=1e-3)


def test_copies_that_do_not_hide_are_what_a_locked_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_edit_model, "LINK", 1e9)
    moved = _edit_model.cost_of("1.3b", MODES["store on the host, hooks"], 32760, 26216).bytes_moved
    assert locked("store on the host, hooks") == pytest.approx(moved / 1e9) and locked(USUAL) < 10


def test_the_sizes_are_those_of_the_models() -> None:
    for name, sizes in SHAPES.items():
        config = SimpleNamespace(**sizes, attention_head_dim=128, in_channels=16, patch_size=(1, 2, 2))
        assert _edit_model.ModelSizes.of(config) == _edit_model.SIZES[name]
