"""The predicted steps of whole edits: counted by hand, and moved by what moves them."""

from types import SimpleNamespace

import pytest

from benchmarks import _edit_model
from benchmarks._case import RATES, Rates
from benchmarks._edits import SHAPES
from benchmarks.edit import MODES, USUAL

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
    sizes = SHAPES["1.3b"]
    one, two, three = (_edit_model._counted(sizes | {"num_layers": layers}) for layers in (1, 2, 3))
    assert [c - b for b, c in zip(two, three, strict=True)] == [b - a for a, b in zip(one, two, strict=True)]
    assert all(more > 0 for more in (two.flop - one.flop, two.bytes - one.bytes))


def test_a_step_without_a_lock_is_two_forwards_and_a_locked_one_three_or_four_and_its_bytes() -> None:
    forward = _edit_model.forward("1.3b").seconds(GPU)
    for mode in MODES:
        assert _edit_model.seconds("1.3b", MODES[mode], SHARE, GPU).plain == 2 * forward
    assert locked("preset plain") == 2 * forward
    flop = _edit_model.forward("1.3b").flop / ONLY_PRODUCTS.products
    for mode, forwards in {USUAL: 3, "store, fused": 3, "batch, hooks": 4, "recording, hooks": 2}.items():
        assert locked(mode, ONLY_PRODUCTS) == pytest.approx(forwards * flop)
    rows = 26216 * 12 * 128 * 30  # of K or V in all layers
    forward = _edit_model.forward("1.3b").bytes
    copied, mixed = 2 * 4 * rows, 2 * 2 * 6 * rows  # K and V; in both branches
    for mode, moved in {
        USUAL: 3 * forward + copied + mixed, "recording, hooks": 2 * forward + mixed,
        "batch, hooks": 4 * forward + 2 * copied + mixed,
    }.items():  # fmt: skip
        assert locked(mode, ONLY_BYTES) == pytest.approx(moved / 3e12)


def test_an_edit_is_two_fifths_locked_steps() -> None:
    assert _edit_model.Seconds(2.0, 3.0).edit_ratio == pytest.approx(1.2)
    assert _edit_model.seconds("1.3b", MODES["preset plain"], SHARE, GPU).edit_ratio == 1


def test_what_moves_less_takes_less() -> None:
    order = ["preset plain", "recording int8, hooks", "recording, hooks", "store, fused", "half the layers, hooks",
             "store int8, hooks", USUAL, "batch, hooks"]  # fmt: skip
    assert [*sorted(order, key=locked)] == order and len({*map(locked, order)}) == len(order)
    assert locked(USUAL) == locked("store, backend") == locked("store on the host, hooks")
    assert locked(USUAL, share=0.4) < locked(USUAL)
    plain, half, whole = (locked(mode) for mode in ("preset plain", "half the layers, hooks", USUAL))
    assert half - 1.5 * plain == pytest.approx((whole - 1.5 * plain) / 2)


def test_a_full_lock_copies_all_rows_of_the_source_and_the_others_of_the_edit() -> None:
    n, rows = 32760, 26216
    elements = 12 * 128 * 30 * 2 * (n + 2 * (n - rows))
    forward = _edit_model.forward("1.3b").bytes
    assert locked("store, backend, full", ONLY_BYTES) == pytest.approx((3 * forward + 4 * elements) / 3e12, rel=1e-3)


def test_copies_that_do_not_hide_are_what_a_locked_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_edit_model, "LINK", 1e9)
    moved = _edit_model.cost_of("1.3b", MODES["store on the host, hooks"], 32760, 26208).bytes_moved
    assert locked("store on the host, hooks") == pytest.approx(moved / 1e9) and locked(USUAL) < 10


def test_the_sizes_are_those_of_the_models() -> None:
    for name, sizes in SHAPES.items():
        config = SimpleNamespace(**sizes, attention_head_dim=128, in_channels=16, patch_size=(1, 2, 2))
        assert _edit_model.ModelSizes.of(config) == _edit_model.SIZES[name]
