"""The benchmark of packed rows, on a corner of a video and few steps, where its numbers mean little."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import accuracy
from kvlock import Store, mini
from kvlock.cli.models import load_pipeline
from kvlock.mini import scenes

STEPS, LOCKED = 4, 2


@pytest.mark.smoke
def test_every_run_of_an_edit_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = {"int8": Store("int8")}
    stores = {"float32": {"same": Store(), "bf16": accuracy.Rounded()} | int8, "bfloat16": int8}
    monkeypatch.setattr(accuracy, "STORES", stores)
    mask = torch.zeros(5, 48, 48, dtype=torch.bool)
    mask[:, :16, :16] = True
    whole = accuracy.Edit.of(scenes.HELD_OUT, STEPS)
    edit = whole._replace(video=whole.video[:5, :48, :48], mask=mask)
    half = load_pipeline(None, dtype="bfloat16", device="cpu", offload="none")
    pipes = {"float32": mini.load(), "bfloat16": half}

    rows = list(accuracy.measure(edit, pipes))
    kinds = [(row.model, row.rows) for row in rows]
    assert kinds == [("float32", name) for name in (accuracy.GIVEN, "same", "bf16", "int8")] + [
        ("bfloat16", name) for name in (accuracy.GIVEN, "int8", accuracy.FUSED, accuracy.ACROSS)
    ]
    assert not any("forward" in vars(pipe.transformer) for pipe in pipes.values())
    by_kind = dict(zip(kinds, rows, strict=True))
    for kind, row in by_kind.items():
        assert (row.background_psnr_db == "") == (row.foreground_psnr_db == "") == (kind[1] == accuracy.GIVEN)
        assert row.locked_steps == str(LOCKED) and float(row.source_background_psnr_db) > 10
    errors = {kind: float(row.attention_relative_l2) for kind, row in by_kind.items() if row.attention_relative_l2}
    assert list(errors) == [*(("float32", name) for name in stores["float32"]), ("bfloat16", "int8")]
    assert 0 < errors["float32", "bf16"] < errors["float32", "int8"] < 0.01

    same = by_kind["float32", "same"]  # being watched, or beginning as another run did, changes no bit of a run
    assert (same.attention_relative_l2_max, same.background_psnr_db, same.foreground_psnr_db) == ("0", "inf", "inf")
    across = by_kind["bfloat16", accuracy.ACROSS]  # what int8 changes in float32 is far below what bfloat16 changes
    assert float(by_kind["float32", "int8"].background_psnr_db) > float(across.background_psnr_db) + 10

    cells = accuracy.table(rows)
    assert [tuple(line[:2]) for line in cells] == [kind for kind in kinds if kind[1] != accuracy.GIVEN]
    assert cells[2][2:4] == ["1", "{0:.3f} ({0:.3f})".format(100 * errors["float32", "int8"])]


class Doubling:
    """A transformer that counts what it computes."""

    computed = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.computed += 1
        return 2 * hidden_states


def test_a_start_is_computed_once_and_shared_only_between_equal_runs() -> None:
    transformer, kept = Doubling(), []
    for computed in (3, 4):
        with accuracy.shared_start(transformer, 2, kept):
            outputs = [transformer.forward(hidden_states=torch.tensor([i])).item() for i in range(3)]
        assert (outputs, transformer.computed) == ([0, 2, 4], computed)
    with pytest.raises(RuntimeError, match="other latents than"), accuracy.shared_start(transformer, 2, kept):
        transformer.forward(hidden_states=torch.tensor([1]))
    assert not vars(transformer).keys() - {"computed"}
