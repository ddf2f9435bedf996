"""What the documents say of operators on a GPU is what the committed rows say."""

from benchmark_readme import EARLIER, H100, ROWS, SHAPES, row, table, text

from benchmarks import __main__ as runner
from benchmarks import _gpu_tables, report, roofline
from benchmarks._case import RATES, WAN_1_3B_480P
from benchmarks._harness import Row
from benchmarks._model import predict

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
    pass_at_bf16 = _gpu_tables.PASS, "kvlock", WAN_1_3B_480P.name, "bf16"

    def of(rows: list[Row]) -> list[tuple[float, float]]:
        """Time and share of the copy, without the lock and with it."""
        last = {r.setting: r for r in rows if (r.op, r.provider, r.shape, r.source) == pass_at_bf16}
        found = (last[setting] for setting in ("without the lock", _gpu_tables.LOCK))
        return [(float(r.p50), float(r.share_of_copy)) for r in found]

    (plain, of_plain), (locked, of_locked) = of(ROWS)
    (before, of_before), (locked_before, of_locked_before) = of(EARLIER)
    asked = locked * of_locked / (1.15 * plain)
    text(
        f"The pass without it is at {100 * of_plain:.0f} % of the copy, so that a factor of 1.15 asks "
        f"{100 * asked:.0f} % of this one, which is at {100 * of_locked:.0f} %; on an H100, where it is at "
        f"{100 * of_before:.0f} %, bytes alone make it {locked_before * of_locked_before / before:.2f}."
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
