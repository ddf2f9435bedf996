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
    """Mean and standard deviation of the latents, [1, C, 1, 1, 1] fp32 each.

    Raises:
        ValueError: the VAE's config does not give one finite number a channel, or a deviation that is not above 0.
    """
    mean, std = _per_channel(vae, "latents_mean"), _per_channel(vae, "latents_std", positive=True)
    return mean.to(device), std.to(device)


def _per_channel(vae: Any, name: str, *, positive: bool = False) -> Tensor:
    values, channels = getattr(vae.config, name, None), vae.config.z_dim
    try:
        row = torch.tensor(values, dtype=torch.float32)  # on the CPU, where it can be looked at without waiting
    except (TypeError, ValueError, RuntimeError):  # no numbers, or none that fp32 can hold
        row = torch.empty(0)
    if row.shape != (channels,) or not row.isfinite().all() or (positive and not (row > 0).all()):
        wanted = f"{channels} finite numbers{' > 0' if positive else ''}"
        raise ValueError(f"the VAE's config has {name}={values}; wanted {wanted}")
    return row[None, :, None, None, None]
