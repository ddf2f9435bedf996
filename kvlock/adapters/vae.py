"""The VAE's side of a pipeline: its true stride, and latents as the pipeline normalises them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from kvlock.geometry import Geometry


def repair_stride(pipe: Any) -> None:
    """Let the pipeline use the VAE's real strides, wherever they differ from what it derived.

    Wan's VACE and V2V pipelines count the VAE's downsampling levels, which misses the pixels that a patchified VAE
    (Wan2.2-TI2V-5B's, the miniature's) folds into channels.
    """
    geometry = Geometry.of(pipe)
    pipe.vae_scale_factor_temporal = geometry.temporal_stride
    if pipe.vae_scale_factor_spatial != geometry.spatial_stride:
        pipe.vae_scale_factor_spatial = geometry.spatial_stride
        pipe.video_processor = VideoProcessor(vae_scale_factor=geometry.spatial_stride)


@torch.no_grad()
def encode(pipe: Any, pixels: Tensor) -> Tensor:
    """Normalised latents [1, C, T, h, w] fp32 of a video [F, 3, H, W] in [-1, 1]: the posterior's mode, no sampling."""
    vae = pipe.vae
    moments = vae.encode(pixels.transpose(0, 1)[None].to(pipe._execution_device, vae.dtype)).latent_dist.mode()
    mean, std = _statistics(vae, moments.device)
    return (moments.float() - mean) / std


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Video [F, 3, H, W] fp32 in [-1, 1] of normalised latents [1, C, T, h, w]."""
    vae = pipe.vae
    mean, std = _statistics(vae, latents.device)
    video = vae.decode((latents.float() * std + mean).to(vae.dtype)).sample
    return video[0].transpose(0, 1).float().clamp(-1, 1)


def _statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float32, device=device)
    mean, std = values[:, None, :, None, None, None]
    return mean, std
