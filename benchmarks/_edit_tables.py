"""Tables of whole edits measured on a GPU, from one file of results and that of the edits beside it."""

import math
from pathlib import Path

from benchmarks import _edit_rows, growth
from benchmarks._case import WAN_1_3B_480P, Rates, Shape
from benchmarks._edit_model import LINK, Seconds, cost_of, seconds
from benchmarks._edit_rows import Edited, EditRow
from benchmarks._edits import named
from benchmarks._gpu_tables import LOCK, NOT_YET, PASS, Measured, markdown, milliseconds, times
from benchmarks._modes import MODES, USUAL, Mode
from benchmarks.lerp import SMALL_H12
from benchmarks.roofline import rates
from kvlock import Store
from kvlock.cost import Cost

SHORTEST, BESIDE = "store, fused", "batch, hooks"
COPY = 10e9  # bytes a second, what one core is assumed to copy out of the cache of files
DASH = "–"
EDIT, OPERATOR = "python -m benchmarks.edit --gpu --shape 1.3b --only", "python -m benchmarks --gpu --core --only"


def edits_of(path: Path, shape: str = "1.3b") -> dict[str, Edited]:
    """The latest of each mode of one shape of Wan."""
    found = _edit_rows.latest(_edit_rows.beside(path))
    return {edited.row.mode: edited for edited in found if edited.row.model == named(shape)}


def foretold(mode: Mode, found: dict[str, Edited], shape: str, gpu: Rates) -> tuple[Cost, Seconds]:
    """What an edit in this mode keeps and takes, on the tokens of the edits measured.

    A locked step is as many times that of the pipeline as the model says, where that was measured.
    """
    tokens, background = growth.sizes([edited.row for edited in found.values()])
    took, usual = seconds(shape, mode, background / tokens, gpu), _usual(found)
    if usual is not None:
        plain = float(usual.plain.step_s)
        took = Seconds(plain, plain * took.locked / took.plain)
    return cost_of(shape, mode, tokens, background), took


def cost(path: Path) -> str:
    """What locking costs on top of what one runs anyway: a sentence, and a table."""
    edits, found = edits_of(path), Measured(path)
    lines = [_whole(edits, name, found.gpu) for name in (SHORTEST, USUAL, BESIDE)]
    for name, shape in (("32760 tokens", WAN_1_3B_480P), ("4096 tokens", SMALL_H12)):
        lines.append(_attention(found, name, shape))
    locked = found.line(PASS, "kvlock", WAN_1_3B_480P.name, "bf16", LOCK)
    alone = found.beside(locked, PASS, "kvlock", "bf16", "without the lock")
    lines.append(
        ("one pass of QK norm and RoPE", milliseconds(alone), milliseconds(locked), f"**{times(locked, alone)}**", "",
         f"`{OPERATOR} {PASS}`")
    )  # fmt: skip
    table = markdown(["what runs", "plain", "locked", "over plain", "more memory", "command"], lines)
    return f"{_sentence(edits)}\n\n{table}"


def _sentence(edits: dict[str, Edited]) -> str:
    if not {SHORTEST, USUAL} <= set(edits):
        return "What an edit takes on this GPU is not yet measured."
    fused, hooks = edits[SHORTEST], edits[USUAL]
    ratios = [f"{float(edited.row.edit_ratio):.2f}" for edited in (fused, hooks)]
    return (
        f"**An edit takes {ratios[0]} (`fused`) to {ratios[1]} (`hooks`, the default) times as long as the plain\n"
        f"pipeline, and {_more(hooks):.1f} GiB more memory**: the shape of Wan 1.3B at 832x480, 81 frames, 40 % of\n"
        f"the steps locked, on one {hooks.row.gpu}."
    )


def _more(edited: Edited) -> float:
    """GiB of the device above the plain pipeline of the same run."""
    return float(edited.row.peak_gib) - float(edited.plain.peak_gib)


def _whole(edits: dict[str, Edited], name: str, gpu: Rates) -> tuple[str, ...]:
    command = f'`{EDIT} "{name}"`'
    if name not in edits:
        _, guess = foretold(MODES[name], edits, "1.3b", gpu)
        return f"a whole edit: {name}", NOT_YET, NOT_YET, f"predicted {guess.edit_ratio:.2f}", DASH, command
    row, plain = edits[name]
    return (
        f"a whole edit: {name}", f"{float(plain.step_s):.2f} s a step",
        f"{float(row.step_s):.2f} s, locked {float(row.locked_step_s):.2f} s", f"**{float(row.edit_ratio):.2f}**",
        f"{_more(edits[name]):+.1f} GiB", command,
    )  # fmt: skip


def _attention(found: Measured, name: str, shape: Shape) -> tuple[str, ...]:
    """Over the kernel that serves it, and over cuDNN where that is another."""
    locked, alone, cudnn = found.locked_and_plain(shape)
    plain, over = milliseconds(alone), f"**{times(locked, alone)}**"
    if alone != cudnn:
        plain += f"; cuDNN {milliseconds(cudnn)}"
        over += f"; over cuDNN {times(locked, cudnn)}"
    title = f"one attention of {name}, rows in int8"
    return title, plain, milliseconds(locked), over, "", f"`{OPERATOR} attention`"


def edits(path: Path, shape: str = "1.3b") -> str:
    """Whole edits with rows as given on the device, and without: measured, or predicted and said so."""
    found, gpu = edits_of(path, shape), rates(path)
    usual = _usual(found)
    alone = usual and Edited(usual.plain, usual.plain)
    plain = foretold(MODES["preset plain"], found, shape, gpu)[1].plain
    cells = _measured(alone) if alone else (_predicted(plain), DASH, DASH)
    lines = [("pipeline alone", *cells, "1", DASH, DASH, DASH, _peak(alone))]
    for name in (name for name in MODES if not outside(name)):
        mode, edited = MODES[name], found.get(name)
        costs, guess = foretold(mode, found, shape, gpu)
        lines.append(
            (
                name, *_measured(edited, guess.locked if mode.config.locks else None),
                NOT_YET if edited is None else f"{float(edited.row.edit_ratio):.2f}",
                f"{guess.edit_ratio:.2f}", _target(mode), f"{costs.bytes_kept / 2**30:.1f} GiB", _peak(edited),
            )
        )  # fmt: skip
    header = ["mode", "a step", "a locked step", "that over plain", "an edit over plain", "predicted", "target"]
    return markdown([*header, "rows kept", "peak"], lines)


def _usual(found: dict[str, Edited]) -> Edited | None:
    """The mode whose run the plain pipeline is shown of, each mode being set against that of its own."""
    return found.get(USUAL) or next(iter(found.values()), None)


def _measured(edited: Edited | None, locked: float | None = None) -> tuple[str, str, str]:
    """A step, a locked one, and that over the plain pipeline; `locked`: seconds predicted of such a step, if any."""
    if edited is None:
        return NOT_YET, DASH if locked is None else _predicted(locked), DASH
    row = edited.row
    if not row.locked_step_s:
        return f"{float(row.step_s):.3f} s", DASH, DASH
    return f"{float(row.step_s):.3f} s", f"{float(row.locked_step_s):.3f} s", f"{float(row.locked_ratio):.2f}"


def _predicted(time: float, least: str = "") -> str:
    return f"{NOT_YET} (predicted {least}{time:.2f} s)"


def _peak(edited: Edited | None) -> str:
    return DASH if edited is None else f"{float(edited.row.peak_gib):.1f} GiB"


def _host(edited: Edited | None) -> str:
    return DASH if edited is None or not edited.row.host_gib else f"{float(edited.row.host_gib):.1f} GiB"


def _target(mode: Mode) -> str:
    return f"{mode.target:.2f}" if math.isfinite(mode.target) else DASH


def miniature(path: Path) -> str:
    """Whole edits of the miniature on a CPU, in milliseconds, and how far their targets are beyond the noise."""
    found = [edited.row for edited in _edit_rows.latest(path) if edited.row.model == named("miniature")]
    ms = lambda seconds: f"{1e3 * float(seconds):.0f} ms" if seconds else ""
    plain, *others = (float(row.step_s) for row in found)
    verdicts = {row.mode: _verdict(row, max(plain, *others) / min(plain, *others)) for row in found}
    lines = [
        (row.mode, ms(row.step_s), ms(row.locked_step_s), f"{float(row.edit_ratio):.3f}", verdicts[row.mode],
         f"{_mib(row.moved_gib)} MiB")
        for row in found
    ]  # fmt: skip
    header = ["mode", "a step", "a locked step", "an edit over plain", "target", "moved in a locked step"]
    missed, met, unknown = (sum(word in said for said in verdicts.values()) for word in ("missed", "met", "noise"))
    return (
        f"{found[-1].gpu}; torch {found[-1].torch}.\n\n{markdown(header, lines)}\n\n"
        "Steps without a lock compute what the pipeline's do, and take "
        f"{min(others) / plain:.2f} to {max(others) / plain:.2f} times as long, which is the noise of the run. "
        f"Beyond it {missed} modes miss their target, {met} meet it, and of {unknown} the run does not tell."
    )


def _verdict(row: EditRow, noise: float) -> str:
    """The target of a row's mode, and whether a ratio meets it that may be `noise` times too large or too small."""
    target = MODES[row.mode].target if row.mode in MODES else math.inf
    if not math.isfinite(target):
        return ""
    low, high = float(row.edit_ratio) / noise, float(row.edit_ratio) * noise
    return f"{target:.2f}, {'missed' if low > target else 'met' if high <= target else 'within the noise'}"


def _mib(gib: str) -> str:
    return f"{1024 * float(gib):.2g}"


def outside(name: str) -> bool:
    """Whether a mode keeps rows in 8 bits, in another place, or from a recording."""
    return MODES[name].store != Store() or MODES[name].recorded


def places(path: Path, shape: str = "1.3b") -> str:
    """Whole edits with rows outside the device or recorded beforehand: measured, or predicted and said so."""
    measured = edits_of(path, shape)
    if not measured:
        return NOT_YET
    usual, gpu = _usual(measured), rates(path)
    assert usual is not None
    lines = []
    for name in filter(outside, MODES):
        mode, edited = MODES[name], measured.get(name)
        (costs, guess), plain = foretold(mode, measured, shape, gpu), (edited or usual).plain
        moved = costs.bytes_moved_replay if mode.recorded else costs.bytes_moved
        files = mode.recorded or mode.store.place == "disk"
        least = "at least " if files else ""
        lines.append(
            (
                name, f"{costs.bytes_kept / 2**30:.1f} GiB", f"{moved / 2**30:.1f} GiB", _slowest(costs, moved, files),
                f"{(2 if mode.recorded else 3) / 2 * float(plain.step_s):.2f} s",
                f"{float(edited.row.locked_step_s):.2f} s" if edited else _predicted(guess.locked, least),
                f"{float(edited.row.edit_ratio):.2f}" if edited else
                f"{NOT_YET} (predicted {least}{guess.edit_ratio:.2f})", _target(mode), _peak(edited), _host(edited),
            )
        )  # fmt: skip
    header = ["mode", "rows of a step", "moved in a locked step", "its slowest part", "the step's forwards"]
    return markdown([*header, "a locked step", "an edit over plain", "target", "peak", "host"], lines)


def _slowest(costs: Cost, moved: int, files: bool) -> str:
    """Seconds of the slowest part of the way, at its assumed rate."""
    if not moved:
        return DASH
    rate, name = (COPY, "files") if files else (LINK, "PCIe")
    return f"{name}, {moved / rate:.2f} s at {rate / 1e9:.0f} GB/s"
