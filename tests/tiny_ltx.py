"""A tiny random LTX pipeline, 192x192 px and 17 frames, built from config."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from kvlock import Masks

SIZE, FRAMES, TEXT = 192, 17, 8
GRID = (3, 6, 6)
TOKENS, CHANNELS = 108, 8


def transformer(caption_channels: int = 16, layers: int = 2) -> LTXVideoTransformer3DModel:
    """A random transformer whose weights are large enough for every part of it to matter."""
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=layers,
        caption_channels=caption_channels,
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.mul_(1.5)
    return model.eval()


def vae(**extra: Any) -> AutoencoderKLLTXVideo:
    torch.manual_seed(1)
    four, five = (8, 8, 8, 8), (1, 1, 1, 1, 1)
    model = AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=four,
        decoder_block_out_channels=four,
        layers_per_block=five,
        decoder_layers_per_block=five,
        scaling_factor=0.5,
        **extra,
    )
    model.latents_mean += torch.linspace(-0.2, 0.2, CHANNELS)
    model.latents_std *= 1.5
    return model.eval()


def pipeline(
    *, tokenizer: Any = None, text_encoder: Any = None, caption_channels: int = 16, layers: int = 2
) -> LTXPipeline:
    """With the released model's scheduler, which shifts its sigmas by the number of tokens."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=64,
        max_image_seq_len=256,
        shift_terminal=0.1,
    )
    model = transformer(caption_channels, layers)
    pipe = LTXPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae(), scheduler=scheduler, transformer=model
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixel_mask() -> torch.Tensor:
    """A corner, [F, H, W] bool; dilated it leaves the other sides to lock."""
    mask = torch.zeros(FRAMES, SIZE, SIZE, dtype=torch.bool)
    mask[:, 40:90, 40:90] = True
    return mask


def masks(pipe: Any) -> Masks:
    found = Masks.from_pixels(pixel_mask(), pipe)
    assert 0 < found.background_rows < found.num_tokens == TOKENS
    return found


def source_latents() -> torch.Tensor:
    return tiny.rand(1, CHANNELS, *GRID, seed=5)


SOURCE_PROMPT = tiny.rand(1, 5, 16, seed=4)  # shorter than the prompts
PROMPT = {
    "prompt_embeds": tiny.rand(1, TEXT, 16, seed=2),
    "prompt_attention_mask": torch.arange(TEXT)[None] < 6,
    "negative_prompt_embeds": tiny.rand(1, TEXT, 16, seed=3),
    "negative_prompt_attention_mask": torch.arange(TEXT)[None] < 3,
}


def call(pipe: Any, *, steps: int = 6, guidance_scale: float = 5.0, **extra: Any) -> torch.Tensor:
    """One pipeline call; returns the final latents, as tokens [B, T * h * w, C]."""
    kwargs: dict[str, Any] = {name: value.to(pipe.device) for name, value in PROMPT.items()} | {
        "height": SIZE,
        "width": SIZE,
        "num_frames": FRAMES,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    return pipe(**(kwargs | extra)).frames


def as_video(tokens: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, T, h, w] of tokens [B, T * h * w, C]."""
    return tokens.unflatten(1, GRID).permute(0, 4, 1, 2, 3)


def as_tokens(latents: torch.Tensor) -> torch.Tensor:
    return latents.permute(0, 2, 3, 4, 1).flatten(1, 3)
