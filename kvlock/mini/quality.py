"""What the miniature can do, measured on held-out scenes: VAE round trip, and whether an edit shows what was asked."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

import kvlock
from kvlock import mini
from kvlock.mini import scenes
from kvlock.report import psnr


class Request(NamedTuple):
    """An edit of a held-out scene: the same way, size and background, another shape in another colour."""

    source: scenes.Scene
    target: scenes.Scene


def request(seed: int) -> Request:
    """The edit that belongs to this held-out seed."""
    source = scenes.sample(seed)
    g = torch.Generator().manual_seed(seed)
    other = lambda names, name: [n for n in names if n != name]
    shapes, colours = other(scenes.SHAPES, source.shape), other(scenes.COLOURS, source.colour)
    pick = lambda names: names[int(torch.randint(len(names), (), generator=g))]
    return Request(source, dataclasses.replace(source, shape=pick(shapes), colour=pick(colours)))


def judge(video: Tensor, mask: Tensor, scene: scenes.Scene) -> tuple[str, str]:
    """(shape, colour) whose rendering on this scene's way is nearest to `video` inside the mask, in mean square.

    Args:
        video: [F, H, W, 3] fp32 in [0, 1].
        mask: [F, H, W] bool.
        scene: where the shape moves; its own shape and colour do not matter.
    """
    errors = {}
    for shape in scenes.SHAPES:
        for colour in scenes.COLOURS:
            candidate = scenes.render(dataclasses.replace(scene, shape=shape, colour=colour))
            errors[shape, colour] = (video - candidate)[mask].square().mean().item()
    return min(errors, key=errors.__getitem__)


class RoundTrip(NamedTuple):
    """What the VAE gives back: mean PSNR in dB over videos."""

    whole: float
    background: float  # outside the mask: the most an edit can reach there


@torch.no_grad()
def round_trip(vae: Any, count: int) -> RoundTrip:
    """Send `count` whole held-out videos through the VAE."""
    whole = background = 0.0
    for seed in range(scenes.HELD_OUT, scenes.HELD_OUT + count):
        scene = scenes.sample(seed)
        x = scenes.render(scene).permute(3, 0, 1, 2)[None]
        y = vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample.clamp(-1, 1) / 2 + 0.5
        squared = (y - x)[0].square()
        whole += psnr(squared.mean().item())
        background += psnr(squared[:, ~scenes.box_mask(scene)].mean().item())
    return RoundTrip(whole / count, background / count)


def measure(pipe: Any, config: kvlock.KVLockConfig, count: int, steps: int, guidance_scale: float) -> dict[str, Any]:
    """Edit `count` held-out scenes; shares of requested colours and shapes, of runs with alpha = 1 on every locked
    step, and PSNR in dB of what is not masked.
    """
    edit = kvlock.KVLockPipeline(pipe, config)
    colours = shapes = saturated = 0
    background = 0.0
    for seed in tqdm(range(scenes.HELD_OUT, scenes.HELD_OUT + count), desc="edits", mininterval=10):
        source, target = request(seed)
        video, mask = scenes.render(source), scenes.box_mask(source)
        out, trace, _ = edit(
            video,
            mask,
            target.caption,
            source_prompt=source.caption,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        )
        ratios = [row["fusion_ratio"][0] for row in trace.rows() if row["locked"]]
        saturated += min(ratios, default=0) == 1
        shape, colour = judge(out, mask, source)
        colours += colour == target.colour
        shapes += shape == target.shape
        background += psnr((out - video)[~mask].square().mean().item())
    return {
        "edits": count,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "colour": colours / count,
        "shape": shapes / count,
        "alpha_always_1": saturated / count,
        "composite": config.composite,
        "background_psnr": round(background / count, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvlock.mini.quality", description=__doc__)
    parser.add_argument("--path", type=Path, default=mini.PATH)
    parser.add_argument("--presets", nargs="*", default=["plain"])
    parser.add_argument("--edits", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--background-guidance", type=float, help="guidance outside the mask")
    args = parser.parse_args()
    pipe = mini.load(args.path)
    vae = round_trip(pipe.vae, args.edits)
    row = {"vae_psnr": round(vae.whole, 2), "vae_background_psnr": round(vae.background, 2), "videos": args.edits}
    print(json.dumps(row | {"torch": torch.__version__, "diffusers": diffusers.__version__}), flush=True)
    for name in args.presets:
        config = kvlock.preset(name, background_guidance=args.background_guidance)
        row = {"preset": name, "background_guidance": args.background_guidance}
        row |= measure(pipe, config, args.edits, args.steps, args.guidance_scale)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
