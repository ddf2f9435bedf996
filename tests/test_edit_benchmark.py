"""The benchmark of whole edits, on the miniature and the CPU, where its times mean nothing."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks import edit


def test_an_edit_is_measured_plain_and_locked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    names = ("preset plain", "store, hooks", "store, backend", "recording, hooks")
    modes = {name: edit.MODES[name]._replace(target=math.inf) for name in names}
    monkeypatch.setattr(edit, "MODES", modes)
    assert edit.main([]) == 0
    lines = [line.split(", ") for line in capsys.readouterr().out.splitlines() if line.startswith("miniature")]
    columns = edit.EditRow._fields[2 : edit.MEASURED]
    found = [(", ".join(line[1 : -len(columns)]), line[-len(columns) :]) for line in lines]
    rows = {mode: dict(zip(columns, values, strict=True)) for mode, values in found}
    assert list(rows) == [*names, "pipeline"]
    assert rows["preset plain"]["difference"] == "0"  # bit for bit
    assert float(rows["store, backend"]["difference"]) < 1e-4
    assert rows["recording, hooks"]["difference"] == "0"
    assert [rows[mode]["forwards"] for mode in rows] == ["2", "3", "3", "2", "2"]
    for row in rows.values():
        assert 0 < int(row["background"]) < int(row["tokens"])
        step, plain = float(row["step_s"]), float(rows["pipeline"]["step_s"])
        locked = float(row["locked_step_s"] or step)
        assert float(row["locked_ratio"] or locked / plain) == pytest.approx(locked / plain, rel=0.01)
        assert float(row["edit_ratio"]) == pytest.approx((0.6 * step + 0.4 * locked) / plain, rel=0.01)
    assert [mode for mode in rows if rows[mode]["locked_step_s"]] == list(names[1:])


def test_a_mode_that_misses_its_target_says_what_it_spends_its_time_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = edit.miniature("cpu")
    with torch.no_grad():
        _, missed = edit.measure(made, "cpu", {"preset plain": edit.MODES["preset plain"]._replace(target=0.0)})
    assert missed.note.startswith("target 0.0; ") and "aten::" in missed.note and "%" in missed.note


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_run_ends_with_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert edit.main(["--gpu", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "needs a CUDA GPU" in err
    assert list(tmp_path.iterdir()) == []
