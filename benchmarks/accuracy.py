"""What packed source rows cost an edit: the error of each locked attention, and what the final video shows of it.

`python -m benchmarks.accuracy` edits held-out scenes with the embedded miniature on the CPU, preset "kv-lock", its
transformer in float32 and in bfloat16. The runs of an edit in one dtype differ in how source rows are stored.
"""

import argparse
import contextlib
import csv
import datetime
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

import kvlock
from benchmarks._harness import Results
from benchmarks._machine import checkout
from kvlock import Store
from kvlock.adapters.families import locked_attentions
from kvlock.cli.models import load_pipeline
from kvlock.cli.signals import ends_when_unread
from kvlock.locked_layers import LERP
from kvlock.mini import quality, scenes
from kvlock.report import background_report
from kvlock.store import Rows

CONFIG = kvlock.preset("kv-lock")


class Rounded(Store):
    """Rows of a float32 model as a bfloat16 model would keep them."""

    def keep(self, x: Tensor, index: Tensor, heads: int, *, keys: bool) -> Rows:
        return Rows(x.index_select(1, index).bfloat16().to(x.dtype))


PACKED: dict[str, Store] = {
    "fp8": Store("fp8", k_mean=False),
    "fp8, k_mean": Store("fp8", k_mean=True),
    "int8": Store("int8", k_mean=False),
    "int8, k_mean": Store("int8", k_mean=True),
}
STORES = {"float32": {"bf16": Rounded()} | PACKED, "bfloat16": PACKED}  # by the dtype of the model
GIVEN = "as given"
FUSED = "as given, kernel fused"  # q and k rounded once instead of three times: a floor under the other differences
ACROSS = "as given, float32 model"  # the bfloat16 run against the float32 one: what the model's own dtype costs
commit = functools.cache(checkout)  # what was loaded, whatever is committed meanwhile


class AccuracyRow(NamedTuple):
    """One run of one edit, against the run with rows as given; text, because what does not apply stays blank."""

    seed: str  # of scene, edit and noise
    model: str  # dtype of the transformer
    rows: str
    attention_relative_l2: str  # |out - given| / |given|, mean over locked steps, layers and both guidance branches
    attention_relative_l2_max: str  # the largest of them
    background_psnr_db: str  # outside the mask
    foreground_psnr_db: str  # inside the mask
    source_background_psnr_db: str  # to the source video instead, outside the mask
    fusion_ratio: str  # mean over locked steps
    steps: str
    locked_steps: str
    torch: str
    diffusers: str
    commit: str
    date: str


class Edit(NamedTuple):
    """A held-out edit as all its runs make it."""

    seed: int
    steps: int
    request: quality.Request
    video: Tensor
    mask: Tensor

    @classmethod
    def of(cls, seed: int, steps: int) -> "Edit":
        request = quality.request(seed)
        return cls(seed, steps, request, scenes.render(request.source), scenes.box_mask(request.source))

    def run(self, pipe: Any, store: Store, kernel: str = "hooks") -> kvlock.KVLockOutput:
        return kvlock.KVLockPipeline(pipe, CONFIG, kernel=kernel, store=store)(
            self.video, self.mask, self.request.target.caption, source_prompt=self.request.source.caption,
            num_inference_steps=self.steps, generator=torch.Generator().manual_seed(self.seed),
        )  # fmt: skip


@contextlib.contextmanager
def watch(transformer: Any, stores: Mapping[str, Store]) -> Iterator[dict[str, list[float]]]:
    """While a run mixes rows as given, before RoPE: every locked attention once more with the rows of each store.

    The run itself goes on with its own. Yields the relative L2 errors of the outputs, one a call of a layer.
    """
    errors: dict[str, list[float]] = {name: [] for name in stores}
    compare = functools.partial(_compare, stores, errors)
    with contextlib.ExitStack() as handles:
        for _, attention in locked_attentions(transformer, CONFIG):
            handles.enter_context(attention.register_forward_hook(compare, with_kwargs=True))
        yield errors


def _compare(
    stores: Mapping[str, Store], errors: dict[str, list[float]], attention: Any, args: tuple, kwargs: dict, output: Any
) -> None:
    taps = [attention.norm_k.kvlock_tap, attention.to_v.kvlock_tap]
    shared, given = taps[0].shared, [tap.k_source or tap.v_source for tap in taps]
    if shared.mode != LERP:
        return
    expected, every_row = _attended(attention, args, kwargs), torch.arange(shared.rows, dtype=torch.int32)
    for name, store in stores.items():
        for tap, source in zip(taps, given, strict=True):
            rows = store.keep(source.rows.data, every_row, tap.key.heads, keys=tap.tensor == "k")
            tap.keep(tap.tensor, rows, source.point)
        out = _attended(attention, args, kwargs)
        errors[name].append(((out - expected).norm() / expected.norm()).item())
    for tap, source in zip(taps, given, strict=True):
        tap.keep(tap.tensor, source.rows, source.point)


def _attended(attention: Any, args: tuple, kwargs: dict) -> Tensor:
    """The output [B, N, C] fp32 of the attention before its last projection, whose bias would count as agreement."""
    seen: list[Tensor] = []
    with attention.to_out[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float())):
        attention.forward(*args, **kwargs)  # not a call, which would be watched in its turn
    return seen[0]


@contextlib.contextmanager
def shared_start(transformer: Any, calls: int, kept: list[tuple[Tensor, Any]]) -> Iterator[None]:
    """Saves a run the first `calls` calls of the transformer, in which no source row has a part, once `kept` has them.

    Raises:
        RuntimeError: the latents of such a call are not bit for bit those of the first run.
    """
    plain, numbers = transformer.forward, itertools.count()

    def forward(hidden_states: Tensor, **arguments: Any) -> Any:
        number = next(numbers)
        if number >= calls:
            return plain(hidden_states=hidden_states, **arguments)
        if number == len(kept):
            kept.append((hidden_states.clone(), plain(hidden_states=hidden_states, **arguments)))
        if not torch.equal(hidden_states, kept[number][0]):
            raise RuntimeError(f"call {number} of the transformer has other latents than in the first run")
        return kept[number][1]

    transformer.forward = forward
    try:
        yield
    finally:
        del transformer.forward  # back to that of the class


def measure(edit: Edit, pipes: Mapping[str, Any]) -> Iterator[AccuracyRow]:
    """All runs of an edit; `pipes` by the dtype of their transformers, float32 first."""
    unlocked = 2 * CONFIG.locked_steps(edit.steps).start  # calls: two branches a step
    first: Tensor | None = None
    for dtype, pipe in pipes.items():
        kept: list[tuple[Tensor, Any]] = []
        with shared_start(pipe.transformer, unlocked, kept), watch(pipe.transformer, STORES[dtype]) as errors:
            given = edit.run(pipe, Store())
        yield _row(edit, dtype, GIVEN, given)
        for name, store in STORES[dtype].items():
            with shared_start(pipe.transformer, unlocked, kept):
                out = edit.run(pipe, store)
            yield _row(edit, dtype, name, out, given.frames, errors[name])
        if first is None:
            first = given.frames
        else:
            with shared_start(pipe.transformer, unlocked, kept):
                out = edit.run(pipe, Store(), "fused")
            yield _row(edit, dtype, FUSED, out, given.frames)
            yield _row(edit, dtype, ACROSS, given, first)


def _row(
    edit: Edit,
    model: str,
    rows: str,
    out: kvlock.KVLockOutput,
    reference: Tensor | None = None,
    errors: list[float] | None = None,
) -> AccuracyRow:
    ratios = [step["fusion_ratio"][0] for step in out.trace.rows() if step["locked"]]
    report = None if reference is None else background_report(reference, out.frames, edit.mask)
    return AccuracyRow(
        str(edit.seed), model, rows,
        f"{sum(errors) / len(errors):.4g}" if errors else "", f"{max(errors):.4g}" if errors else "",
        f"{report.psnr:.2f}" if report else "", f"{report.psnr_inside:.2f}" if report else "",
        f"{background_report(edit.video, out.frames, edit.mask).psnr:.3f}", f"{sum(ratios) / len(ratios):.3f}",
        str(edit.steps), str(len(ratios)), torch.__version__, diffusers.__version__, commit(),
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def table(rows: list[AccuracyRow]) -> list[list[str]]:
    """A line for each model and kind of rows not as given: error in %, PSNRs in dB; mean over edits (worst edit).

    Of a run of the same edit that is there again the last one counts.
    """
    rows = [*{(row.seed, row.model, row.rows): row for row in rows}.values()]

    def cell(column: str, form: str, worst: Any, factor: float = 1) -> str:
        numbers = [factor * float(text) for text in (getattr(row, column) for row in of) if text]
        return f"{sum(numbers) / len(numbers):{form}} ({worst(numbers):{form}})" if numbers else ""

    lines = []
    for model, kind in dict.fromkeys((row.model, row.rows) for row in rows if row.rows != GIVEN):
        of = [row for row in rows if (row.model, row.rows) == (model, kind)]
        percent = cell("attention_relative_l2", ".3f", max, 100)
        psnrs = [cell(f"{side}_psnr_db", ".1f", min) for side in ("background", "foreground")]
        lines.append([model, kind, str(len(of)), percent, *psnrs])
    return lines


def read(path: Path) -> list[AccuracyRow]:
    """The rows of a results file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [AccuracyRow(**line) for line in csv.DictReader(file)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--edits", type=int, default=8)
    parser.add_argument("--bfloat16", type=int, default=3, help="how many of them in bfloat16 too, which is slow")
    parser.add_argument("--first", type=int, default=scenes.HELD_OUT, help="seed of the first edit")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, metavar="DIR", help="add to DIR/accuracy-miniature.csv")
    options = parser.parse_args(arguments)
    pipes = {dtype: load_pipeline(None, dtype=dtype, device="cpu", offload="none") for dtype in STORES}
    rows = []
    with contextlib.ExitStack() as files:
        path = options.out and options.out / "accuracy-miniature.csv"
        results = files.enter_context(Results(path, AccuracyRow._fields)) if path else None
        for i in range(options.edits):
            chosen = pipes if i < options.bfloat16 else {"float32": pipes["float32"]}
            for row in measure(Edit.of(options.first + i, options.steps), chosen):
                rows.append(row)
                print(*row[:7], sep=", ", flush=True)
                if results:
                    results.write(row)
    print(*(f"| {' | '.join(line)} |" for line in table(rows)), sep="\n")


if __name__ == "__main__":
    with ends_when_unread():
        main()
