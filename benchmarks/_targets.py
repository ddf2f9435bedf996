"""Tables of what operators are held to: by length with misses in bold, and beside predictions at the headline shape."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks._case import SHAPES, WAN_1_3B_480P, Case, Shape
from benchmarks._gpu_tables import CUDNN, NOT_YET, PASS, RATE_TARGETS, Measured, between, markdown
from benchmarks.attention import LENGTHS as OF_ATTENTION
from benchmarks.lerp import LOCK
from benchmarks.roofline import BY_KEY

STORED = ("bf16", "e4m3", "int8")
PASS_MOST = 1.15  # times the pass without the lock
COLUMNS = {"4096": (4096, 4096), "7392 to 17550": (7392, 17550), "32760": (32760, 32760), "75600": (75600, 75600)}


class Share(NamedTuple):
    """An operator that is to reach at least so much of the copy."""

    op: str
    least: float
    setting: str
    stored: tuple[str, ...] = ("",)  # how its rows are stored
    headline: str = ""  # one of these

    @property
    def target(self) -> str:
        return f"at least {100 * self.least:.0f} % of the copy"


SHARES = (
    Share("kv_lerp_", 0.85, LOCK, STORED, "bf16"),
    Share("pack_kv", 0.85, "share 0.8", STORED, "int8"),
    Share("windowed_variance_", 0.80, "10 slots"),
    Share("guided_velocity", 0.70, "guidance 5 and 1.5"),
)


def by_length(*paths: Path) -> str:
    """What steady rows reach of each target, of all heads and dtypes at the usual setting; misses in bold."""
    found = [Measured(path) for path in paths]
    limits = " and ".join(f"{limit:.2f} at {tokens}" for tokens, limit in RATE_TARGETS.items())
    cells: dict[str, Callable[[Measured, list[Shape]], str]] = {
        f"locked attention, D = 128, over plain cuDNN: at most {limits}": _attention,
        f"`{PASS}`, rows in bf16, over the pass without the lock: at most {PASS_MOST}": _pass,
        **{f"`{share.op}`: {share.target}": functools.partial(_share, share) for share in SHARES},
    }
    every = (*SHAPES, *OF_ATTENTION)
    columns = [[shape for shape in every if least <= shape.tokens <= most] for least, most in COLUMNS.values()]
    lines = [
        (title if gpu is found[0] else "", gpu.name, *(cell(gpu, shapes) for shapes in columns))
        for title, cell in cells.items()
        for gpu in found
    ]
    return markdown(["what, and its target", "GPU", *(f"{name} tokens" for name in COLUMNS)], lines)


def _attention(gpu: Measured, shapes: list[Shape]) -> str:
    wide = [shape for shape in shapes if shape.dim == WAN_1_3B_480P.dim]
    cases = _cases("kv_lerp_attention_", wide, STORED, LOCK)
    return _over(gpu, cases, ("attention", CUDNN, "", "no rows"), RATE_TARGETS.get(shapes[0].tokens))


def _pass(gpu: Measured, shapes: list[Shape]) -> str:
    return _over(gpu, _cases(PASS, shapes, ("bf16",), LOCK), (PASS, "kvlock", "bf16", "without the lock"), PASS_MOST)


def _share(share: Share, gpu: Measured, shapes: list[Shape]) -> str:
    cases = _cases(share.op, shapes, share.stored, share.setting)
    rows = [line.row for case in cases if (line := gpu.own(case)) and line.row and line.steady]
    shares = [100 * float(row.share_of_copy) for row in rows]
    if not shares:
        us = [gpu.predicted(case, "kvlock") for case in cases]
        return f"{NOT_YET} (predicted {between(us, '.1f')} us)" if us else ""
    said = f"{between(shares, '.0f')} %"
    return f"**{said}**" if min(shares) < 100 * share.least else said


def _cases(op: str, shapes: list[Shape], stored: tuple[str, ...], setting: str) -> list[Case]:
    found = (BY_KEY.get((op, shape.name, source, setting)) for shape in shapes for source in stored)
    return [case for case in found if case is not None]


def _over(gpu: Measured, cases: list[Case], plain: tuple[str, str, str, str], most: float | None) -> str:
    """Times over another row of the same shape and run."""
    ratios, predicted = [], []
    op, provider, source, setting = plain
    for case in cases:
        line = gpu.own(case)
        other = gpu.beside(line, *plain)
        if line and other and line.measured and other.measured and line.steady and other.steady:
            ratios.append(line.measured / other.measured)
        beside = BY_KEY[op, case.shape.name, source, setting]
        predicted.append(gpu.predicted(case, "kvlock") / gpu.predicted(beside, provider))
    if not ratios:
        return f"{NOT_YET} (predicted {between(predicted)})"
    return f"**{between(ratios)}**" if most is not None and max(ratios) > most else between(ratios)


def at_the_headline(*paths: Path) -> str:
    """Operators with a target at the shape of Wan 1.3B; in bold what misses its prediction by more than 20 %."""
    found, lines = [Measured(path) for path in paths], []
    held = [(share.op, share.headline, share.setting) for share in SHARES]
    for op, source, setting in (*held, (PASS, "bf16", LOCK)):
        cells = [cell for gpu in found for cell in _headline(gpu, BY_KEY[op, WAN_1_3B_480P.name, source, setting])]
        lines.append((f"`{op}`", *cells))
    columns = [f"{gpu.name}: {what}" for gpu in found for what in ("predicted", "measured", "of the copy")]
    return markdown(["operator", *columns], lines)


def _headline(gpu: Measured, case: Case) -> tuple[str, str, str]:
    predicted = f"{gpu.predicted(case, 'kvlock'):.1f} us"
    line = gpu.own(case)
    if line is None or line.row is None:
        return predicted, NOT_YET, ""
    time = f"{line.measured:.1f} us"
    return predicted, f"**{time}**" if line.flagged else time, f"{100 * float(line.row.share_of_copy):.0f} %"
