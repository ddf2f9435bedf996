"""The method written out a second time, by hand: two passes a step, K, V mixed at scaled_dot_product_attention.

Nothing here comes from the packages under test; masks arrive as plain tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Recipe:
    """What to do, in the oracle's own words."""

    first_locked: int  # step from which the lock and the guidance schedule act
    window: int
    tau: float
    boost: float = 2.0
    ratio: float | None = None  # None: from the variance
    measure: str = "inside"  # or "everywhere"
    from_branch: str = "guided"  # or "cond"
    s_star: bool = True
    follow: bool = True  # omega follows the variance
    outside: float | None = None  # guidance of the background
    blocks: tuple[int, ...] = (0, 1)
    control: bool = False
    branches: tuple[str, ...] = ("cond", "uncond")
    silent_steps: int = 0  # first steps with velocity zero


@dataclass
class Edit:
    """The data of one edit, [B, ...] tensors; `known` are further arguments of the transformer."""

    start: Tensor
    source: Tensor
    cond: Tensor
    uncond: Tensor | None
    source_prompt: Tensor
    rows: Tensor  # background rows of the token axis
    inside: Tensor  # [1, 1, T, h, w] bool, guided as the edit
    measured: Tensor  # [1, 1, T, h, w] bool
    everywhere: Tensor  # [1, 1, T, h, w] bool, the video without reference frames
    omega: tuple[float, ...] = (5.0,)  # of each expert
    known: dict[str, Any] = field(default_factory=dict)
    starts_from_video: bool = False
    first_step: int = 0
    switch: int | None = None  # step at which the second expert takes over


@dataclass
class Result:
    latents: Tensor
    alpha: list[Tensor]
    omega: list[Tensor]
    s_star: list[Tensor]
    locked: list[bool]


class Desk:
    """What the attention processors share."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.long()
        self.mode = "plain"
        self.alpha = torch.zeros(1)
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}


class MixingProcessor:
    """Wan's self-attention, with keys and values [B, N, H, D] mixed after RoPE."""

    def __init__(self, desk: Desk, name: str) -> None:
        self.desk = desk
        self.name = name

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        heads = lambda t: t.unflatten(2, (attn.heads, -1))
        q = _rotate(heads(attn.norm_q(attn.to_q(x))), *rotary_emb)
        k = _rotate(heads(attn.norm_k(attn.to_k(x))), *rotary_emb)
        return self.attend(attn, q, k, heads(attn.to_v(x)))

    def attend(self, attn, q, k, v):
        desk = self.desk
        if desk.mode == "record":
            desk.kept[self.name] = (k, v)
        elif desk.mode == "mix":
            a = desk.alpha[:, None, None, None]
            mixed = []
            for new, source in zip((k, v), desk.kept[self.name], strict=True):
                new = new.clone()
                new[:, desk.rows] = (1 - a) * new[:, desk.rows] + a * source[:, desk.rows]
                mixed.append(new)
            k, v = mixed
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos[..., 0::2].float(), sin[..., 1::2].float())
    return torch.view_as_real(pairs * turn).flatten(-2)


def edit(
    transformers: list[Any], scheduler: Any, steps: int, job: Edit, recipe: Recipe, processor: type = MixingProcessor
) -> Result:
    """Denoise `job.start` in `steps` steps; the processors of the transformers are put back at the end."""
    desk = Desk(job.rows)
    before = [(block.attn1, block.attn1.processor) for t in transformers for block in _stacks(t, range(99), True)]
    for t in transformers:
        for i, block in enumerate(_stacks(t, recipe.blocks, recipe.control)):
            block.attn1.processor = processor(desk, f"{i}")
    try:
        with torch.no_grad():
            return _loop(transformers, scheduler, steps, job, recipe, desk)
    finally:
        for attention, processor in before:
            attention.processor = processor


def _stacks(transformer: Any, blocks, control: bool) -> list[Any]:
    main = [block for i, block in enumerate(transformer.blocks) if i in blocks]
    return main + (list(getattr(transformer, "vace_blocks", [])) if control else [])


def _loop(transformers, scheduler, steps: int, job: Edit, recipe: Recipe, desk: Desk) -> Result:
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(job.first_step)
    x, batch = job.start.clone(), len(job.start)
    source = job.source.expand(batch, -1, -1, -1, -1)
    result = Result(x, [], [], [], [])
    history: list[Tensor] = []
    eps = expert = None

    for k in range(job.first_step, steps):
        t, sigma = scheduler.timesteps[k], float(scheduler.sigmas[k])
        now = 1 if job.switch is not None and k >= job.switch else 0
        if now != expert:
            history.clear()
        expert = now
        locked = k >= recipe.first_locked
        if eps is None:
            eps = (x - (1 - sigma) * source) / sigma if job.starts_from_video else x

        var = torch.stack([_variance(history[-recipe.window :], b, job, recipe) for b in range(batch)])
        alpha = (var / recipe.tau).clamp(0, 1) if recipe.ratio is None else torch.full((batch,), recipe.ratio)
        omega = torch.full((batch,), job.omega[expert])
        if recipe.follow and locked:
            omega = omega * (var / recipe.tau).clamp(1, recipe.boost)

        def run(latents, prompt, expert=expert, t=t):
            prompt = prompt.expand(batch, -1, -1)
            return transformers[expert](latents, t.expand(batch), prompt, return_dict=False, **job.known)[0]

        if locked:
            desk.mode = "record"
            run((1 - sigma) * source + sigma * eps, job.source_prompt)
        desk.alpha = alpha
        outputs = []
        for name, prompt in (("cond", job.cond), ("uncond", job.uncond)):
            desk.mode = "mix" if locked and name in recipe.branches else "plain"
            outputs.append(None if prompt is None else run(x, prompt))
        desk.mode = "plain"

        c, u = outputs
        s = torch.ones(batch)
        if u is None:
            v = c
        else:
            if recipe.s_star:
                s = torch.stack([(c[b] * u[b]).sum() / ((u[b] ** 2).sum() + 1e-8) for b in range(batch)])
            w = omega[:, None, None, None, None].expand_as(c)
            if recipe.outside is not None:
                w = torch.where(job.inside, w, torch.tensor(recipe.outside))
            su = s[:, None, None, None, None] * u
            v = su + w * (c - su)
        history.append(x - sigma * (c if recipe.from_branch == "cond" else v))
        if k - job.first_step < recipe.silent_steps:
            v = torch.zeros_like(v)
        result.alpha.append(alpha)
        result.omega.append(omega)
        result.s_star.append(s)
        result.locked.append(locked)
        x = scheduler.step(v, t, x, return_dict=False)[0]
    result.latents = x
    return result


def _variance(history: list[Tensor], sample: int, job: Edit, recipe: Recipe) -> Tensor:
    if len(history) < 2:
        return torch.tensor(0.0)
    spread = torch.var(torch.stack([x0[sample].double() for x0 in history]), dim=0)
    where = job.measured if recipe.measure == "inside" else job.everywhere
    return spread[where[0].expand_as(spread)].mean().float()
