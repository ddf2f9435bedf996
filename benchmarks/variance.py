"""windowed_variance_ and lock_schedule beside plain PyTorch, eager and compiled."""

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
)
from kvlock_kernels import reference

SLOTS = 10
STEP = 57  # any step after the ring has filled
TAU, BOOST, ALPHA_MIN = 0.01, 2.0, 0.1


def make(shape: Shape, device: str, seed: int) -> Inputs:
    """Arguments of windowed_variance_: a full ring, and a weight for each place of the latents."""
    x0 = normal(*shape.latents, device=device, seed=3 * seed, dtype=torch.float32)
    history = normal(SLOTS, *shape.latents, device=device, seed=3 * seed + 1, dtype=torch.float32)
    places = (1, 1, *shape.latents[2:])
    weight = normal(*places, device=device, seed=3 * seed + 2, dtype=torch.float32).abs()
    return {"x0": x0, "history": history, "step": torch.full((), STEP, device=device), "weight": weight}


def check(before: Inputs, after: Outputs) -> Check:
    """The mean is a sum of millions in fp32; the ring must hold x0 exactly."""
    ring = before["history"].double()
    ring[STEP % SLOTS] = before["x0"].double()
    variance, weight = ring.var(0), before["weight"].double().expand(before["x0"].shape)
    mean = (weight * variance).flatten(1).sum(1) / weight.flatten(1).sum(1)
    result, history = after
    slot = Check((history.double() - ring).abs().max().item(), 0.0)
    return close((result,), (mean,), 64) if slot.passed else slot


def traffic(shape: Shape) -> Traffic:
    """Each value of the ring once; the slot that is written is not read."""
    terms = ((4, "x0"), (4 * (SLOTS - 1), "other slots"), (4 / shape.latents[1], "weight"), (4, "slot written"))
    return Traffic(prod(shape.latents), terms)


def case(shape: Shape) -> Case:
    provider = ours("windowed_variance_")
    return Case(
        "windowed_variance_", shape, "fp32", "", f"{SLOTS} slots", make, traffic, check,
        (
            provider._replace(run=lambda inputs: (*provider.run(inputs), inputs["history"])),
            *formula(reference.windowed_variance_, "history"),
        ),
        core=("kvlock", "torch.compile") if shape == WAN_1_3B_480P else (), offline=shape == WAN_1_3B_480P,
    )


def make_schedule(shape: Shape, device: str, seed: int) -> Inputs:
    """Arguments of lock_schedule: one sample below tau."""
    variance, guidance = torch.full((1,), TAU / (2 + seed), device=device), torch.full((), 5.0, device=device)
    options = {"tau": TAU, "boost": BOOST, "alpha_min": ALPHA_MIN}
    return {"variance": variance, "guidance_scale": guidance} | options


def check_schedule(before: Inputs, after: Outputs) -> Check:
    """Three roundings: the division, the clamp's bounds, the product."""
    pressure = before["variance"].double() / TAU
    guidance = before["guidance_scale"].double() * pressure.clamp(1, BOOST)
    return close(after, (pressure.clamp(ALPHA_MIN, 1), guidance), 3)


SCHEDULE = Case(
    "lock_schedule", WAN_1_3B_480P, "fp32", "", "one sample", make_schedule,
    lambda shape: Traffic(1, ((8, "variance, scale"), (8, "written"))), check_schedule,
    (ours("lock_schedule"), *formula(reference.lock_schedule)), offline=True, wide=False,
)

# The width of the attention does not matter here: one shape per grid.
CASES = (*(case(shape) for shape in {shape.grid: shape for shape in reversed(SHAPES)}.values()), SCHEDULE)
