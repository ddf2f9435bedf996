"""What the lock costs on top of a pipeline: seconds a step of the same edit, plain and locked, in one run.

`python -m benchmarks.edit` edits with the embedded miniature on the CPU; `--gpu` with Wan2.1-T2V-1.3B at 832x480 and 81
frames on the first CUDA GPU, its weights random, so that the cost is real and the pictures are not.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvlock
from benchmarks._harness import Machine, Results
from kvlock.mini import models, scenes

STEPS, LOCKED = 5, 3  # the first of each kind warms up
KAPPA = 0.4  # the share of locked steps in an edit of the paper's settings, 20 of 50
MODES = {  # settings, kernel
    "preset plain": (kvlock.preset("plain"), "hooks"),
    "store, hooks": (kvlock.preset("kv-lock", kappa=LOCKED), "hooks"),
    "store, fused": (kvlock.preset("kv-lock", kappa=LOCKED), "fused"),
    "store, backend": (kvlock.preset("kv-lock", kappa=LOCKED), "backend"),
    "store, backend, full": (kvlock.preset("full-lock", kappa=LOCKED), "backend"),
    "batch, hooks": (kvlock.preset("kv-lock", kappa=LOCKED, source="batch"), "hooks"),
}


class EditRow(NamedTuple):
    """One line of results; text, because what was not measured stays blank."""

    model: str
    mode: str
    dtype: str
    tokens: str
    background: str  # tokens
    step_s: str  # median of the steps without a lock
    locked_step_s: str  # median of those with one; blank where there is none
    locked_ratio: str  # to a step of the plain pipeline
    edit_ratio: str  # of an edit with KAPPA of its steps locked, from the two medians
    forwards: str  # of the last step
    source_gib: str  # keys and values that it keeps
    peak_gib: str  # device memory of the run
    difference: str  # largest, of the final latents, to those of the hooks, or of preset plain to the plain pipeline
    gpu: str = ""
    driver: str = ""
    sm_mhz: str = ""
    memory_mhz: str = ""
    power_w: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""


class Edit(NamedTuple):
    """A pipeline with what it edits."""

    model: str
    pipe: Any
    masks: kvlock.Masks
    source: Tensor
    embeds: Tensor  # of the source prompt
    arguments: dict[str, Any]  # of the pipeline's call


class Steps(NamedTuple):
    """What one run of the pipeline took and gave."""

    seconds: list[float]
    latents: Tensor
    peak: int  # bytes


def miniature(device: str) -> Edit:
    """The embedded model, in fp32."""
    pipe = kvlock.mini.load().to(device)
    scene = scenes.sample(seed=1_000_015)
    video, mask = scenes.render(scene), scenes.box_mask(scene)
    grey = video.masked_fill(mask[..., None], 0.5).movedim(-1, 1)[None]
    frames, height, width = mask.shape
    return Edit(
        "miniature", pipe, kvlock.Masks.from_pixels(mask, pipe), kvlock.encode_source(pipe, video),
        pipe.encode_prompt(scene.caption, do_classifier_free_guidance=False)[0],
        {"prompt": "a white star", "video": grey, "mask": mask[None, :, None].float(), "height": height,
         "width": width, "num_frames": frames},
    )  # fmt: skip


def wan(device: str) -> Edit:
    """A transformer of the shape of Wan2.1-T2V-1.3B in bf16 on noise, with nothing encoded and nothing decoded."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer = WanTransformer3DModel(
                num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30
            )
    finally:
        torch.set_default_dtype(default)
    tokenizer, frames, height, width = models.build_tokenizer(), 81, 480, 832
    config = UMT5Config(vocab_size=len(tokenizer), d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=2)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config),
        vae=AutoencoderKLWan(),  # on the CPU: only its strides are asked for
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    )
    pipe.text_encoder.to(device, torch.bfloat16)
    mask = torch.zeros(frames, height, width, dtype=torch.bool)
    mask[:, 120:312, 208:544] = True
    source = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, device=device)
    source_embeds, prompt, negative = torch.randn(3, 1, 512, 4096, device=device, dtype=torch.bfloat16)
    return Edit(
        "wan-1.3b, random", pipe, kvlock.Masks.from_pixels(mask, pipe), source, source_embeds,
        {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "height": height, "width": width,
         "num_frames": frames},
    )  # fmt: skip


def run(edit: Edit, device: str) -> Steps:
    """One edit; the host waits after each step, which the pipeline alone would not do."""
    on_gpu = device.startswith("cuda")
    synchronize: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    ends = []

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        synchronize()
        ends.append(time.perf_counter())
        return {}

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    edit.pipe.set_progress_bar_config(disable=True)
    latents = edit.pipe(
        **edit.arguments, num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent",
        generator=torch.Generator(device).manual_seed(0), callback_on_step_end=step_end,
    ).frames  # fmt: skip
    seconds = [end - start for start, end in itertools.pairwise(ends)]  # without the first step
    return Steps(seconds, latents.float().cpu(), torch.cuda.max_memory_allocated() if on_gpu else 0)


def measure(edit: Edit, device: str) -> list[EditRow]:
    """The plain pipeline, then every mode."""
    plain = run(edit, device)
    step = statistics.median(plain.seconds)
    rows = [_row(edit, "pipeline", plain, step, None)]
    hooks: Tensor | None = None
    for mode, (config, kernel) in MODES.items():
        with kvlock.attach(
            edit.pipe, edit.source, edit.masks, config=config, source_prompt_embeds=edit.embeds, kernel=kernel
        ) as session:
            steps = run(edit, device)
            trace = session.trace.rows()
        if mode == "store, hooks":
            hooks = steps.latents
        other = plain.latents if mode == "preset plain" else None if "full" in mode else hooks
        difference = None if other is None else (steps.latents - other).abs().max().item()
        rows.append(_row(edit, mode, steps, step, difference, trace))
        print(*rows[-1][:13], sep=", ", flush=True)
    return rows


def _row(
    edit: Edit,
    mode: str,
    steps: Steps,
    step: float,
    difference: float | None,
    trace: list[dict[str, Any]] | None = None,
) -> EditRow:
    """`step`: seconds of a step of the plain pipeline, which has no trace."""
    last = trace[-1] if trace else {"forwards": 2, "source_bytes": 0}
    row = EditRow(
        edit.model, mode, str(edit.pipe.transformer.dtype).removeprefix("torch."), str(edit.masks.num_tokens),
        str(len(edit.masks.index)), "", "", "", "", str(last["forwards"]), f"{last['source_bytes'] / 2**30:.3f}",
        f"{steps.peak / 2**30:.2f}", "" if difference is None else f"{difference:.3g}",
    )  # fmt: skip
    if last["forwards"] == 2:
        each = statistics.median(steps.seconds)
        return row._replace(step_s=f"{each:.4f}", edit_ratio=f"{each / step:.4f}")
    each = statistics.median(steps.seconds[: STEPS - LOCKED - 1])
    locked = statistics.median(steps.seconds[STEPS - LOCKED :])  # without the first of them
    return row._replace(
        step_s=f"{each:.4f}", locked_step_s=f"{locked:.4f}", locked_ratio=f"{locked / step:.4f}",
        edit_ratio=f"{((1 - KAPPA) * each + KAPPA * locked) / step:.4f}",
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 2 where a GPU is asked for and there is none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edit", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="Wan's shape on the first CUDA GPU")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/edit-<gpu>.csv")
    parser.add_argument("--commit", help="what was measured, where this is no git checkout")
    options = parser.parse_args(arguments)
    if options.gpu and not torch.cuda.is_available():
        print("python -m benchmarks.edit --gpu needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    device = "cuda" if options.gpu else "cpu"
    with torch.no_grad():
        rows = measure(wan(device) if options.gpu else miniature(device), device)
    print(*EditRow._fields[:13], sep=", ")
    print(*(", ".join(row[:13]) for row in rows), sep="\n")
    if options.out:
        machine = Machine(options.commit)
        with Results(options.out / f"edit-{'-'.join(machine.gpu.lower().split())}.csv", EditRow._fields) as results:
            for row in rows:
                results.write(row._replace(**machine.now()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
