"""Tables of the operators measured on a GPU, from one file of results; what it lacks is predicted and said so."""

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks import figures, roofline
from benchmarks.__main__ import CASES
from benchmarks._case import SHAPES, Case, Shape
from benchmarks._harness import Key
from benchmarks._model import predict
from benchmarks.attention import HEADS, LENGTHS, TOKENS, serving
from benchmarks.lerp import LOCK
from benchmarks.roofline import BY_KEY, Line

PASS = "qk_norm_rope_kv_lerp_"
CUDNN = "SDPA cuDNN"
RATED = (CUDNN, "SDPA FLASH", "FlexAttention", "SageAttention", "kvlock sm_90")
RATE_TARGETS = {4096: 1.08, 32760: 1.02}  # locked attention over plain cuDNN, by tokens
SHORT = "at 4096 tokens: the start of a launch, which no prediction counts"
PADDED = "not profiled; heads are padded to a power of two"
NARROW = "D below 128, which is predicted by the rate of 128"
UNKNOWN = "not profiled"
CAUSES = {  # of the misses of this package's own rows, by operator and provider, where they are known
    ("kv_lerp_", "kvlock"): SHORT,
    ("kv_lerp_pair_", "kvlock"): SHORT,
    ("pack_kv", "kvlock"): SHORT,
    ("unpack_kv", "kvlock"): SHORT,
    (PASS, "kvlock"): PADDED,
    ("qk_norm_rope_kv_pack_", "kvlock"): PADDED,
    ("windowed_variance_", "kvlock"): "a second launch, see above",
    ("guided_velocity", "kvlock"): "two launches that depend on each other, see above",
    ("attention", "kvlock sm_90"): NARROW,
    ("kv_lerp_attention_", "kvlock"): NARROW,
    ("attention", "kvlock in loop, no rows"): "not profiled; the loop is the one that mixes",
    ("attention", "one launch, no rows"): "not profiled; one program on each multiprocessor",
    ("kv_lerp_attention_", "in loop"): "loads depend on the row of each token, and nothing prefetches them",
    ("kv_lerp_attention_", "one launch"): "not profiled; its own plain time misses nearly as far",
}
NOT_YET = "not yet measured"
SHORT_SHAPES = {shape.name for shape in (*SHAPES, *LENGTHS) if shape.tokens == 4096}
NARROW_SHAPES = {shape.name for shape in (*SHAPES, *LENGTHS) if shape.dim < 128}


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    header = [*header]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


class Measured:
    """The rows of one file; the latest of each, and what was measured in the same run as one of them.

    Raises:
        ValueError: as `roofline.rates`.
    """

    def __init__(self, path: Path) -> None:
        self.gpu = roofline.rates(path)
        self._all = roofline.measured(path)
        gpu = next(line.row.gpu for line in self._all if line.row)
        self.name = re.sub(r"^NVIDIA | \d+GB.*$", "", gpu)  # as short as one says it
        self.lines = roofline.latest(self._all)
        self._latest = {line[:5]: line for line in self.lines}

    def line(self, op: str, provider: str, shape: str, source: str, setting: str) -> Line | None:
        return self._latest.get((op, provider, shape, source, setting))

    def own(self, case: Case) -> Line | None:
        """By what serves the operator of this package."""
        return self._latest.get((case.op, "kvlock", case.shape.name, case.source, case.setting))

    def beside(self, line: Line | None, op: str, provider: str, source: str, setting: str) -> Line | None:
        """Another row at the same shape and of the same run."""
        return roofline.beside(self._all, line, op, provider, source, setting)

    def locked_and_plain(self, shape: Shape) -> tuple[Line | None, Line | None, Line | None]:
        """Attention with rows in int8; then without, by the kernel that serves it and by cuDNN, of the same run."""
        locked = self.line("kv_lerp_attention_", "kvlock", shape.name, "int8", LOCK)
        alone, cudnn = (self.beside(locked, "attention", name, "", "no rows") for name in (serving(shape), CUDNN))
        return locked, alone, cudnn

    def predicted(self, case: Case, provider: str) -> float:
        """Microseconds."""
        return predict(case, provider, self.gpu).us


def times(line: Line | None, other: Line | None, digits: int = 2) -> str:
    """How many times as long the first takes."""
    if line is None or other is None or not line.measured or not other.measured:
        return NOT_YET
    return f"{line.measured / other.measured:.{digits}f}"


def milliseconds(line: Line | None) -> str:
    """With as many digits as make a ratio of two of them that of the table."""
    if line is None or line.measured is None:
        return NOT_YET
    return f"{line.measured / 1e3:.{2 if line.measured >= 1e3 else 3}f} ms"


def lengths(heads: int) -> dict[int, Shape]:
    """The shape of each length of attention with so many heads of 128."""
    found = {shape.tokens: shape for shape in (*SHAPES, *LENGTHS) if (shape.heads, shape.dim) == (heads, 128)}
    return {tokens: found[tokens] for tokens in TOKENS}


def rate_table(path: Path) -> str:
    """TFLOP/s of plain attention over the tokens, and what mixing adds: measured, or predicted and said so."""
    found = Measured(path)
    header = ["heads", "tokens", "cuDNN", "FLASH", "FlexAttention", "SageAttention", "`kvlock` sm_90"]
    lines = (_rates(found, shape) for heads in HEADS for shape in lengths(heads).values())
    return markdown([*header, "locked over the same kernel", "locked over cuDNN", "target"], lines)


def _rates(found: Measured, shape: Shape) -> tuple[str, ...]:
    plain = BY_KEY["attention", shape.name, "", "no rows"]
    locked, alone, cudnn = found.locked_and_plain(shape)
    guess = found.predicted(BY_KEY["kv_lerp_attention_", shape.name, "int8", LOCK], "kvlock")
    over = [
        times(locked, other).replace(NOT_YET, f"{NOT_YET} (predicted {guess / found.predicted(plain, by):.2f})")
        for other, by in ((alone, serving(shape)), (cudnn, CUDNN))
    ]
    rates_, most = (_rate(found, plain, provider) for provider in RATED), RATE_TARGETS.get(shape.tokens)
    return str(shape.heads), str(shape.tokens), *rates_, *over, f"{most:.2f}" if most else ""


def _rate(found: Measured, case: Case, provider: str) -> str:
    line = found.line("attention", provider, case.shape.name, "", "no rows")
    if line is None or line.row is None:
        rate = case.work(case.shape).amount / found.predicted(case, provider) / 1e6
        return f"{NOT_YET} (predicted {rate:.0f})"
    return f"{float(line.row.rate):.0f}"


def models(path: Path) -> str:
    """Attention of one layer of each model, plain and locked: measured, or predicted and said so."""
    found = Measured(path)
    header = ["model", "tokens", "heads", "plain, cuDNN", "locked, rows in int8", "over the same kernel", "over cuDNN"]
    return markdown([*header, "predicted"], (_model(found, shape) for shape in SHAPES))


def _model(found: Measured, shape: Shape) -> tuple[str, ...]:
    locked, alone, cudnn = found.locked_and_plain(shape)
    latest = found.line("attention", CUDNN, shape.name, "", "no rows")
    cases = (
        (BY_KEY["attention", shape.name, "", "no rows"], CUDNN, cudnn or latest),
        (BY_KEY["kv_lerp_attention_", shape.name, "int8", LOCK], "kvlock", locked),
    )
    assumed = [found.predicted(case, name) for case, name, _ in cases]
    cells = [
        f"{NOT_YET} (predicted {guess / 1e3:.2f} ms)" if line is None else milliseconds(line)
        for guess, (_, _, line) in zip(assumed, cases, strict=True)
    ]
    over = times(locked, alone), times(locked, cudnn)
    heads = f"{shape.heads} of {shape.dim}"
    return f"`{shape.name}`", str(shape.tokens), heads, *cells, *over, f"{assumed[1] / assumed[0]:.3f}"


def misses(path: Path) -> str:
    """This package's rows that miss their prediction by more than 20 %, with the cause; the others in one line."""
    lines = [line for line in Measured(path).lines if line.steady]
    ours = (*figures.OURS, *figures.KERNELS)
    own = [line for line in lines if line.provider in ours]
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in own:
        groups.setdefault((line.op, line.provider), []).append(line)
    table = markdown(
        ["operator", "by", "rows that miss", "measured over predicted", "farthest", "why"],
        (
            (
                f"`{op}`", provider, f"{len(missed)} of {len(group)}", between([1 + line.missed for line in missed]),
                _named(max(missed, key=lambda line: abs(line.missed))), _cause(missed),
            )
            for (op, provider), group in groups.items()
            if (missed := [line for line in group if line.flagged])
        ),
    )  # fmt: skip
    others: dict[str, list[Line]] = {}
    for line in lines:
        if line.provider not in ours and line.predictable:
            others.setdefault(line.provider, []).append(line)
    ranges = ", ".join(
        f"{name} {between([1 + line.missed for line in group])}"
        for name, group in others.items()
        if any(line.flagged for line in group)
    )
    flagged = sum(line.flagged for line in own)
    return f"{table}\n\n{flagged} of {len(own)} own rows. Others, measured over predicted: {ranges or 'none'}."


def _cause(missed: list[Line]) -> str:
    """A cause that holds for some shapes only says of how many rows it is one."""
    cause = CAUSES.get(missed[0][:2], UNKNOWN)
    where = {SHORT: SHORT_SHAPES, NARROW: NARROW_SHAPES}.get(cause)
    held = [line for line in missed if where is None or line.shape in where]
    if len(held) == len(missed):
        return cause
    return f"{len(held)} of them {cause}; others {UNKNOWN}" if held else UNKNOWN


def _named(line: Line) -> str:
    """The row, and its times."""
    what = " ".join(filter(None, (line.shape, line.source, line.setting.split(", ")[0])))
    return f"{what}: {line.measured:.1f} us for {line.prediction.us:.1f}"


def between(values: list[float], form: str = ".2f") -> str:
    """The least and the most of them."""
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least} to {most}"


def unmeasured(*paths: Path) -> str:
    """What the runner lists and no row of these files has, by operator: shapes, settings and providers without any."""
    seen = {line[:5] for path in paths for line in roofline.measured(path)}
    listed: dict[str, list[Key]] = {}
    for case in CASES:
        listed.setdefault(case.op, []).extend(map(case.row_key, case.providers))
    lines = []
    for op, keys in listed.items():
        done = [key for key in keys if key in seen]
        missing = [dict.fromkeys(key[part] for key in keys if key[part] not in {one[part] for one in done})
                   for part in (2, 4, 1)]  # fmt: skip
        cells = [", ".join(names).replace(", ratio", " ratio") for names in missing] if done else ["all"] * 3
        if len(done) < len(keys):
            lines.append((f"`{op}`", f"{len(done)} of {len(keys)}", *cells))
    return markdown(["operator", "rows measured", "no row of: shapes", "settings", "providers"], lines)
