"""What the documents say of measurements is what the committed rows say."""

import datetime
import itertools
import re

import pytest
from benchmark_readme import EARLIER, H100, README, RESULTS, ROOT, ROWS, SHAPES, row, table, text

from benchmarks import __main__ as runner
from benchmarks import _edit_rows, _gpu_tables, accuracy, report, roofline
from benchmarks._case import RATES, WAN_1_3B_480P
from benchmarks._case import SHAPES as SHAPES_OF_MODELS
from benchmarks._harness import Row, is_steady, key, read
from benchmarks._model import predict
from benchmarks.figures import OURS

STORED = {"kv_lerp_": "bf16", "pack_kv": "int8", "qk_norm_rope_kv_lerp_": "bf16"}  # the rows of the table


def shares(op: str, shape: str) -> str:
    """Of the copy, for rows of every dtype, on the H100."""
    found = [r for source in ("bf16", "e4m3", "int8") if (r := row(op, "kvlock", shape, source, EARLIER)) is not None]
    least, most = (f"{100 * pick(float(r.share_of_copy) for r in found):.0f}" for pick in (min, max))
    return f"{least} to {most} %"


def test_every_operator_of_the_table_has_its_prediction_and_its_row() -> None:
    predicted: dict[str, str] = {}  # of the first case of each operator
    for case in runner.CASES:
        if case.core and case.shape == WAN_1_3B_480P and case.source == STORED.get(case.op, ""):
            time = case.work(case.shape).predicted_us(RATES["NVIDIA H200"])
            predicted.setdefault(case.op, f"{time:.1f} us")
    cells = table("operator")
    assert len(cells) == 5
    for op, _, prediction, time, share in cells:
        measured = row(op.strip("`"), "kvlock", "wan-1.3b-480p", STORED.get(op.strip("`"), ""))
        assert measured is not None
        assert prediction == predicted[op.strip("`")]
        assert (time, share) == (f"{float(measured.p50):.1f} us", f"{100 * float(measured.share_of_copy):.0f} %")


def test_what_misses_its_target_beside_the_table_is_what_the_rows_say() -> None:
    own = row("kv_lerp_", "kvlock", SHAPES[4096], "bf16")
    assert own is not None
    share = f"{100 * float(own.share_of_copy):.0f} % of the copy"
    lerp, pack = ([shares(op, shape) for shape in (SHAPES[4096], "small-h40")] for op in ("kv_lerp_", "pack_kv"))
    text(
        f"On an H100 at 4096 tokens `kv_lerp_` is at {lerp[0]} of the copy with 12 heads and {lerp[1]} with 40, "
        f"`pack_kv` at {pack[0]} and {pack[1]}, where the target is 85 %.",
        f"misses its own at 4096 tokens: {share} with 12 heads",
        f"At 4096 tokens it misses the target: {share} ({float(own.p50):.1f} us)",
    )
    op = "qk_norm_rope_kv_lerp_"
    times = {}
    for shape in ("wan-1.3b-480p", "wan-14b-480p"):
        locked, alone = row(op, "kvlock", shape, "bf16"), (op, "kvlock", shape, "without the lock")
        plain = [r for r in ROWS if (r.op, r.provider, r.shape, r.setting) == alone][-1]
        assert locked is not None and locked.commit == plain.commit
        times[shape] = f"{float(locked.p50) / float(plain.p50):.2f}"
    few, many = times.values()
    text(
        f"takes {few} times as long with the lock, where the target is 1.15",
        f"takes {few} times the pass without the lock, with 40 heads {many} times",
    )


def test_what_the_target_of_the_pass_asks_is_counted() -> None:
    times, shares, bound = {}, {}, {}
    for gpu, rows in (("H200", ROWS), ("H100", EARLIER)):
        for setting in ("without the lock", _gpu_tables.LOCK):
            lines = [r for r in rows if r.shape == WAN_1_3B_480P.name and (r.op, r.provider, r.source, r.setting) in (
                (_gpu_tables.PASS, "kvlock", source, setting) for source in ("", "bf16"))]  # fmt: skip
            times[gpu, setting], shares[gpu, setting] = float(lines[-1].p50), float(lines[-1].share_of_copy)
            bound[gpu, setting] = float(lines[-1].p50) * shares[gpu, setting]  # its bytes at the rate of the copy
    plain, lock = (("H200", setting) for setting in ("without the lock", _gpu_tables.LOCK))
    asked = bound[lock] / (1.15 * times[plain])
    text(
        f"The pass without it is at {100 * shares[plain]:.0f} % of the copy, so that a factor of 1.15 asks "
        f"{100 * asked:.0f} % of this one, which is at {100 * shares[lock]:.0f} %; on an H100, where it is at "
        f"{100 * shares['H100', plain[1]]:.0f} %, bytes alone make it "
        f"{bound['H100', lock[1]] / times['H100', plain[1]]:.2f}."
    )


def test_the_table_on_an_h100_is_said_beside_that_of_the_h200() -> None:
    measured, predicted = [], []
    for op, source, setting, _ in _gpu_tables.TARGETS:
        found = row(op, "kvlock", WAN_1_3B_480P.name, source, EARLIER)
        assert found is not None
        measured.append(found)
        case = roofline.BY_KEY[op, WAN_1_3B_480P.name, source, setting]
        predicted.append(predict(case, "kvlock", RATES["NVIDIA H100 80GB HBM3"]).us)
    listed = lambda values, form=".1f": "{}, {}, {}, {} and {}".format(*(format(value, form) for value in values))
    shares = listed([100 * float(r.share_of_copy) for r in measured], ".0f")
    text(f"predicted are {listed(predicted)} us and measured {listed([float(r.p50) for r in measured])}, at {shares} %")
    above = [float(r.p50) - us for r, us in zip(measured[:4], predicted, strict=False)]
    above += [float(time.split()[0]) - float(guess.split()[0]) for _, _, guess, time, _ in table("operator")[:4]]
    text(f"first four takes {min(above):.0f} to {max(above):.0f} us more than its bytes")


def test_rows_of_other_times_are_as_many_as_the_readme_says() -> None:
    runs = [*dict.fromkeys(r.commit for r in EARLIER)]
    unnamed = [r for r in EARLIER if not r.library and r.op not in ("copy", "matmul")]
    text(f"The {len(EARLIER)} rows of the H100 are from two commits, {len(unnamed)} of them without a `library`")
    assert len(runs) == 2 and not any(r.provider in ("kvlock", "SDPA cuDNN") for r in unnamed)
    text(f"{sum(not is_steady(r) for r in EARLIER)} rows of the first commit are not steady:")
    assert {r.commit for r in EARLIER if not is_steady(r)} == {runs[0]}
    assert not any("flash-attn" in r.provider for r in (*ROWS, *EARLIER))


@pytest.mark.parametrize("rows", [ROWS, EARLIER], ids=["H200", "H100"])
def test_every_row_of_a_gpu_is_whole(rows: list[Row]) -> None:
    timed = [r for r in rows if r.op not in ("copy", "matmul")]
    assert all(r.status == "ok" and r.p20 and r.p80 and r.used_mib for r in rows)
    assert all(r.gpu and r.torch and r.triton and r.commit and r.date for r in rows)
    assert all(r.driver and r.sm_mhz and r.memory_mhz and r.power_w for r in rows)
    assert all(r.predicted_us and r.max_error and r.relative_error for r in timed)
    assert all(r.share_of_copy or r.share_of_matmul or float(r.work) == 0 for r in timed)
    assert all(r.over_plain for r in timed if r.op == "kv_lerp_attention_")


def test_rows_of_the_h200_are_steady_and_of_one_run_but_for_those_of_one_pass() -> None:
    timed = [r for r in ROWS if r.op not in ("copy", "matmul")]
    assert all(is_steady(r) for r in ROWS) and all(r.library for r in timed)
    run, *others = ([r for r in ROWS if r.commit == commit] for commit in dict.fromkeys(r.commit for r in ROWS))
    text(f"All {len(ROWS)} rows of the H200 are whole and steady")
    counts = [sum(r in timed for r in rows) for rows in others]
    (former, then), (latter, now) = zip((rows[0].commit for rows in others), counts, strict=True)
    text(f"{len(run)} are of one run, of commit {run[0].commit}. This package's rows of QK norm and RoPE are of two "
         f"others as well, {then} of {former} and {now} of {latter}, each with a copy and a product of its own; the "
         f"tables take the {now}.")  # fmt: skip
    for rows in others:
        assert [r.op for r in rows[:2]] == ["copy", "matmul"] and {r.provider for r in rows[2:]} == {"kvlock"}
        assert {r.op for r in rows[2:]} == {_gpu_tables.PASS, "qk_norm_rope_kv_pack_"}
    cases = {case.row_key(p) for case in runner.CASES for p in case.providers
             if case.op in {r.op for r in others[-1]} and p.name == "kvlock"}  # fmt: skip
    assert {key(r) for r in others[-1][2:]} == cases
    lock = _gpu_tables.PASS, "kvlock", WAN_1_3B_480P.name, "bf16", _gpu_tables.LOCK
    locked = [next(float(r.p50) for r in rows if (r.op, r.provider, r.shape, r.source, r.setting) == lock)
              for rows in (run, others[-1])]  # fmt: skip
    text("that pass took {:.0f} us in the run of 150 and {:.0f} in the last.".format(*locked))


def test_how_long_the_core_took_is_what_the_dates_of_its_rows_say() -> None:
    core = {(c.op, p.name, c.shape.name, c.source, c.setting) for c in runner.CASES for p in c.short().providers}
    largest = max(([r for r in ROWS if r.commit == commit] for commit in {r.commit for r in ROWS}), key=len)
    dates = [datetime.datetime.fromisoformat(r.date) for r in largest]
    took = [(end - start).seconds for (start, end), r in zip(itertools.pairwise(dates), largest[1:], strict=True)
            if key(r) in core]  # fmt: skip
    assert len(took) == len(core)
    text(f"the {len(core)} rows of the core took {sum(took)} s, and all {len(largest)} were there "
         f"{(dates[-1] - dates[0]).seconds} s after the first")  # fmt: skip


@pytest.mark.parametrize("name", sorted({*report.BLOCKS} - {"cost"}))
def test_every_table_names_the_command_behind_its_rows(name: str) -> None:
    (command,) = re.findall(r"^Rows by `(.+)`\.$", report.BLOCKS[name](), flags=re.MULTILINE)
    program, *words = command.removeprefix("python -m ").split(" ")
    known = {"benchmarks": "--gpu --core --only", "benchmarks.edit": "--gpu --shape --out", "pytest": "--csv",
             "benchmarks.accuracy": "--out"}  # fmt: skip
    assert {word for word in words if word.startswith("--")} <= {*known[program].split()}
    if "--only" in words:
        assert any(words[words.index("--only") + 1] in case.label for case in runner.CASES)


def test_how_many_rows_miss_their_prediction_is_counted() -> None:
    said, eager = [], []
    for path in (report.H200, H100):
        lines = roofline.measured(path)
        edits = roofline.measured_edits(_edit_rows.beside(path), roofline.rates(path))
        missed = [line for line in edits if line.flagged]
        said.append(f"{sum(line.flagged for line in lines)} of {len(lines)} rows of operators and {len(missed)} of "
                    f"{len(edits)} steps of edits")  # fmt: skip
        eager += [line for line in lines if line.provider == "diffusers, eager"]
    assert {"on disk" in line.provider for line in missed} == {True}
    text(f"by more than 20 %: on the H200 {said[0]}, on the H100 {said[1]}, all of them with rows on disk.")
    text(f"the corrected prediction misses by more than 20 % in all {sum(line.flagged for line in eager)} rows")
    assert all(line.flagged for line in eager)


def test_the_accuracy_of_packed_rows_is_that_of_the_rows() -> None:
    rows = accuracy.read(RESULTS / "accuracy-miniature.csv")
    assert table("transformer") == accuracy.table(rows)
    older = [row._replace(attention_relative_l2="1", background_psnr_db="1") for row in rows if row.background_psnr_db]
    assert accuracy.table([*older, *rows]) == accuracy.table(rows)
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


@pytest.mark.parametrize("name", report.BLOCKS)
def test_the_tables_made_from_rows_are_those_of_the_readme(name: str) -> None:
    table = report.BLOCKS[name]()
    assert report.filled(README, name, table) == README, "python -m benchmarks.report --write"
    assert table.count("\n") > 4


def test_no_cause_is_given_for_what_does_not_miss() -> None:
    lines = [line for path in (report.H200, H100) for line in roofline.latest(roofline.measured(path))]
    assert set(_gpu_tables.CAUSES) <= {line[:2] for line in lines if line.flagged and line.provider in OURS}


def test_a_cause_of_few_tokens_or_narrow_heads_is_one_of_those_alone() -> None:
    few, many = ("small-h12", "small-h40"), ("n4096-h12-d64", "ltx", "wan-1.3b-480p")
    line = roofline.latest(roofline.measured(report.H200))[0]
    of = lambda op, provider, shapes: [line._replace(op=op, provider=provider, shape=shape) for shape in shapes]
    assert _gpu_tables._cause(of("pack_kv", "kvlock", few)) == _gpu_tables.SHORT
    assert _gpu_tables._cause(of("pack_kv", "kvlock", many[1:])) == "not profiled"
    assert _gpu_tables._cause(of("pack_kv", "kvlock", ["a shape of before"])) == "not profiled"
    narrow = _gpu_tables._cause(of("attention", "kvlock sm_90", many))
    assert narrow == f"2 of them {_gpu_tables.NARROW}; others not profiled"
    assert _gpu_tables._cause(of("attention", "kvlock sm_90", many[:2])) == _gpu_tables.NARROW


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


def test_what_loses_on_a_cpu_is_said() -> None:
    found = read(report.CPU)
    rows = {(r.op, r.source, r.setting, r.provider): r for r in found if r.date == found[-1].date}
    shares = {key[:2]: float(r.share_of_copy) for key, r in rows.items() if key[0] == "pack_kv" and key[3] == "kvlock"}
    margins = {key[:2]: shares[key[:2]] / target for key, target in report.CPU_TARGETS.items()}
    assert min(margins.values()) > 1 and min(margins, key=lambda key: margins[key]) == ("pack_kv", "e4m3")
    text("The three targets of `pack_kv` are met, that of e4m3 by least")
    ours = {key[:3]: r for key, r in rows.items() if key[3] == "kvlock"}
    over = {key[:3]: float(r.p50) / float(ours[key[:3]].p50) for key, r in rows.items() if key[3] == "torch.compile"}
    faster = {key for key in over if over[key] < 1}
    served = {key for key, r in ours.items() if r.library == "extension"}
    copies = [("pack_kv", "bf16", "share 0.8"), ("unpack_kv", "bf16", "share 0.8")]
    assert faster & served == {*copies}
    text("compiled, they take {:.2f} (`pack_kv`) and {:.2f} times (`unpack_kv`) as long".format(*map(over.get, copies)))
    assert {key[0] for key in {*over} - served - faster} == {"lock_schedule"}


def test_what_the_text_says_of_operators_is_what_the_rows_say() -> None:
    earlier = {line[:5]: line for line in roofline.latest(roofline.measured(H100))}
    at = lambda *key: earlier[key].row
    share = lambda *key: f"{100 * float(at(*key).share_of_copy):.0f} %"
    text(f"At 75600 tokens it is at {share('windowed_variance_', 'kvlock', 'wan-1.3b-720p', '', '10 slots')} there.")
    guided, formula = (row("guided_velocity", name, WAN_1_3B_480P.name) for name in ("kvlock", "torch.compile"))
    assert guided is not None and formula is not None
    text(f"The compiled formula takes {float(formula.p50) / float(guided.p50):.2f} times as long as the operator.")


def test_what_the_text_says_of_rows_in_8_bits_is_what_the_rows_say() -> None:
    written = "qk_norm_rope_kv_pack_"

    def of(op: str, shape: str, *sources: str) -> list[Row]:
        found = [row(op, "kvlock", shape, source) for source in sources]
        return [r for r in found if r is not None]

    def between(found: list[Row]) -> str:
        values = sorted(100 * float(r.share_of_copy) for r in found)
        return f"{values[0]:.0f} to {values[-1]:.0f} %"

    def times(op: str, shape: str) -> list[float]:
        base, *packed = (float(r.p50) for r in of(op, shape, "bf16", "e4m3", "int8"))
        return [us / base for us in packed]

    few, many = WAN_1_3B_480P.name, "wan-14b-480p"
    (wide,) = of(_gpu_tables.PASS, many, "bf16")
    now = [between(of(_gpu_tables.PASS, shape, "e4m3", "int8")) for shape in (many, few)]
    text(
        f"With 40 heads it is at {100 * float(wide.share_of_copy):.0f} % of the copy.",
        f"Rows in 8 bits are at {now[0]} with 40 heads and {now[1]} with 12,",
        f"those that `qk_norm_rope_kv_pack_` writes at {between(of(written, many, 'e4m3', 'int8'))} with 40.",
    )
    (e4m3, int8), (more_e4m3, more_int8) = (times(_gpu_tables.PASS, shape) for shape in (few, many))
    other = times(_gpu_tables.PASS, "wan-5b-480p")[1]
    text(f"at 32760 tokens e4m3 takes {more_e4m3:.2f} to {e4m3:.2f} times as long as bf16, int8 {more_int8:.2f} (40 "
         f"heads) to {int8:.2f} times; with Wan 5B's 24 heads int8 takes {other:.2f} times as long.",
         f"Why rows in int8 take {other:.2f} times as long as in bf16 with 24 heads")  # fmt: skip
    packed = [each for shape in (few, many) for each in times(written, shape)]
    text(f"Writing them in the pass takes {min(packed):.2f} to {max(packed):.2f} times as long at 32760 tokens.")
    products = [f"{float(r.rate):.0f}" for r in ROWS if r.op == "matmul"]
    text(f"a product of bf16 matrices at {products[0]} TFLOP/s ({products[-1]} in the last of three runs)")
    assert len(products) == 3


def test_what_the_text_says_of_other_providers_is_what_the_rows_say() -> None:
    lines = [line for line in roofline.latest(roofline.measured(report.H200)) if line.steady]
    earlier = [line for line in roofline.latest(roofline.measured(H100)) if line.steady]
    between = lambda found, form="{:.2f} to {:.2f}": form.format(min(found), max(found))

    def over(op: str, other: str, source: str, lines: list[roofline.Line]) -> list[float]:
        us = {line[:5]: line.measured or 0 for line in lines}
        own = [key for key in us if (key[0], key[1], key[3]) == (op, "kvlock", source)]
        return [us[key] / us[op, other, *key[2:]] for key in own if (op, other, *key[2:]) in us]

    others = ("torch.lerp", "torch.compile")
    (sliced,), (compiled,) = (over("kv_lerp_", name, "bf16", lines) for name in others)
    text(f"`kv_lerp_` of bf16 rows takes {sliced:.2f} times the time of `torch.lerp` on a slice")
    many = " and ".join(between(over("kv_lerp_", name, "bf16", earlier)) for name in others)
    text(f"index, and {compiled:.2f} times that of the compiled formula (on the H100, over more shapes, {many}).")
    (packed,) = over("pack_kv", "Triton", "int8", lines)
    text(f"on the H200 that is {100 / packed - 100:.0f} % slower.")
    unpacked = over("unpack_kv", "torch.compile", "int8", earlier)
    least = min(unpacked)
    most = between([one for one in unpacked if one != least])
    text(f"on the H100, {most} times, but at 4096 tokens and 12 heads {least:.2f} times.")
    narrow = [1 + line.missed for line in lines if (line.op, line.provider) == ("attention", "SDPA cuDNN")
              and roofline.BY_KEY[line.op, line.shape, line.source, line.setting].shape.dim == 64]  # fmt: skip
    text(f"(at D = 64 it takes {between(narrow)} times as long here)")
    clocks = [float(line.row.sm_mhz) for line in lines if line.row is not None and "attention" in line.op
              and line.provider in ("kvlock", "kvlock sm_90", "SDPA cuDNN") and line.source in ("", "int8")
              and line.shape in ("wan-1.3b-480p", "wan-14b-480p")]  # fmt: skip
    text(f"right after these rows it ran at {between(clocks, '{:.0f} to {:.0f}')} MHz")


def test_the_noise_of_a_cpu_is_said() -> None:
    found = read(report.CPU)
    rows = {(r.op, r.source, r.setting, r.provider): r for r in found if r.date == found[-1].date}
    same = {key: float(rows[*key[:3], "eager"].p50) / float(r.p50)
            for key, r in rows.items() if r.library == "reference"}  # fmt: skip
    (checked,) = [ratio for key, ratio in same.items() if key[0] == "lock_schedule"]
    noise = sorted(ratio for ratio in same.values() if ratio != checked)
    assert checked < 0.5
    text(f"is the noise of the run, {noise[0]:.2f} to {noise[-1]:.2f} here, but for `lock_schedule`, whose checks take")
    over = lambda op, name: float(times[op, name]) / float(times[op, "kvlock"])
    times = {(r.op, r.provider): r.p50 for r in rows.values() if r.source == "bf16"}
    text(f"a slice of bf16 rows in {over('kv_lerp_', 'torch.lerp'):.2f} times the time of `kv_lerp_`")
    packs, unpacks = over("pack_kv", "eager"), over("unpack_kv", "eager")
    text(f"in eager PyTorch {packs:.2f} and {unpacks:.2f}, which is within the noise")
    copies = packs, unpacks, over("pack_kv", "torch.compile"), over("unpack_kv", "torch.compile")
    assert min(copies) > noise[0]


def test_the_first_page_quotes_rows() -> None:
    mixing, attention = (row(op, "kvlock", SHAPES[32760], "int8") for op in ("kv_lerp_pair_", "kv_lerp_attention_"))
    assert mixing is not None and attention is not None
    quoted = (
        f"Of the {float(attention.p50) / 1000:.1f} ms of one locked attention at 32760 tokens (rows in int8) mixing "
        f"its keys and values is {float(mixing.p50) / 1000:.2f}."
    )
    assert quoted in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
