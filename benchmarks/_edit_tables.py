"""Tables of whole edits measured on a GPU, from one file of results and that of the edits beside it."""

from pathlib import Path

from benchmarks import _edit_rows, growth
from benchmarks._case import WAN_1_3B_480P, Shape
from benchmarks._edit_rows import Edited
from benchmarks._gpu_tables import LOCK, NOT_YET, PASS, Measured, markdown, milliseconds, times
from benchmarks.edit import MODES
from benchmarks.lerp import SMALL_H12
from kvlock import Store, preset
from kvlock.config import DEFAULT_KAPPA
from kvlock.cost import Cost, estimate

MODEL = "wan-1.3b, random"
SHORTEST, USUAL, BESIDE = "store, fused", "store, hooks", "batch, hooks"
LINK = 50e9  # bytes a second, what pinned copies over PCIe 5 with 16 lanes reach
COPY = 10e9  # bytes a second, what one core is assumed to copy out of the cache of files
EDIT, OPERATOR = "python -m benchmarks.edit --gpu --only", "python -m benchmarks --gpu --core --only"


def edits_of(path: Path) -> dict[str, Edited]:
    """The latest of each mode of the model of these tables."""
    found = _edit_rows.latest(_edit_rows.beside(path))
    return {edited.row.mode: edited for edited in found if edited.row.model == MODEL}


def cost(path: Path) -> str:
    """What locking costs on top of what one runs anyway: a sentence, and a table."""
    edits, found = edits_of(path), Measured(path)
    lines = [_whole(edits, name) for name in (SHORTEST, USUAL, BESIDE)]
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
        f"**An edit takes {ratios[0]} (`fused`) to {ratios[1]} (`hooks`) times as long as the plain pipeline, and "
        f"{_more(hooks):.1f} GiB more memory**, on one {hooks.row.gpu}."
    )


def _more(edited: Edited) -> float:
    """GiB of the device above the plain pipeline of the same run."""
    return float(edited.row.peak_gib) - float(edited.plain.peak_gib)


def _whole(edits: dict[str, Edited], name: str) -> tuple[str, ...]:
    command = f'`{EDIT} "{name}"`'
    if name not in edits:
        return f"a whole edit: {name}", NOT_YET, NOT_YET, "", "", command
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


def edits(path: Path) -> str:
    """Whole edits with rows as given on the device, and without."""
    lines = []
    found = edits_of(path)
    for name, (row, plain) in found.items():
        mode = MODES.get(name)
        if mode is not None and outside(name):
            continue
        locked = float(row.locked_step_s) if row.locked_step_s else None
        lines.append(
            (
                "pipeline alone" if row == plain else name, f"{float(row.step_s):.3f} s",
                f"{locked:.3f} s" if locked else "", f"{float(row.locked_ratio):.2f}" if locked else "",
                "1" if row == plain else f"{float(row.edit_ratio):.2f}",
                f"{mode.target:.2f}" if mode is not None and mode.target < 10 else "", f"{float(row.peak_gib):.1f} GiB",
            )
        )  # fmt: skip
    header = ["mode", "a step", "a locked step", "that over plain", "an edit over plain", "target", "peak"]
    return markdown(header, lines)


def miniature(path: Path) -> str:
    """Whole edits of the miniature on a CPU, in milliseconds."""
    found = [edited.row for edited in _edit_rows.latest(path) if edited.row.model == "miniature"]
    ms = lambda seconds: f"{1e3 * float(seconds):.0f} ms" if seconds else ""
    lines = [
        (row.mode, ms(row.step_s), ms(row.locked_step_s), f"{float(row.edit_ratio):.2f}", f"{_mib(row.moved_gib)} MiB")
        for row in found
    ]
    table = markdown(["mode", "a step", "a locked step", "an edit over plain", "moved in a locked step"], lines)
    return f"{found[-1].gpu}; torch {found[-1].torch}.\n\n{table}"


def _mib(gib: str) -> str:
    return f"{1024 * float(gib):.2g}"


def outside(name: str) -> bool:
    """Whether a mode keeps rows in 8 bits, in another place, or from a recording."""
    return MODES[name].store != Store() or MODES[name].recorded


def places(path: Path) -> str:
    """Whole edits with rows outside the device or recorded beforehand: measured, or predicted and said so."""
    measured = edits_of(path)
    if not measured:
        return NOT_YET
    plain = next(iter(measured.values())).plain
    lines = []
    for name in filter(outside, MODES):
        mode = MODES[name]
        costs = estimate(
            growth.WAN_1_3B, preset("kv-lock", kappa=DEFAULT_KAPPA), tokens=int(plain.tokens),
            background_rows=int(plain.background), store=mode.store,
        )  # fmt: skip
        moved = costs.bytes_moved_replay if mode.recorded else costs.bytes_moved
        forwards = 1 if mode.recorded else costs.forwards / costs.forwards_plain
        files = mode.recorded or mode.store.place == "disk"
        guess = f"{NOT_YET} (predicted {'at least ' if files else ''}{forwards:.2f})"
        lines.append(
            (
                name, f"{costs.bytes_kept / 2**30:.1f} GiB", f"{moved / 2**30:.1f} GiB", _slowest(costs, moved, files),
                f"{(2 if mode.recorded else 3) / 2 * float(plain.step_s):.2f} s",
                f"{float(measured[name].row.edit_ratio):.2f}" if name in measured else guess, f"{mode.target:.2f}",
            )
        )  # fmt: skip
    header = ["mode", "rows of a step", "moved in a locked step", "its slowest part", "the step's forwards"]
    return markdown([*header, "an edit over plain", "target"], lines)


def _slowest(costs: Cost, moved: int, files: bool) -> str:
    """Seconds of the slowest part of the way, at its assumed rate."""
    if not moved:
        return "–"
    rate, name = (COPY, "files") if files else (LINK, "PCIe")
    return f"{name}, {moved / rate:.2f} s at {rate / 1e9:.0f} GB/s"
