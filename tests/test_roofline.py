"""Predictions: every row of the runner has one without a GPU, and they stand beside what was measured."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as runner
from benchmarks import _modes, roofline
from benchmarks._case import RATES, TARGET_GPU, WAN_1_3B_480P, Case
from benchmarks._eager_bytes import Counting
from benchmarks._edit_model import seconds
from benchmarks._edit_rows import EditRow
from benchmarks._harness import Results, Row, read
from benchmarks._model import predict

GPU = RATES[TARGET_GPU]
H100 = roofline.RESULTS / "nvidia-h100-80gb-hbm3.csv"


def test_every_row_is_predicted_on_this_machine() -> None:
    for case in runner.CASES:
        nothing_moves = case.setting[-7:] == "ratio 0" and case.op in ("kv_lerp_", "kv_lerp_pair_")
        for provider in case.providers:
            assert (predict(case, provider.name, GPU).us > 0) != nothing_moves, (case.label, provider.name)


def test_eager_steps_are_counted_and_views_are_free() -> None:
    x = torch.empty(10, 100, device="meta")  # 4000 bytes
    index = torch.empty(3, dtype=torch.int64, device="meta")  # 24 bytes
    for step, moved in {
        lambda: x.T.reshape(100, 10)[1:].unsqueeze(0): 0,
        lambda: x + 1: 8000,
        lambda: x + x[:1].expand(10, 100): 4000 + 400 + 4000,
        lambda: x.mul_(2): 8000,
        lambda: x.zero_(): 4000,
        lambda: x.copy_(x[:1]): 400 + 4000,
        lambda: x.half(): 4000 + 2000,
        lambda: x.index_select(0, index): 24 + 2 * 1200,
        lambda: x.index_copy_(0, index, x[:3]): 24 + 2 * 1200,
        lambda: torch.empty_like(x): 0,
        lambda: F.rms_norm(x, (100,)): 8000,  # one step on a GPU
        lambda: x @ x.T: 0,  # bound by its FLOP
    }.items():
        with Counting() as counting:
            step()
        assert counting.bytes == moved


def test_products_and_attention_are_counted_by_their_flop_and_nothing_else() -> None:
    x, q = torch.empty(10, 100, device="meta"), torch.empty(2, 3, 10, 8, device="meta")
    keys = torch.empty(2, 3, 20, 8, device="meta")
    for step, flop in {
        lambda: x @ x.T: 2 * 10 * 10 * 100,
        lambda: F.linear(x, x, x[:, 0]): 2 * 10 * 10 * 100,
        lambda: q @ q.mT: 6 * 2 * 10 * 10 * 8,
        lambda: F.scaled_dot_product_attention(q, keys, keys): 6 * 4 * 10 * 20 * 8,
        lambda: F.scaled_dot_product_attention(query=q, key=keys, value=keys): 6 * 4 * 10 * 20 * 8,
    }.items():
        with Counting() as counting:
            step()
        assert (counting.flop, counting.bytes) == (flop, 0)
    with Counting() as counting:
        x + 1
    assert counting.flop == 0


def find(op: str, source: str, setting: str = "share 0.8, ratio 0.3") -> Case:
    return roofline.BY_KEY[op, WAN_1_3B_480P.name, source, setting]


def test_eager_moves_more_than_the_fewest_bytes_and_mixing_first_adds_its_bytes() -> None:
    lerp, locked = find("kv_lerp_", "bf16"), find("kv_lerp_attention_", "bf16")
    fewest = predict(lerp, "kvlock", GPU).us
    assert fewest == pytest.approx(26216 * 12 * 128 * 6 / GPU.bandwidth * 1e6)
    assert predict(lerp, "eager", GPU).us > 5 * fewest
    plain = predict(find("attention", "", "no rows"), "SDPA cuDNN", GPU).us
    assert predict(locked, "kvlock", GPU).us == pytest.approx(plain + 2 * fewest)
    assert predict(locked, "in loop", GPU).us > predict(locked, "one launch", GPU).us > plain


@pytest.mark.smoke
def test_the_report_marks_what_misses_by_a_fifth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = find("kv_lerp_", "int8")
    predicted = predict(case, "kvlock", RATES["NVIDIA H100 80GB HBM3"]).us
    path = tmp_path / "gpu.csv"
    names = case.op, "kvlock", case.shape.name, case.dtype, case.source, case.setting
    row = Row(*names, "ok", gpu="NVIDIA H100 80GB HBM3")
    rows = [row._replace(p50=f"{times * predicted:.6f}") for times in (1.19, 1.21, 0.79)]
    failed = row._replace(provider="eager", status="failed")
    with Results(path) as results:
        for written in (*rows, failed):
            results.write(written)
    assert [line.flagged for line in roofline.measured(path)] == [False, True, True]
    with Results(path) as results:
        results.write(row._replace(provider="eager", p50="1"))
    assert [line.provider for line in roofline.measured(path)] == ["kvlock"] * 3 + ["eager"]
    with Results(path) as results:
        results.write(failed)
    assert [line.provider for line in roofline.measured(path)] == ["kvlock"] * 3
    assert roofline.main([str(path)]) == 0
    name, first, second, third, last = capsys.readouterr().out.splitlines()
    assert name == "gpu.csv" and last == "2 of 3 rows miss by more than 20 %"
    assert "misses" not in first and second.endswith("misses by 21 %") and third.endswith("misses by 21 %")


def test_what_was_not_measured_is_predicted_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, path = find("kv_lerp_", "int8"), tmp_path / "gpu.csv"
    names = case.op, "kvlock", case.shape.name, case.dtype, case.source, case.setting
    with Results(path) as results:
        results.write(Row(*names, "ok", p50="90", gpu="NVIDIA H100 80GB HBM3"))
    assert roofline.main([str(path), "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    edits = lines.index("edit-gpu.csv")
    assert edits == 3 + sum(len(case.providers) for case in runner.CASES) - 1
    assert sum("not yet measured" in line for line in lines[:edits]) == edits - 3
    assert lines[-1] == "0 of 0 rows miss by more than 20 %"
    steps = len(lines[edits + 1 : -1])  # of two models; the pipeline and preset plain have none that is locked
    assert steps == 2 * 2 * len(_modes.MODES)


def test_edits_stand_beside_the_operators_of_their_gpu(tmp_path: Path) -> None:
    path, took = tmp_path / "edit-gpu.csv", seconds("14b", _modes.MODES["store, hooks"], 0.5, GPU)
    plain = EditRow("wan-14b, random", "pipeline", "", "200", "100", str(took.plain), *[""] * 11)
    locks = plain._replace(mode="store, hooks", locked_step_s=str(1.3 * took.locked))
    others = locks._replace(mode="a mode of before"), locks._replace(mode="batch, hooks", step_s="", note="failed")
    with Results(path, EditRow._fields) as results:
        for row in (plain, locks, *others, plain._replace(model="miniature"), locks._replace(model="miniature")):
            results.write(row)
    lines = roofline.measured_edits(path, GPU)
    assert [(line.provider, line.setting) for line in lines] == [
        ("pipeline", "a step"), ("store, hooks", "a step"), ("store, hooks", "a locked step")
    ]  # fmt: skip
    assert [line.missed for line in lines] == pytest.approx([0, 0, 0.3])
    said = roofline.report(lines).splitlines()
    assert said[-1] == "1 of 3 rows miss by more than 20 %" and said[2].endswith("misses by 30 %") and " s (" in said[2]
    rest = [*roofline.edits_not_measured(lines, GPU)]
    everything = {line[:5] for line in (*lines, *rest)}
    assert len(everything) == len(lines) + len(rest) == 2 * 2 * len(_modes.MODES)
    assert all(line.measured is None and line.prediction.us > 0 for line in rest)


def test_a_gpu_of_unknown_rates_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.csv"
    path.write_text(",".join(Row._fields) + "\n", encoding="utf-8")
    assert roofline.main([str(path)]) == 1
    assert "other.csv: no rates are known" in capsys.readouterr().err


def test_a_gpu_of_unknown_rates_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("kv_lerp_", "kvlock", WAN_1_3B_480P.name, "bf16", "bf16", "share 0.8, ratio 0.3", "ok", p50="90")
    for name, gpu in (("a", "NVIDIA H100 PCIe"), ("b", "NVIDIA H100 80GB HBM3")):
        with Results(tmp_path / f"{name}.csv") as results:
            results.write(row._replace(gpu=gpu))
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    assert roofline.main([]) == 0
    out, err = capsys.readouterr()
    assert "a.csv: no rates are known" in err and "a.csv" not in out and out.startswith("b.csv\nkv_lerp_")


def test_predictions_written_with_a_row_hold_where_it_is_bound_by_one_ceiling() -> None:
    for row in read(H100):
        case = roofline.BY_KEY.get((row.op, row.shape, row.source, row.setting))
        if case is not None and row.provider in ("kvlock", "kvlock sm_90", "SDPA cuDNN") and case.first is None:
            predicted = predict(case, row.provider, RATES["NVIDIA H100 80GB HBM3"]).us
            assert predicted == pytest.approx(float(row.predicted_us), abs=6e-3)
