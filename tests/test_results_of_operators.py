"""What the documents say of operators on a GPU is what the committed rows say."""

import itertools

from benchmark_readme import EARLIER, H100, ROWS, SHAPES, row, table, text

from benchmarks import __main__ as runner
from benchmarks import _gpu_tables, report, roofline
from benchmarks._case import RATES, SMALL_H12, WAN_1_3B_480P, Traffic
from benchmarks._case import SHAPES as SHAPES_OF_MODELS
from benchmarks._harness import Row, is_steady, key
from benchmarks._targets import COLUMNS, SHARES
from benchmarks.attention import LENGTHS
from benchmarks.lerp import is_usual

GPUS = "NVIDIA H200", "NVIDIA H100 80GB HBM3"

STORED = {"kv_lerp_": "bf16", "pack_kv": "int8", "qk_norm_rope_kv_lerp_": "bf16"}  # the rows of the table


def test_every_operator_of_the_table_has_its_prediction_and_its_row_on_both_gpus() -> None:
    lines = table("operator")
    assert [line[0].strip("`") for line in lines] == [*(share.op for share in SHARES), _gpu_tables.PASS]
    above = []
    for op, *cells in lines:
        source, shape = STORED.get(op.strip("`"), ""), WAN_1_3B_480P
        case = next(c for c in runner.CASES if c.core and (c.op, c.shape, c.source) == (op.strip("`"), shape, source))
        for gpu, rows, (predicted, time, share) in zip(GPUS, (ROWS, EARLIER), (cells[:3], cells[3:]), strict=True):
            measured = row(case.op, "kvlock", shape.name, source, rows)
            assert measured is not None
            least, took = case.work(case.shape).predicted_us(RATES[gpu]), float(measured.p50)
            missed = "**" if took > 1.2 * least else ""
            assert (predicted, time) == (f"{least:.1f} us", f"{missed}{took:.1f} us{missed}")
            assert share == f"{100 * float(measured.share_of_copy):.0f} %"
            above += [took - least] if case.op != _gpu_tables.PASS else []
    text(f"first four takes {min(above):.0f} to {max(above):.0f} us more than its bytes, on both GPUs")


def test_what_misses_a_target_at_any_length_is_in_bold() -> None:
    """Counted anew from the rows: each steady one that misses is in a bold cell, and no other cell is bold."""
    lines = table("what, and its target")
    assert [line[1] for line in lines] == ["H200", "H100"] * (len(SHARES) + 2)
    tokens = {shape.name: shape.tokens for shape in (*SHAPES_OF_MODELS, *LENGTHS)}
    kinds = ["kv_lerp_attention_", _gpu_tables.PASS, *(share.op for share in SHARES)]
    least = {share.op: share.least for share in SHARES}
    for i, (op, rows) in enumerate(itertools.product(kinds, (ROWS, EARLIER))):
        bold, found = set(), set()
        for r in {key(r): r for r in rows if is_steady(r)}.values():
            usual = r.setting != "without the lock" and is_usual(r.setting)
            if (r.op, r.provider) != (op, "kvlock") or not usual or (op == _gpu_tables.PASS and r.source != "bf16"):
                continue
            column = next(j for j, (low, high) in enumerate(COLUMNS.values()) if low <= tokens[r.shape] <= high)
            if op in least:
                reached = float(r.share_of_copy) / least[op]
            elif (over := over_plain(r, rows)) is None:
                continue
            else:
                most = {4096: 1.08, 32760: 1.02}.get(tokens[r.shape], 9) if op == kinds[0] else 1.15
                reached = most / over
            found.add(column)
            bold |= {column} if reached < 1 else set()
        cells = lines[i][2:]
        assert {j for j, cell in enumerate(cells) if cell.startswith("**")} == bold, (op, cells)
        assert {j for j, cell in enumerate(cells) if "not yet measured (predicted" not in cell} == found, (op, cells)


def over_plain(r: Row, rows: list[Row]) -> float | None:
    """Over cuDNN, or over the pass without the lock, in the run of the row."""
    wanted = ("attention", "SDPA cuDNN", "", "no rows")
    if r.op == _gpu_tables.PASS:
        wanted = (r.op, "kvlock", "bf16", "without the lock")
    start = max(i for i, other in enumerate(rows[: rows.index(r)]) if other.op == "copy")
    end = next((i for i, other in enumerate(rows) if i > start and other.op == "copy"), len(rows))
    found = [o for o in rows[start:end] if (o.op, o.provider, o.source, o.setting) == wanted and o.shape == r.shape]
    return float(r.p50) / float(found[-1].p50) if found else None


def test_the_pass_is_held_to_the_same_pass_without_the_lock() -> None:
    times, counted = {}, {}
    for shape in ("wan-1.3b-480p", "wan-14b-480p"):
        locked = row(_gpu_tables.PASS, "kvlock", shape, "bf16")
        assert locked is not None
        times[shape] = f"{over_plain(locked, ROWS):.2f}"
        cases = [roofline.BY_KEY[_gpu_tables.PASS, shape, "bf16", setting].work(WAN_1_3B_480P)
                 for setting in (_gpu_tables.LOCK, "without the lock")]  # fmt: skip
        counted[shape] = [work.amount / work.elements for work in cases if isinstance(work, Traffic)]
    few, many = times.values()
    with_lock, without = counted["wan-1.3b-480p"]
    text(
        f"takes {few} times the pass without the lock, with 40 heads {many} times, where bytes make it "
        f"{with_lock / without:.2f}: the lock touches V and the source rows ({with_lock:.1f} bytes an element for "
        f"{without:.1f})."
    )


def test_what_the_target_of_the_pass_asks_is_counted() -> None:
    pass_at_bf16 = _gpu_tables.PASS, "kvlock", WAN_1_3B_480P.name, "bf16"
    last = {r.setting: r for r in ROWS if (r.op, r.provider, r.shape, r.source) == pass_at_bf16}
    plain, locked = (last[setting] for setting in ("without the lock", _gpu_tables.LOCK))
    asked = float(locked.p50) * float(locked.share_of_copy) / (1.15 * float(plain.p50))
    text(f"The target would take {100 * asked:.0f} % of the copy, with a plain pass at "
         f"{100 * float(plain.share_of_copy):.0f} %.")  # fmt: skip


def test_what_the_text_says_of_operators_is_what_the_rows_say() -> None:
    own, large = (row("kv_lerp_", "kvlock", shape, "bf16") for shape in (SHAPES[4096], "wan-14b-720p"))
    assert own is not None and large is not None
    least = roofline.BY_KEY["kv_lerp_", own.shape, "bf16", own.setting].work(SMALL_H12).predicted_us(RATES[GPUS[0]])
    text(f"bytes alone are {least:.1f} of the {float(own.p50):.1f} us at 4096 tokens and 12 heads; at 75600 tokens of "
         f"40 heads it is at {100 * float(large.share_of_copy):.0f} % of the copy, which is one of 1 GiB.")  # fmt: skip
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
        f"those that `qk_norm_rope_kv_pack_` writes at {between(of(written, many, 'e4m3', 'int8'))} with 40, all at "
        "32760 tokens.",
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
