"""What the documents and the choice of kernels say of measurements is what the committed rows say."""

import csv
import itertools
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as runner
from benchmarks import _edit_rows, _edit_tables, _gpu_tables, accuracy, edit, report, roofline
from benchmarks._case import RATES, WAN_1_3B_480P
from benchmarks._case import SHAPES as SHAPES_OF_MODELS
from benchmarks._edit_rows import EditRow
from benchmarks._harness import Row, read
from benchmarks._model import predict
from benchmarks.figures import OURS
from kvlock_kernels._triton import attend

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
ROWS = read(RESULTS / "nvidia-h100-80gb-hbm3.csv")
STORED = {"kv_lerp_": "bf16", "pack_kv": "int8", "qk_norm_rope_kv_lerp_": "bf16"}  # the rows of the table
SHAPES = {4096: "small-h12", 8192: "n8192-h12", 16384: "n16384-h12", 32760: "wan-1.3b-480p", 75600: "wan-14b-720p"}
NOT_YET = re.compile(r"not yet measured \(predicted [\d.]+\)")
PLAIN = ("SDPA cuDNN", "SDPA FLASH", "FlexAttention", "SageAttention", "kvlock sm_90")


def table(first: str) -> list[list[str]]:
    """The cells of the Markdown table whose header begins with `first`."""
    lines = README.split(f"| {first} |", 1)[1].splitlines()[2:]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows]


def table_of(name: str) -> list[list[str]]:
    """The cells of a block of the report."""
    lines = [line for line in report.BLOCKS[name]().splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def row(op: str, provider: str, shape: str, source: str = "") -> Row | None:
    """The last that was measured."""
    wanted = op, provider, shape, source, "ok"
    found = (r for r in reversed(ROWS) if (r.op, r.provider, r.shape, r.source, r.status) == wanted)
    return next((r for r in found if r.setting != "without the lock"), None)


def test_every_operator_of_the_table_has_its_prediction_and_its_row() -> None:
    predicted: dict[str, str] = {}  # of the first case of each operator
    for case in runner.CASES:
        if case.core and case.shape == WAN_1_3B_480P and case.source == STORED.get(case.op, ""):
            time = case.work(case.shape).predicted_us(RATES["NVIDIA H100"])
            predicted.setdefault(case.op, f"{time:.1f} us")
    cells = table("operator")
    assert len(cells) == 5
    for op, _, prediction, time, share in cells:
        measured = row(op.strip("`"), "kvlock", "wan-1.3b-480p", STORED.get(op.strip("`"), ""))
        assert measured is not None
        assert prediction == predicted[op.strip("`")]
        assert (time, share) == (f"{float(measured.p50):.1f} us", f"{100 * float(measured.share_of_copy):.0f} %")


def test_what_misses_its_target_beside_the_table_is_what_the_rows_say() -> None:
    prose = " ".join(README.split())
    own, by_torch = (row("kv_lerp_", provider, SHAPES[4096], "bf16") for provider in ("kvlock", "torch.lerp"))
    assert own is not None and by_torch is not None
    share, share_of_torch = (f"{100 * float(r.share_of_copy):.0f} %" for r in (own, by_torch))
    assert f"`kv_lerp_` at 4096 tokens: {share} of the copy" in prose
    assert f"At 4096 tokens it misses the target: {share} of the copy ({float(own.p50):.1f} us)" in prose
    assert f"`torch.lerp` on a slice {share_of_torch} ({float(by_torch.p50):.1f} us)" in prose
    op = "qk_norm_rope_kv_lerp_"
    locked = row(op, "kvlock", WAN_1_3B_480P.name, "bf16")
    plain = [r for r in ROWS if (r.op, r.provider, r.setting) == (op, "kvlock", "without the lock")][-1]
    assert locked is not None
    times = f"{float(locked.p50) / float(plain.p50):.2f}"
    assert f"takes {times} times as long with the lock, where the target is 1.15" in prose


def test_rows_without_percentiles_are_as_many_as_the_readme_says() -> None:
    without = [r for r in ROWS if not r.p20]
    short = [r for r in without if r.note.startswith("short run")]
    assert len(short) == 18 and "Eighteen of its rows were taken by another procedure" in README
    rest = [r.provider for r in without if r not in short]
    assert len(rest) == 6 and set(rest) == {f"flash-attn {generation}" for generation in (2, 3, 4)}
    assert "Six more have no times at all, those of flash-attn 2, 3 and 4" in README


def test_the_rates_of_attention_are_those_of_the_rows() -> None:
    cells = table("tokens")
    assert [int(line[0]) for line in cells] == list(SHAPES)
    for line in cells:
        shape = SHAPES[int(line[0])]
        measured = [row("attention", provider, shape) for provider in PLAIN]
        for cell, r in zip(line[1:6], measured, strict=True):
            assert NOT_YET.fullmatch(cell) if r is None else cell == f"{float(r.rate):.0f}" + "*" * bool(r.note)
        locked, cudnn, own = row("kv_lerp_attention_", "kvlock", shape, "int8"), measured[0], measured[-1]
        for cell, plain in ((line[6], own if int(line[0]) >= 32760 else cudnn), (line[7], cudnn)):
            assert plain is not None
            ratio = NOT_YET.fullmatch(cell) if locked is None else cell == f"{float(locked.p50) / float(plain.p50):.2f}"
            assert ratio


def test_the_edits_of_the_table_are_those_of_the_rows() -> None:
    with (RESULTS / "edit-nvidia-h100-80gb-hbm3.csv").open(newline="", encoding="utf-8") as file:
        rows = [*{r["mode"]: r for r in csv.DictReader(file) if r["model"] == "wan-1.3b, random"}.values()]
    cells = table("mode")
    assert len(cells) == len(rows)
    for line, measured in zip(cells, rows, strict=True):
        seconds = [f"{float(measured[name]):.3f} s" if measured[name] else "" for name in ("step_s", "locked_step_s")]
        assert line[1:3] == seconds
        assert line[3] == (f"{float(measured['locked_ratio']):.2f}" if measured["locked_ratio"] else "")
        assert float(line[4]) == round(float(measured["edit_ratio"]), 2)
        assert line[5] == {"2": "1.00", "3": "1.20", "4": "1.40"}[measured["forwards"]] or line[0] == "pipeline alone"
        assert line[-1] == f"{float(measured['peak_gib']):.1f} GiB"


def test_the_first_lines_say_of_whole_edits_what_the_rows_say() -> None:
    with (RESULTS / "edit-nvidia-h100-80gb-hbm3.csv").open(newline="", encoding="utf-8") as file:
        rows = {r["mode"]: r for r in csv.DictReader(file) if r["model"] == "wan-1.3b, random"}
    plain, fused, hooks = (rows[name] for name in ("pipeline", "store, fused", "store, hooks"))
    step, *locked = plain["step_s"], fused["locked_step_s"], hooks["locked_step_s"]
    ratios = [f"{float(each['edit_ratio']):.2f}" for each in (fused, hooks)]
    more = f"{float(hooks['peak_gib']) - float(plain['peak_gib']):.1f} GiB more memory"
    text(f"takes {ratios[0]} (`fused`) to {ratios[1]} (`hooks`) times as long as the plain pipeline, and {more}")
    torch, triton = (".".join(plain[name].split(".")[:2]) for name in ("torch", "triton"))
    said = (
        f"81 frames, bf16, torch {torch}, triton {triton}), a step of the plain pipeline takes {float(step):.2f} s, "
        f'a locked one {float(locked[0]):.2f} s with `kernel="fused"` and {float(locked[1]):.2f} s with hooks; an edit '
        f"that locks the last 40 % of its steps takes {ratios[0]} and {ratios[1]} times the time of the plain one, "
        f"and {more}"
    )
    assert said in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_larger_model_is_predicted_beside_every_mode_and_says_so() -> None:
    predicted = {line[0]: line[4:8] for line in table_of("larger")}
    assert predicted["store, fused"] == ["not yet measured", "1.20", "1.22", "20.0 GiB"]
    assert predicted["batch, hooks"] == ["not yet measured", "1.40", "", "0.0 GiB"]
    assert [*predicted][1:] == [name for name in edit.MODES if not _edit_tables.outside(name)]


@pytest.mark.parametrize("name", sorted({*report.BLOCKS} - {"cost"}))
def test_every_table_names_the_command_behind_its_rows(name: str) -> None:
    (command,) = re.findall(r"^Rows by `(.+)`\.$", report.BLOCKS[name](), flags=re.MULTILINE)
    program, *words = command.removeprefix("python -m ").split(" ")
    known = {"benchmarks": "--gpu --core --only", "benchmarks.edit": "--gpu --shape --out", "pytest": "--csv"}
    assert {word for word in words if word.startswith("--")} <= {*known[program].split()}
    if "--only" in words:
        assert any(words[words.index("--only") + 1] in case.label for case in runner.CASES)


def test_how_many_rows_miss_their_prediction_is_counted() -> None:
    lines = roofline.measured(report.H100)
    text(f"by more than 20 %: on the H100 {sum(line.flagged for line in lines)} of {len(lines)}.")


def test_the_miniature_says_which_targets_it_meets() -> None:
    rows = {one.row.mode: one.row for one in _edit_rows.latest(report.EDITS_ON_CPU)}
    said = {line[0]: line[3:5] for line in table_of("miniature")}
    assert {*said} == {"pipeline", *edit.MODES}
    every = [float(row.step_s) for row in rows.values()]
    noise = max(every) / min(every)
    for name, mode in edit.MODES.items():
        ratio = float(rows[name].edit_ratio)
        missed, met = ratio / noise > mode.target, ratio * noise <= mode.target
        verdict = "missed" if missed else "met" if met else "within the noise"
        assert said[name] == [f"{ratio:.3f}", f"{mode.target:.2f}, {verdict}" if mode.target < 10 else ""]
    missed, met, unknown = (sum(word in line[1] for line in said.values()) for word in ("missed", "met", "noise"))
    text(f"Beyond it {missed} modes miss their target, {met} meet it, and of {unknown} the run does not tell.")
    steps = [step / every[0] for step in every[1:]]
    text(f"take {min(steps):.2f} to {max(steps):.2f} times as long, which is the noise of the run.")


@pytest.mark.parametrize(("ratio", "verdict"), [(1.5, "missed"), (1.2, "within the noise"), (1.1, "met")])
def test_a_target_is_met_or_missed_beyond_the_noise_only(ratio: float, verdict: str) -> None:
    row = EditRow(*[""] * len(EditRow._fields))._replace(mode="store, hooks", edit_ratio=str(ratio))
    assert _edit_tables._verdict(row, 1.1) == f"1.22, {verdict}"


def test_the_accuracy_of_packed_rows_is_that_of_the_rows() -> None:
    rows = accuracy.read(RESULTS / "accuracy-miniature.csv")
    assert table("transformer") == accuracy.table(rows)
    assert all(row.torch and row.diffusers and row.commit and row.date for row in rows)
    assert {(row.steps, row.locked_steps) for row in rows} == {("50", "20")}


def test_the_8_bit_scheme_that_the_readme_names_wins_in_every_edit() -> None:
    order = ["int8, k_mean", "int8", "fp8, k_mean", "fp8"]
    assert "**`int8, k_mean` wins**" in README and set(order) == set(accuracy.PACKED)
    edits: dict[tuple[str, str], dict[str, accuracy.AccuracyRow]] = {}
    for r in accuracy.read(RESULTS / "accuracy-miniature.csv"):
        edits.setdefault((r.model, r.seed), {})[r.rows] = r
    for (model, _), runs in edits.items():
        assert sorted(order, key=lambda rows: float(runs[rows].attention_relative_l2)) == order
        for side in ("background_psnr_db", "foreground_psnr_db") if model == "float32" else ():
            assert sorted(order, key=lambda rows: -float(getattr(runs[rows], side))) == order


PROVIDERS = {attend.OWN: "kvlock sm_90"}  # of kernels that no CPU can check; others have the name of their provider


def test_a_kernel_that_no_cpu_can_check_is_chosen_only_where_a_row_shows_it_right_and_faster() -> None:
    lines = [(line, name) for line in attend.TABLE for name in line.plain if isinstance(name, str)]
    assert lines
    for line, name in lines:
        chosen = [shape for tokens, shape in SHAPES.items() if tokens >= line.tokens]
        assert (line.capability, line.dim) == (9, WAN_1_3B_480P.dim) and chosen  # all these shapes have heads of 128
        for shape in chosen:
            own = row("attention", PROVIDERS.get(name, name), shape)
            cudnn = row("attention", "SDPA cuDNN", shape)
            assert own is not None and cudnn is not None, f"{name} has no row at {shape}"
            assert own.status == "ok" and float(own.max_error) < 0.01 and float(own.p50) < float(cudnn.p50)


def test_mixing_first_is_chosen_where_rows_show_it_faster_than_the_other_ways() -> None:
    assert {line.way for line in attend.TABLE} == {attend.LERP_FIRST}
    for shape in (SHAPES[4096], SHAPES[32760]):
        ways = ("kvlock", "in loop", "one launch")
        first, *others = (row("kv_lerp_attention_", way, shape, "int8") for way in ways)
        assert first is not None
        assert all(other is not None and float(first.p50) < float(other.p50) for other in others)


def test_every_row_says_what_it_was_measured_on() -> None:
    assert all(r.gpu and r.torch and r.triton and r.commit and r.date for r in ROWS)
    assert all(r.max_error or r.op == "copy" for r in ROWS if r.status == "ok")


def test_rows_of_a_gpu_say_what_it_was_doing_where_that_was_asked() -> None:
    asked = [r for r in ROWS if not r.note.startswith("short run") and r.status == "ok"]
    assert all(r.driver and r.sm_mhz and r.memory_mhz and r.power_w for r in asked)


@pytest.mark.parametrize("name", report.BLOCKS)
def test_the_tables_made_from_rows_are_those_of_the_readme(name: str) -> None:
    table = report.BLOCKS[name]()
    assert report.filled(README, name, table) == README, "python -m benchmarks.report --write"
    assert table.count("\n") > 4


def test_no_cause_is_given_for_what_does_not_miss() -> None:
    lines = roofline.latest(roofline.measured(report.H100))
    assert set(_gpu_tables.CAUSES) <= {line[:2] for line in lines if line.flagged and line.provider in OURS}


def test_what_was_not_measured_is_predicted_and_says_so() -> None:
    shapes = {r.shape for r in ROWS if (r.op, r.provider) == ("kv_lerp_attention_", "kvlock")}
    lines = [line for line in report.BLOCKS["models"]().splitlines() if line.startswith("| `")]
    for line in lines:
        assert ("not yet measured" in line) != (line.split("`")[1] in shapes)
    assert len(lines) == len(SHAPES_OF_MODELS)


def test_every_picture_of_the_readme_is_there() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(pictures) == 3
    for picture in pictures:
        assert (ROOT / "benchmarks" / picture).stat().st_size > 10_000


def test_rows_of_a_cpu_say_what_they_were_measured_on() -> None:
    rows = read(report.CPU)
    assert all(r.gpu.endswith("one core") and "changes" not in r.commit for r in rows)


def test_every_mode_of_an_edit_was_measured_on_a_cpu_in_one_run_of_a_commit() -> None:
    found = _edit_rows.latest(report.EDITS_ON_CPU)
    assert [one.row.mode for one in found] == ["pipeline", *edit.MODES]
    assert len({(one.plain, one.row.gpu, one.row.torch, one.row.commit) for one in found}) == 1
    assert "changes" not in found[0].row.commit and found[0].row.gpu.endswith("one thread")


def test_what_loses_on_a_cpu_is_said() -> None:
    found = read(report.CPU)
    rows = {(r.op, r.source, r.provider): r for r in found if r.date == found[-1].date}
    below = [key for key, target in report.CPU_TARGETS.items() if float(rows[*key, "kvlock"].share_of_copy) < target]
    assert below == []
    assert "The three targets of `pack_kv` are met." in README
    faster = {key[0] for key, r in rows.items() if key[2] == "torch.compile" and float(r.p50) < own(rows, key)}
    assert "kv_lerp_pair_" in faster and "kv_lerp_" not in faster


def text(*wanted: str) -> None:
    """Wants each in the README, wherever its lines break."""
    flat = " ".join(README.split())
    assert [each for each in wanted if each not in flat] == []


def test_what_the_text_says_of_attention_is_what_the_rows_say() -> None:
    us = lambda *names: float(found.p50) if (found := row(*names)) is not None else float("nan")
    wan, small = "wan-1.3b-480p", "small-h12"
    op, one, lone = "kv_lerp_attention_", "one launch", "one launch, no rows"
    alone = [us("attention", lone, shape) for shape in (wan, small)]
    fused, compiled = (us(_gpu_tables.PASS, name, wan, "bf16") for name in ("kvlock", "diffusers, compiled"))
    text(
        f"32760 that lerp takes {us('kv_lerp_pair_', 'kvlock', wan, 'int8') / 1e3:.2f} ms; the medians of plain and "
        f"locked attention lie {(us(op, 'kvlock', wan, 'int8') - us('attention', 'kvlock sm_90', wan)) / 1e3:.2f} ms",
        f"takes {us(op, one, wan, 'int8') / alone[0]:.3f} times its own plain time at 32760 tokens (target 1.01; "
        f"{us(op, one, small, 'int8') / alone[1]:.2f} at 4096)",
        f"It takes {fused / compiled:.2f} times the time of diffusers' compiled sequence",
        f"takes {us(op, 'in loop', small, 'bf16') / us(op, 'kvlock', small, 'bf16'):.0f} (bf16 rows) to "
        f"{us(op, 'in loop', small, 'int8') / us(op, 'kvlock', small, 'int8'):.0f} times (int8)",
    )
    names = "kvlock sm_90", "SDPA cuDNN"
    own, cudnn = ([us("attention", name, shape) for shape in SHAPES.values()] for name in names)
    slower = [ours / theirs for ours, theirs in zip(own, cudnn, strict=True)]
    text(f"takes {slower[0]:.2f} and {slower[1]:.2f} times cuDNN's time at 4096 and 8192 tokens and the same at 16384;")
    assert f"{slower[2]:.2f}" == "1.00"


def test_what_the_text_says_of_predictions_is_what_was_and_is_predicted() -> None:
    case = roofline.BY_KEY["kv_lerp_attention_", "wan-1.3b-480p", "int8", _gpu_tables.LOCK]
    small = roofline.BY_KEY["kv_lerp_attention_", "small-h12", "int8", _gpu_tables.LOCK]
    us = lambda case, name: predict(case, name, RATES["NVIDIA H100"]).us
    then = row("kv_lerp_attention_", "in loop", "wan-1.3b-480p", "int8")
    assert then is not None
    text(
        f"it had given them FLOP at cuDNN's rate, {float(then.predicted_us):.1f} us",
        f"now it gives {us(case, 'in loop'):.1f} us to mixing in the loop and {us(case, 'one launch'):.1f} us to",
        f"where the cost model says {us(small, 'in loop') / us(small, 'kvlock'):.1f}:",
    )


def test_the_rows_of_another_procedure_are_counted_and_the_others_have_percentiles() -> None:
    numbers = {18: "Eighteen"}
    others = [r for r in ROWS if r.note.startswith("short run")]
    text(f"{numbers[len(others)]} of its rows were taken by another procedure")
    assert not any(r.p20 or r.p80 or r.power_w for r in others)
    assert all(r.p20 and r.p80 for r in ROWS if r.status == "ok" and r not in others)


def test_the_noise_of_a_cpu_is_said() -> None:
    found = read(report.CPU)
    rows = {(r.op, r.source, r.setting, r.provider): r for r in found if r.date == found[-1].date}
    same = [float(rows[*key[:3], "eager"].p50) / float(r.p50) for key, r in rows.items() if r.library == "reference"]
    text(f"its distance from 1 is the noise of the run, {min(same):.2f} to {max(same):.2f} here")
    times = {r.provider: float(r.p50) for r in rows.values() if (r.op, r.source) == ("kv_lerp_", "bf16")}
    text(f"which takes {times['torch.lerp'] / times['kvlock']:.2f} times as long")


def own(rows: dict[tuple[str, str, str], Row], key: tuple[str, str, str]) -> float:
    return float(rows[key[0], key[1], "kvlock"].p50)


def test_the_first_page_quotes_rows() -> None:
    mixing, attention = (row(op, "kvlock", SHAPES[32760], "int8") for op in ("kv_lerp_pair_", "kv_lerp_attention_"))
    assert mixing is not None and attention is not None
    quoted = f"takes {float(mixing.p50) / 1000:.2f} ms (rows in int8), the attention {float(attention.p50) / 1000:.1f}."
    assert quoted in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
