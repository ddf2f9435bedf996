"""Training of the miniature's VAE: L1 + 2·MSE + 1e-6·KL on short crops, then long crops, then whole videos."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from tqdm import tqdm

from kvlock.mini import checkpoint, models, scenes
from kvlock.report import psnr

BANK = 2000  # scenes kept in memory; seeds 0 … BANK - 1, disjoint from every held-out seed
CROP, CROPS = 32, 8
SHORT, LONG = 0.6, 0.83  # shares of the run after which crops have all frames, and pictures are whole


def render_bank(count: int, first_seed: int = 0) -> Tensor:
    """Videos of consecutive seeds, [S, 3, F, H, W] uint8."""
    videos = []
    for seed in range(first_seed, first_seed + count):
        videos.append((scenes.render(scenes.sample(seed)) * 255).round().to(torch.uint8).permute(3, 0, 1, 2))
    return torch.stack(videos)


def train(
    out: Path, steps: int, *, device: str = "cpu", learning_rate: float = 2.5e-3, save_every: int = 200
) -> AutoencoderKLWan:
    """Train for `steps` steps, going on from a checkpoint in `out`.

    Five frames teach the first two latent slots at a third of the cost; the later ones need clips of full length.
    """
    torch.manual_seed(0)
    vae = models.build_vae().to(device)
    for p in vae.parameters():
        if p.dim() == 5:
            p.data = p.data.to(memory_format=torch.channels_last_3d)  # twice as fast on a CPU
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ema = checkpoint.Ema(vae, 0.998)
    first = checkpoint.load(out / "vae.ckpt", vae, ema, [optimizer])
    bank = render_bank(BANK) if first < steps else torch.empty(0)
    progress = tqdm(range(first, steps), initial=first, total=steps, desc="vae", mininterval=10)
    for step in progress:
        for group in optimizer.param_groups:
            decay = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = learning_rate * min(1, (step + 1) / 100) * decay
        g = torch.Generator().manual_seed(step)  # of this step alone, so that a run may stop between any two
        frames = 5 if step < SHORT * steps else scenes.FRAMES
        x = _batch(bank[:, :, :frames], g, whole=step >= LONG * steps).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=g).to(device)
            y = vae.decode(posterior.mean + noise * posterior.std).sample
        error = y.float() - x
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).sum(1).mean()
        loss = error.abs().mean() + 2 * (error**2).mean() + 1e-6 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema.update(vae, step)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr((error / 2).square().mean().item()):.1f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            checkpoint.save(out / "vae.ckpt", step + 1, vae, ema, [optimizer])
    ema.copy_to(vae)
    return vae.eval()


def _batch(bank: Tensor, g: torch.Generator, *, whole: bool) -> Tensor:
    """[B, 3, F, h, w] in [-1, 1]: one whole video, or crops of which half are centred near moving pixels."""
    pick = lambda n: int(torch.randint(n, (), generator=g))
    if whole:
        return bank[pick(len(bank))][None].float() / 127.5 - 1
    crops = []
    for i in range(CROPS):
        video = bank[pick(len(bank))]
        size = video.shape[-1]
        top, left = pick(size - CROP + 1), pick(size - CROP + 1)
        if i % 2:  # shapes are rare in a picture: look for them
            moving = (video[:, 0].int() - video[:, -1].int()).abs().sum(0).flatten()
            spot = int(torch.multinomial(moving.float() + 1e-3, 1, generator=g))
            top = min(max(spot // size - CROP // 2, 0), size - CROP)
            left = min(max(spot % size - CROP // 2, 0), size - CROP)
        crops.append(video[:, :, top : top + CROP, left : left + CROP])
    return torch.stack(crops).float() / 127.5 - 1
