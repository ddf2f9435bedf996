"""The tables of measurements, on files of rows with more runs or another GPU than those committed."""

import csv
import shlex
from pathlib import Path

import pytest
from benchmark_readme import H100

from benchmarks import __main__ as runner
from benchmarks import _edit_rows, _gpu_tables, _targets, report, roofline
from benchmarks._case import WAN_1_3B_480P
from benchmarks._edit_rows import EditRow
from benchmarks._harness import Results, Row, read
from benchmarks._modes import MODES

ROWS = read(H100)
with _edit_rows.beside(H100).open(newline="", encoding="utf-8") as _file:
    EDITS = [EditRow(**line) for line in csv.DictReader(_file)]


def written(folder: Path, rows: list[Row], edits: list[EditRow]) -> Path:
    """Files with these rows."""
    path = folder / "gpu.csv"
    for each, columns, lines in (
        (path, Row._fields, rows), (_edit_rows.beside(path), EditRow._fields, edits),
    ):  # fmt: skip
        with Results(each, columns) as results:
            for line in lines:
                results.write(line)
    return path


def slower(row: EditRow, times: float) -> EditRow:
    return row._replace(
        step_s=f"{times * float(row.step_s):.4f}",
        locked_step_s=row.locked_step_s and f"{times * float(row.locked_step_s):.4f}",
    )  # fmt: skip


@pytest.fixture
def core() -> list[Row]:
    """A second run of what the first table shows, at half the time and twice the ratio."""
    copy = next(row for row in ROWS if row.op == "copy")
    names = ("attention", "kv_lerp_attention_", _gpu_tables.PASS)
    again = [row for row in ROWS if row.op in names and row.status == "ok" and not row.note]
    return [row._replace(p50=f"{factor(row) * float(row.p50):.2f}", commit="1234567") for row in (copy, *again)]


def factor(row: Row) -> float:
    return 1.0 if row.setting == _gpu_tables.LOCK else 0.5


def test_a_second_run_takes_the_place_of_the_first_with_its_own_plain_row(tmp_path: Path, core: list[Row]) -> None:
    first = {(row.model, row.mode): row for row in EDITS if row.model == "wan-1.3b, random"}.values()
    plain, hooks, fused = (next(row for row in first if row.mode == mode)
                           for mode in ("pipeline", "store, hooks", "store, fused"))  # fmt: skip
    again = [slower(plain, 2), slower(hooks, 2)._replace(edit_ratio="1.5")]
    path = written(tmp_path, [*ROWS, *core], [*EDITS, *again])
    after = {name: table(path) for name, table in report.ON_A_GPU.items()}
    for table in after.values():
        names = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("|")]
        assert all(names.count(name) == 1 for name in names)
    assert after["edits"].count("\n") == report.ON_A_GPU["edits"](H100).count("\n")
    seconds = [2 * float(each) for each in (plain.step_s, hooks.step_s, hooks.locked_step_s)]
    said = "a whole edit: store, hooks | {:.2f} s a step | {:.2f} s, locked {:.2f} s | **1.50**".format(*seconds)
    assert said in after["cost"]
    assert f"locked {float(fused.locked_step_s):.2f} s | **{float(fused.edit_ratio):.2f}**" in after["cost"]
    assert f"{float(fused.edit_ratio):.2f} (`fused`) to 1.50 (`hooks`, the default)" in after["cost"]
    own, cudnn, locked = (row for row in (last("attention", "kvlock sm_90"), last("attention", "SDPA cuDNN"),
                                          last("kv_lerp_attention_", "kvlock", "int8")))  # fmt: skip
    assert (
        f"{own / 2e3:.2f} ms; cuDNN {cudnn / 2e3:.2f} ms | {locked / 1e3:.2f} ms | **{2 * locked / own:.2f}**; "
        f"over cuDNN {2 * locked / cudnn:.2f}"
    ) in after["cost"]


def test_a_run_of_some_operators_on_a_cpu_leaves_the_others_in_the_table(tmp_path: Path) -> None:
    path, rows = tmp_path / "cpu.csv", read(report.CPU)
    some = [row for row in rows if row.op == "pack_kv" and row.date == rows[-1].date]
    again = [row._replace(date="later", p50=f"{4 * float(row.p50) if row.provider == 'eager' else row.p50}")
             for row in some]  # fmt: skip
    with Results(path, Row._fields) as results:
        for row in (*rows, *again):
            results.write(row)
    before, after = (report.cpu(each).splitlines() for each in (report.CPU, path))
    assert len(before) == len(after)
    changed = [line for line, other in zip(before, after, strict=True) if line != other]
    assert len(changed) == 3 and all(line.startswith("| `pack_kv`") for line in changed)


def last(op: str, provider: str, source: str = "") -> float:
    """Microseconds of the last row at 32760 tokens and 12 heads."""
    found = [row for row in ROWS if (row.op, row.provider, row.shape) == (op, provider, "wan-1.3b-480p")]
    return float([row for row in found if row.source == source][-1].p50)


def test_each_command_of_the_first_table_measures_its_rows_and_little_else() -> None:
    lines = [line.split(" | ") for line in report.ON_A_GPU["cost"](H100).splitlines() if "`python" in line]
    assert len(lines) == 6
    for title, *_, command in lines:
        words = shlex.split(command.split("`")[1])
        only = words[words.index("--only") + 1]
        if "benchmarks.edit" in words:
            assert [f"| a whole edit: {mode}" for mode in MODES if only in mode] == [title]
            continue
        cases = [case.short() for case in runner.CASES if only in case.label and case.core]
        rows = {(case.op, case.shape.name, p.name) for case in cases for p in case.providers}
        wanted = {(_gpu_tables.PASS, "wan-1.3b-480p", "kvlock")}
        if "attention" in title:
            shape = "wan-1.3b-480p" if "32760" in title else "small-h12"
            names = {"SDPA cuDNN", "kvlock sm_90"}
            wanted = {("kv_lerp_attention_", shape, "kvlock"), *(("attention", shape, name) for name in names)}
        assert wanted <= rows and sum(len(case.providers) for case in cases) <= 20


def test_no_ratio_is_made_of_two_runs(tmp_path: Path, core: list[Row]) -> None:
    alone = [row for row in core if row.op in ("copy", "kv_lerp_attention_")]
    locked, plain, cudnn = _gpu_tables.Measured(written(tmp_path, [*ROWS, *alone], [])).locked_and_plain(
        WAN_1_3B_480P
    )
    assert locked is not None and locked.row is not None and locked.row.commit == "1234567"
    assert (plain, cudnn, _gpu_tables.times(locked, plain)) == (None, None, _gpu_tables.NOT_YET)


def test_one_steady_row_that_misses_a_target_is_enough(tmp_path: Path) -> None:
    own = [row for row in ROWS if (row.op, row.shape, row.provider) == ("kv_lerp_", "small-h12", "kvlock")]
    rows = [*{row.source: row for row in own}.values()]
    good = [row._replace(share_of_copy="0.9") for row in rows]
    bad = rows[0]._replace(share_of_copy="0.5")
    unsteady = rows[1]._replace(share_of_copy="0.4", p80=f"{2 * float(rows[1].p20)}")
    for found, cell in (([*good, bad], "**50 to 90 %**"), (good, "90 %"), ([*good[:1], unsteady], "90 %")):
        lines = _targets.by_length(written(tmp_path, found, [])).splitlines()
        assert f"| `kv_lerp_`: at least 85 % of the copy | H100 | {cell} |" in "\n".join(lines)


def test_a_ratio_of_a_row_that_is_not_steady_is_none_of_a_target(tmp_path: Path) -> None:
    copies, plain, locked = (
        [row for row in ROWS if row.op == "copy"],
        [row for row in ROWS if (row.shape, row.provider) == ("small-h12", "SDPA cuDNN")],
        [row for row in ROWS if (row.op, row.shape, row.provider) == ("kv_lerp_attention_", "small-h12", "kvlock")],
    )
    unsteady = [row._replace(p80=f"{2 * float(row.p20)}") for row in locked]
    for number, (rows, cell) in enumerate(((locked, "**1."), (unsteady, "not yet measured (predicted 1."))):
        path = written(tmp_path / f"{number}", [copies[-1], *plain, *rows], [])
        assert _targets.by_length(path).splitlines()[2].split(" | ")[2].startswith(cell)


def test_a_miss_without_a_cause_is_not_profiled(tmp_path: Path) -> None:
    row = next(row for row in reversed(ROWS) if (row.op, row.provider) == ("kv_lerp_", "Triton"))
    twice = row._replace(**{name: f"{2 * float(getattr(row, name)):.2f}" for name in ("p20", "p50", "p80")})
    path = written(tmp_path, [*ROWS, twice], EDITS)
    lines = report.ON_A_GPU["misses"](path).splitlines()
    (line,) = [line for line in lines if line.startswith("| `kv_lerp_` | Triton |")]
    assert line.endswith("| not profiled |")


@pytest.mark.parametrize("later", [{"p80": "999"}, {"note": "host's times: it was late to queue 60% of the calls"}])
def test_a_row_whose_times_are_not_the_gpus_takes_no_place(tmp_path: Path, later: dict[str, str]) -> None:
    row = next(row for row in ROWS if row.op == "pack_kv" and row.provider == "kvlock")
    for rows, wanted in (([row, row._replace(p50="1", **later)], row.p50), ([row._replace(p50="1", **later)], "1")):
        (line,) = roofline.latest(roofline.measured(written(tmp_path / wanted, rows, [])))
        assert line.measured == float(wanted)


def test_an_edit_that_failed_is_no_measurement(tmp_path: Path) -> None:
    plain = [row for row in EDITS if (row.model, row.mode) == ("wan-1.3b, random", "pipeline")][-1]
    failed = EDITS[2]._replace(step_s="", locked_step_s="", locked_ratio="", edit_ratio="", note="OutOfMemoryError: no")
    path = written(tmp_path, ROWS, [*EDITS, plain, failed])
    assert report.ON_A_GPU["edits"](path) == report.ON_A_GPU["edits"](H100)


@pytest.mark.smoke
def test_another_gpu_gets_the_same_tables_from_its_own_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row._replace(gpu="NVIDIA H200") for row in ROWS if row.op in ("copy", "kv_lerp_")]
    path = written(tmp_path, rows, [])
    report.main([str(path)])
    out = capsys.readouterr().out
    assert "What an edit takes on this GPU is not yet measured." in out and "| 56.2 us | **86.1 us** |" in out
    with pytest.raises(SystemExit):
        report.main([str(path), "--write"])
    path.write_text(path.read_text(encoding="utf-8").replace("NVIDIA H200", "NVIDIA GeForce"), encoding="utf-8")
    with pytest.raises(SystemExit):
        report.main([str(path)])
    assert "no rates are known of 'NVIDIA GeForce', and there is no row of matmul" in capsys.readouterr().err
    others = [row._replace(gpu="NVIDIA GeForce RTX 5090") for row in ROWS if row.op in ("copy", "matmul", "kv_lerp_")]
    report.main([str(written(tmp_path / "another", others, []))])
    out = capsys.readouterr().out
    assert "| GeForce RTX 5090 |" in out and "| GeForce RTX 5090: measured |" in out and "NVIDIA" not in out


def test_attention_on_a_cpu_is_said_beside_plain_attention_once_that_is_measured(tmp_path: Path) -> None:
    path, names = tmp_path / "cpu.csv", ("kv_lerp_attention_", "kvlock")
    for more, said in (
        ({"over_plain": "", "share_of_matmul": ""}, "share of a product of matrices: not yet measured."),
        ({"over_plain": "1.556", "share_of_matmul": "0.547"}, "1.56 times as long as torch's own attention, at 55 %"),
    ):
        with Results(path) as results:
            for row in read(report.CPU):
                results.write(row._replace(date=said, **(more if row[:2] == names else {})))
        assert said in report.cpu(path)
