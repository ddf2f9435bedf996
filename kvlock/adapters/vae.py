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
    if not hasattr(pipe, "vae_scale_factor_spatial"):
        return  # it asks the VAE
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
    latents = (latents.float() * std + mean).to(vae.dtype)
    conditioned = getattr(vae.config, "timestep_conditioning", False)  # on the noise that is left: none
    video = (vae.decode(latents, latents.new_zeros(len(latents))) if conditioned else vae.decode(latents)).sample
    return video[0].transpose(0, 1).float().clamp(-1, 1)


def _statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and scale of the latents, [1, C, 1, 1, 1] fp32 each: normalised ones are (z - mean) / scale.

    Raises:
        ValueError: the VAE has not one finite number a channel, or it has a deviation that is not above 0.
    """
    mean, std = _per_channel(vae, "latents_mean"), _per_channel(vae, "latents_std", positive=True)
    if hasattr(vae.config, "latents_std"):
        return mean.to(device), std.to(device)
    return mean.to(device), (std / vae.config.scaling_factor).to(device)  # LTX: beside the statistics among the weights


def _per_channel(vae: Any, name: str, *, positive: bool = False) -> Tensor:
    channels = getattr(vae.config, "z_dim", None) or vae.config.latent_channels
    values = getattr(vae.config, name, None) if hasattr(vae.config, name) else getattr(vae, name, None)
    try:
        # On the CPU, where Wan's lists are looked at without waiting; LTX has a buffer, whose copy waits.
        row = torch.as_tensor(values, dtype=torch.float32, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):  # no numbers, or none that fp32 can hold
        row = torch.empty(0)
    if row.shape != (channels,) or not row.isfinite().all() or (positive and not (row > 0).all()):
        wanted = f"{channels} finite numbers{' > 0' if positive else ''}"
        raise ValueError(f"the VAE has {name}={values}; wanted {wanted}")
    return row[None, :, None, None, None]
