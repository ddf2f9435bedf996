"""Tiny random Wan and VACE pipelines, 96x96 px and 9 frames, built from config."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from torch.utils._python_dispatch import TorchDispatchMode

from kvlock import KVLockConfig, Masks, Session, attach

SIZE, FRAMES, TEXT = 96, 9, 8
LATENT = (16, 3, 12, 12)
TOKENS = 108


def transformer(kind: type = WanTransformer3DModel, *, layers: int = 2, seed: int = 0, **extra: Any):
    """A random transformer whose weights are large enough for every part of it to matter."""
    torch.manual_seed(seed)
    if kind is WanVACETransformer3DModel:
        extra = {"vace_layers": [0, 1], "vace_in_channels": 96} | extra
    extra = {"text_dim": 32} | extra
    model = kind(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        **extra,
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.mul_(1.5)
    return model.eval()


def scheduler(name: str = "euler", shift: float = 3.0):
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def vae() -> AutoencoderKLWan:
    torch.manual_seed(1)
    model = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=0, temperal_downsample=[False, True, True]
    )
    return model.eval()


def pipeline(kind: type = WanPipeline, schedule: str = "euler", *, layers: int = 2, **extra: Any):
    others = {WanVACEPipeline: WanVACETransformer3DModel, SkyReelsV2Pipeline: SkyReelsV2Transformer3DModel}
    model = transformer(others.get(kind, WanTransformer3DModel), layers=layers, **extra)
    pipe = kind(tokenizer=None, text_encoder=None, vae=vae(), scheduler=scheduler(schedule), transformer=model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixel_mask() -> torch.Tensor:
    """A box in the middle, [F, H, W] bool; dilated it leaves the outer ring of tokens to lock."""
    mask = torch.zeros(FRAMES, SIZE, SIZE, dtype=torch.bool)
    mask[:, 36:60, 36:60] = True
    return mask


def masks(pipe: Any, **kwargs: Any) -> Masks:
    found = Masks.from_pixels(pixel_mask(), pipe, **kwargs)
    assert 0 < found.background_rows < found.num_tokens
    return found


def source_latents() -> torch.Tensor:
    return rand(1, *LATENT, seed=5)


PROMPT = {"prompt_embeds": rand(1, TEXT, 32, seed=2), "negative_prompt_embeds": rand(1, TEXT, 32, seed=3)}
SOURCE_PROMPT = rand(1, TEXT, 32, seed=4)


def call(pipe: Any, *, steps: int = 6, guidance_scale: float = 5.0, seed: int = 0, **extra: Any) -> torch.Tensor:
    """One pipeline call; returns the final latents."""
    kwargs: dict[str, Any] = {name: embeds.to(pipe.device) for name, embeds in PROMPT.items()} | {
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    if isinstance(pipe, WanVideoToVideoPipeline):
        kwargs["video"] = torch.rand(1, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
    else:
        kwargs["num_frames"] = FRAMES
    if isinstance(pipe, WanVACEPipeline):
        kwargs["video"] = torch.rand(1, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
        kwargs["mask"] = pixel_mask()[None, :, None].float()
    return pipe(**(kwargs | extra)).frames


@contextlib.contextmanager
def attached(
    pipe: Any,
    config: KVLockConfig,
    *,
    source: torch.Tensor | None = None,
    prompt: torch.Tensor | None = SOURCE_PROMPT,
    kernel: str = "hooks",
) -> Iterator[Session]:
    """`kvlock.attach` around calls that are meant to lock; leaving the block asserts that the last one did."""
    source = source_latents() if source is None else source
    made = masks(pipe, dilate_tokens=config.dilate_tokens)
    with attach(pipe, source, made, config=config, source_prompt_embeds=prompt, kernel=kernel) as session:
        yield session
    assert_locked(session.trace.rows(), config)


def locked_call(
    pipe: Any, config: KVLockConfig, *, source: torch.Tensor | None = None, kernel: str = "hooks", **extra: Any
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """One attached pipeline call that is meant to lock; returns the final latents and the trace."""
    with attached(pipe, config, source=source, kernel=kernel) as session:
        latents = call(pipe, **extra)
    return latents, session.trace.rows()


def assert_locked(trace: list[dict[str, Any]], config: KVLockConfig) -> None:
    """Some step mixed new and source rows in earnest, 0 < alpha < 1.

    A config that fixes alpha at 0 or 1, or switches the lock off, leaves no such step; every step then has that alpha.
    """
    ratios = {ratio for row in trace if row["in_window"] for ratio in row["fusion_ratio"]}
    fixed = {"full": 1.0, "off": 0.0}.get(str(config.fusion), config.fusion)
    if fixed in (0.0, 1.0):
        assert ratios == {fixed}
    else:
        assert any(0 < ratio < 1 for ratio in ratios), f"no partial fusion ratio among {sorted(ratios)}"


def leftovers(pipe: Any) -> list[str]:
    """Everything an attachment could leave on a pipeline."""
    found = []
    for path, module in pipe.transformer.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        found += [f"{path} hook {hook}" for hook in hooks]
        found += [f"{path}.{name}" for name in vars(module) if "kvlock" in name or name == "set_attention_backend"]
        if "kvlock" in type(getattr(module, "processor", None)).__module__:
            found.append(f"{path}.processor")
        found += [f"{path} class" for base in type(module).__mro__[1:] if base.__name__ == type(module).__name__]
    return found + [name for name in vars(pipe.scheduler) if name in ("step", "set_timesteps") or "kvlock" in name]


class Lerps(TorchDispatchMode):
    """Counts the lerps of stored rows for each tap of a pipeline, by its key; None is a source beside the edit."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.counts: Counter[tuple | None] = Counter()
        self._modules = [*pipe.transformer.modules()]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.kvlock_kernels.kv_lerp_.default:
            taps = [m.kvlock_tap for m in self._modules if hasattr(m, "kvlock_tap")]
            kept = {tap: tap.k_source or tap.v_source for tap in taps}
            taps = [tap for tap, source in kept.items() if source and source.rows.data is args[1]]
            self.counts[taps[0].key[:3] if taps else None] += 1
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts the calls of every operator of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "kvlock_kernels":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))

    @property
    def locks(self) -> dict[str, int]:
        """Those that record source rows or mix them in."""
        return {name: count for name, count in self.counts.items() if "kv" in name}


def miniature() -> WanVACEPipeline:
    """The embedded miniature's architecture with random weights, but for its VAE, which is the tiny one."""
    from kvlock.mini import models

    torch.manual_seed(2)
    pipe = WanVACEPipeline(
        tokenizer=models.build_tokenizer(),
        text_encoder=models.build_text_encoder().eval(),
        vae=vae(),
        scheduler=models.build_scheduler(),
        transformer=models.build_transformer().eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
