"""guided_velocity beside plain PyTorch, eager and compiled."""

from math import prod

import torch

from benchmarks._case import (
    SHAPES,
    WAN_1_3B_480P,
    Case,
    Check,
    Inputs,
    Outputs,
    Shape,
    Traffic,
    close,
    formula,
    normal,
    ours,
    worst,
)
from kvlock_kernels import reference

INSIDE, OUTSIDE, SIGMA = 5.0, 1.5, 0.7
EPS = 1e-8


def make(shape: Shape, device: str, seed: int) -> Inputs:
    """Arguments as a pipeline has them: predictions of bf16 that resemble each other, latents of fp32, a mask."""
    cond = normal(*shape.latents, device=device, seed=4 * seed)
    uncond = cond + 0.5 * normal(*shape.latents, device=device, seed=4 * seed + 1)
    x = normal(*shape.latents, device=device, seed=4 * seed + 2, dtype=torch.float32)
    mask = normal(1, 1, *shape.latents[2:], device=device, seed=4 * seed + 3) > 0.5
    number = lambda value: torch.full((), value, device=device)
    tensors = {"cond": cond, "uncond": uncond, "guidance_scale": number(INSIDE), "x": x, "sigma": number(SIGMA)}
    return tensors | {"mask": mask, "background_guidance": OUTSIDE}


def check(before: Inputs, after: Outputs) -> Check:
    """The velocity is rounded once to bf16; s* and with it x0 come from sums of millions in fp32."""
    c, u = before["cond"].double(), before["uncond"].double()
    s_star = (c * u).flatten(1).sum(1) / ((u * u).flatten(1).sum(1) + EPS)
    w = torch.where(before["mask"], before["guidance_scale"].double(), OUTSIDE)
    velocity = (1 - w) * s_star.reshape(-1, 1, 1, 1, 1) * u + w * c
    x0 = before["x"].double() - before["sigma"].double() * velocity
    return worst([close(after[:1], (velocity,), 1), close(after[1:], (s_star, x0), 64)])


def traffic(shape: Shape) -> Traffic:
    """Each tensor once: the second pass over the two predictions is to come from the cache."""
    terms = ((2, "cond"), (2, "uncond"), (4, "x"), (1 / shape.latents[1], "mask"), (2, "velocity"), (4, "x0"))
    return Traffic(prod(shape.latents), terms)


def case(shape: Shape) -> Case:
    return Case(
        "guided_velocity", shape, "bf16", "", f"guidance {INSIDE:g} and {OUTSIDE:g}", make, traffic, check,
        (ours("guided_velocity"), *formula(reference.guided_velocity)),
        core=("kvlock", "torch.compile") if shape == WAN_1_3B_480P else (), offline=shape == WAN_1_3B_480P,
    )


# The width of the attention does not matter here: one shape per grid.
CASES = tuple(case(shape) for shape in {shape.grid: shape for shape in reversed(SHAPES)}.values())
