"""What the documents and the choice of kernels say of attention is what the committed rows say."""

import inspect
import itertools
import re
from functools import partial

from benchmark_readme import EARLIER, ROWS, SHAPES, row, table, text

from benchmarks import _gpu_tables, _model, roofline
from benchmarks._case import RATES, WAN_1_3B_480P
from benchmarks._harness import Row
from benchmarks._model import predict
from kvlock_kernels._triton import attend

NOT_YET = re.compile(r"not yet measured \(predicted [\d.]+\)")
PLAIN = ("SDPA cuDNN", "SDPA FLASH", "FlexAttention", "SageAttention", "kvlock sm_90")


def test_the_rates_of_attention_are_those_of_the_rows() -> None:
    cells = table("heads")
    assert [(int(line[0]), int(line[1])) for line in cells] == [(heads, n) for heads in (12, 40) for n in SHAPES]
    for line in cells:
        tokens = int(line[1])
        shape = _gpu_tables.lengths(int(line[0]))[tokens].name
        for cell, provider in zip(line[2:7], PLAIN, strict=True):
            r = row("attention", provider, shape)
            assert NOT_YET.fullmatch(cell) if r is None else cell == f"{float(r.rate):.0f}"
        locked = row("kv_lerp_attention_", "kvlock", shape, "int8")
        for cell, provider in ((line[7], PLAIN[-1] if tokens >= 32760 else PLAIN[0]), (line[8], PLAIN[0])):
            if locked is None:
                assert NOT_YET.fullmatch(cell)
                continue
            plain = [r for r in ROWS if (r.op, r.provider, r.shape) == ("attention", provider, shape)]
            plain = [r for r in plain if r.commit == locked.commit]
            assert cell == f"{float(locked.p50) / float(plain[-1].p50):.2f}"


PROVIDERS = {attend.OWN: "kvlock sm_90"}  # of kernels that no CPU can check; others have the name of their provider


def test_a_kernel_that_no_cpu_can_check_is_chosen_only_where_a_row_shows_it_right_and_faster() -> None:
    lines = [(line, name) for line in attend.TABLE for name in line.plain if isinstance(name, str)]
    assert lines
    for line, name in lines:
        names = SHAPES if line.dim == WAN_1_3B_480P.dim else {n: f"n{n}-h12-d{line.dim}" for n in SHAPES}
        chosen = [shape for tokens, shape in names.items() if tokens >= line.tokens]
        assert line.capability == 9 and chosen
        for shape, rows in itertools.product(chosen, (ROWS, EARLIER)):
            own = row("attention", PROVIDERS.get(name, name), shape, "", rows)
            cudnn = row("attention", "SDPA cuDNN", shape, "", rows)
            assert own is not None and cudnn is not None, f"{name} has no row at {shape}"
            assert own.status == "ok" and float(own.max_error) < 0.01 and float(own.p50) < float(cudnn.p50)


BOTH = "kvlock sm_90", "SDPA cuDNN"
MIXED = "kv_lerp_pair_ + cuDNN"  # what the operator does at 4096 tokens
earlier = partial(row, rows=EARLIER)


def over(one: Row | None, other: Row | None) -> float:
    assert one is not None and other is not None
    return float(one.p50) / float(other.p50)


def test_mixing_first_is_chosen_where_rows_show_it_faster_than_the_other_ways() -> None:
    assert {line.way for line in attend.TABLE} == {attend.LERP_FIRST}
    op, small, wan = "kv_lerp_attention_", SHAPES[4096], SHAPES[32760]
    for way in ("in loop", "one launch"):
        assert over(earlier(op, way, small, "int8"), earlier(op, MIXED, small, "int8")) > 1
    assert over(earlier(op, "one launch", wan, "int8"), earlier(op, "kvlock", wan, "int8")) > 1
    assert over(row("attention", "kvlock in loop, no rows", wan), row(op, "kvlock", wan, "int8")) > 1


def test_the_numbers_beside_the_choice_of_kernels_are_those_of_the_rows() -> None:
    said = " ".join(inspect.getsource(attend).replace("\n#", "\n").split())
    names = {heads: {n: shape.name for n, shape in _gpu_tables.lengths(heads).items()} for heads in (12, 40)}

    def own(*shapes: str) -> list[str]:
        return [f"{over(*(row('attention', provider, shape) for provider in BOTH)):.2f}" for shape in shapes]

    few, many = ([names[heads][n] for n in (32760, 75600, 4096, 8192, 16384)] for heads in (12, 40))
    assert "{} and {} times cuDNN's time at 32760 and 75600".format(*own(*few[:2])) in said
    assert "{}, {} and {} times at 4096, 8192 and 16384".format(*own(*few[2:])) in said
    assert "with 40 heads {} and {} at 32760 and 75600, and {}, {} and {} below".format(*own(*many)) in said
    at_64 = own(*(f"n{n}-h12-d64" for n in (32760, 75600, 4096, 8192, 16384)), "n32760-h40-d64")
    below = "At D = 64: {} and {} times with 12 heads at 32760 and 75600 tokens, {}, {} and {} below; {} with 40 at"
    assert below.format(*at_64) in said
    wider = own(*(f"n{n}-h16-d96" for n in (4096, 16384, 32760)))
    assert "{}, {} and {} times at 4096, 16384 and 32760 tokens of 16 heads".format(*wider) in said
    text("At D = 96 it takes {}, {} and {} times at 4096, 16384 and 32760, and is not chosen".format(*wider))
    op, small, wan = "kv_lerp_attention_", {heads: names[heads][4096] for heads in names}, SHAPES[32760]
    locked = [
        over(row(op, "kvlock", shape, source), row("attention", "SDPA cuDNN", shape))
        for shape in small.values() for source in ("bf16", "e4m3", "int8")
    ]  # fmt: skip
    assert f"mixing first takes {min(locked):.2f} to {max(locked):.2f} times as long as plain attention" in said
    mixed, loop, launch = (earlier(op, way, SHAPES[4096], "int8") for way in (MIXED, "in loop", "one launch"))
    in_bf16 = over(*(earlier(op, way, SHAPES[4096], "bf16") for way in ("in loop", "kvlock")))
    in_int8 = over(loop, mixed)
    assert f"mixing in the loop takes {in_bf16:.0f} (bf16) to {in_int8:.0f} times (int8) as long as that" in said
    assert f"one launch {over(launch, mixed):.1f} times" in said
    twice = over(*(earlier(op, way, wan, "int8") for way in ("one launch", "kvlock")))
    alone = over(row("attention", "kvlock in loop, no rows", wan), row(op, "kvlock", wan, "int8"))
    assert f"one launch takes twice as long, and the loop {alone:.1f} times before" in said and round(twice) == 2
    launched = over(earlier(op, "one launch", wan, "int8"), earlier(op, "kvlock", wan, "int8"))
    text(f"takes {in_bf16:.0f} to {in_int8:.0f} times as long as mixing first, and the one launch that hides the lerp "
         f"{launched:.0f} to {over(launch, mixed):.0f} times, on an H100")  # fmt: skip
    rates = [row("attention", f"SDPA {name}", wan) for name in ("cuDNN", "FLASH", "EFFICIENT")]
    tens = [10 * round(float(r.rate) / 10) for r in rates if r is not None]
    assert "cuDNN reaches {} TFLOP/s at 32760 tokens, FLASH {}, EFFICIENT {}".format(*tens) in said
    before = [earlier("attention", "SDPA cuDNN", names[12][n]) for n in (4096, 8192, 16384)]
    measured = [f"{float(r.rate):.0f}" for r in before if r is not None]
    assert "cuDNN was measured at {}, {} and {}".format(*measured) in said


def test_what_the_text_says_of_attention_is_what_the_rows_say() -> None:
    us = lambda *names, rows=ROWS: float(r.p50) if (r := row(*names, rows=rows)) is not None else float("nan")
    before = partial(us, rows=EARLIER)
    wan, small = "wan-1.3b-480p", "small-h12"
    op, one, lone = "kv_lerp_attention_", "one launch", "one launch, no rows"
    alone = [before("attention", lone, shape, "") for shape in (wan, small)]
    fused, compiled = (us(_gpu_tables.PASS, name, wan, "bf16") for name in ("kvlock", "diffusers, compiled"))
    apart = us(op, "kvlock", wan, "int8") - us("attention", "kvlock sm_90", wan, "")
    text(
        f"At 32760 the lerp of its keys and values takes {us('kv_lerp_pair_', 'kvlock', wan, 'int8') / 1e3:.2f} ms, "
        f"and the medians of plain and locked attention lie {apart / 1e3:.2f} ms apart",
        f"takes {before(op, one, wan, 'int8') / alone[0]:.3f} times its own plain time at 32760 tokens and "
        f"{before(op, one, small, 'int8') / alone[1]:.2f} times at 4096, rows in int8, on an H100 (target 1.01)",
        f"It takes {fused / compiled:.2f} times the time of diffusers' compiled sequence",
        f"takes {before(op, 'in loop', small, 'bf16') / before(op, 'kvlock', small, 'bf16'):.0f} (bf16 rows) to "
        f"{before(op, 'in loop', small, 'int8') / before(op, MIXED, small, 'int8'):.0f} times (int8)",
    )
    names = "kvlock sm_90", "SDPA cuDNN"
    own, cudnn = ([us("attention", name, shape, "") for shape in SHAPES.values()] for name in names)
    slower = [ours / theirs for ours, theirs in zip(own, cudnn, strict=True)]
    text("takes {:.2f}, {:.2f} and {:.2f} times cuDNN's time at 4096, 8192 and 16384 tokens with".format(*slower))
    many = [us("attention", name, "wan-14b-480p", "") for name in names]
    text(f"for sm_90 is {1 / slower[3]:.2f} (12 heads) and {many[1] / many[0]:.2f} times (40) as fast there")


def test_what_the_text_says_of_lengths_that_are_no_multiple_of_128_is_what_the_rows_say() -> None:
    def of(shape: str, provider: str) -> Row:
        found = row("attention", provider, shape)
        assert found is not None
        return found

    over = [float(of(shape, "kvlock sm_90").p50) / float(of(shape, "SDPA cuDNN").p50)
            for shape in ("wan-5b-480p", "cogvideox-2b", "ltx")]  # fmt: skip
    ragged, *even = (of(shape, "SDPA cuDNN") for shape in ("wan-5b-480p", "n8192-h40", "n8192-h12"))
    rates = [f"{float(r.rate):.0f}" for r in (ragged, *even)]
    text(
        f"8190 tokens take {float(ragged.p50) / 1e3:.2f} ms ({rates[0]} TFLOP/s)",
        f"where 8192 have {rates[1]} to {rates[2]}.",
        f"takes {over[0]:.2f} times as long there, and {over[1]:.2f} times at the 17550 tokens of CogVideoX-2B, but "
        f"{over[2]:.2f} times at the 7392 of LTX.",
    )


def test_what_bytes_make_of_attention_at_4096_tokens_is_counted() -> None:
    case = roofline.BY_KEY["kv_lerp_attention_", SHAPES[4096], "int8", _gpu_tables.LOCK]
    plain = row("attention", "SDPA cuDNN", SHAPES[4096])
    copy = next(r for r in ROWS if r.op == "copy")
    assert case.first is not None and plain is not None
    moved = case.first(case.shape).amount
    us = moved / (float(copy.rate) * 1e3)
    text(f"bytes alone make it {1 + us / float(plain.p50):.2f}: the lerp of K and V is {moved / 1e6:.0f} MB with rows "
         f"in int8, {us:.0f} us at the rate of a copy, of {float(plain.p50):.0f}.")  # fmt: skip
    many = over(row("kv_lerp_attention_", "kvlock", "small-h40", "int8"), row("attention", "SDPA cuDNN", "small-h40"))
    assert many <= float(_gpu_tables.RATE_TARGETS[4096]) < 1 + us / float(plain.p50) + 0.02


def test_how_much_faster_an_h200_multiplies_is_what_the_rows_say() -> None:
    faster = [over(earlier("attention", name, shape), row("attention", name, shape))
              for name in BOTH for shape in (SHAPES[32760], "wan-14b-480p")]  # fmt: skip
    text(f"attention at 32760 tokens is {min(faster):.2f} to {max(faster):.2f} times as fast, by cuDNN and sm_90, with "
         "12 heads and 40.")  # fmt: skip
    assumed = RATES["NVIDIA H200"].products / RATES["NVIDIA H100 80GB HBM3"].products
    text(f"was assumed to multiply {assumed:.2f} times as fast")


def test_a_ratio_below_one_is_put_down_to_the_clock_of_its_rows() -> None:
    shape = "wan-5b-480p"
    locked = [row("kv_lerp_attention_", "kvlock", shape, source) for source in ("bf16", "e4m3", "int8")]
    plain = row("attention", "SDPA cuDNN", shape)
    assert plain is not None and all(over(r, plain) < 1 for r in locked)
    clocks = sorted(r.sm_mhz for r in locked if r is not None)
    text(f"its locked rows ran at {clocks[0]} to {clocks[-1]} MHz, plain cuDNN before them at {plain.sm_mhz}.")
    text(f"The {over(locked[-1], plain):.2f} of Wan 5B is likely the clock's")


def test_what_the_text_says_of_predictions_is_what_is_predicted() -> None:
    small = roofline.BY_KEY["kv_lerp_attention_", "small-h12", "int8", _gpu_tables.LOCK]
    us = lambda name: predict(small, name, RATES["NVIDIA H100 80GB HBM3"]).us
    text(f"where the cost model says {us('in loop') / us('kvlock'):.1f}:")
    text(f"from cuDNN's rate to the {_model.SIMPLE_LOOP / 1e12:.0f} TFLOP/s of Triton's tutorial")
