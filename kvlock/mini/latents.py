"""The miniature's training set: scenes as latents, encoded once."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from kvlock.mini import scenes

STILL_SHARE = 0.25  # of the scenes have one box around the shape's whole way instead of a box that follows it


def mask_of(scene: scenes.Scene, seed: int) -> Tensor:
    """The box mask a training scene is edited with, [F, H, W] bool."""
    g = torch.Generator().manual_seed(seed + 1)
    return scenes.box_mask(scene, still=torch.rand((), generator=g).item() < STILL_SHARE)


def control_mask(mask: Tensor) -> Tensor:
    """[F, H, W] bool → [64, T, h, w] bool: a latent pixel's 8x8 pixels as channels, frames as VACE samples them."""
    frames, height, width = mask.shape
    folded = mask.view(frames, height // 8, 8, width // 8, 8).permute(2, 4, 0, 1, 3).flatten(0, 1)
    size = ((frames + 3) // 4, height // 8, width // 8)
    return torch.nn.functional.interpolate(folded[None].float(), size=size, mode="nearest-exact")[0].bool()


@torch.no_grad()
def encode(vae: AutoencoderKLWan, videos: Tensor) -> Tensor:
    """[B, 3, F, H, W] in [-1, 1] → raw (not normalised) latents [B, 16, T, h, w] fp32."""
    parameter = next(vae.parameters())
    with torch.autocast(parameter.device.type, torch.bfloat16):
        return vae.encode(videos.to(parameter.device)).latent_dist.mode().float().cpu()


def build(vae: AutoencoderKLWan, out: Path, count: int, *, shard: int = 250) -> dict[str, Tensor]:
    """Encode scenes 0 … count - 1 into `out`, a shard at a time, going on where an earlier run stopped.

    Returns latents and masked_latents [S, 16, T, h, w] fp16, control [S, 64, T, h, w] bool, grey [16, T, h, w].
    """
    out.mkdir(parents=True, exist_ok=True)
    for first in tqdm(range(0, count, shard), desc="latents"):
        path = out / f"{first:06d}.safetensors"
        if path.exists():
            continue
        rows: dict[str, list[Tensor]] = {"latents": [], "masked_latents": [], "control": []}
        for seed in range(first, min(first + shard, count)):
            scene = scenes.sample(seed)
            mask = mask_of(scene, seed)
            video = scenes.render(scene).permute(3, 0, 1, 2) * 2 - 1
            pair = encode(vae, torch.stack([video, video * ~mask]))
            rows["latents"].append(pair[0].half())
            rows["masked_latents"].append(pair[1].half())
            rows["control"].append(control_mask(mask))
        partial = path.with_suffix(".partial")
        save_file({name: torch.stack(items) for name, items in rows.items()}, partial)
        partial.rename(path)
    shards = [load_file(path) for path in sorted(out.glob("*.safetensors"))]
    names = ("latents", "masked_latents", "control")
    data = {name: torch.cat([part[name] for part in shards])[:count] for name in names}
    data["grey"] = encode(vae, torch.zeros(1, 3, scenes.FRAMES, scenes.SIZE, scenes.SIZE))[0]
    return data


def statistics(latents: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of [S, C, T, h, w]: the VAE's `latents_mean` and `latents_std`."""
    flat = latents.float().transpose(0, 1).flatten(1)
    return flat.mean(1).tolist(), flat.std(1).tolist()
