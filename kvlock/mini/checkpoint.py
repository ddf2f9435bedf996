"""Training state on disk as plain tensors, so that a run can stop anywhere and go on."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Ema:
    """Exponential moving average of a model's parameters."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            self.shadow[name].lerp_(p.detach(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.shadow[name])


def save(path: Path, step: int, model: nn.Module, ema: Ema, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write everything a run needs to go on, atomically."""
    tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
    tensors.update({f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()})
    tensors.update({f"ema.{name}": p.contiguous() for name, p in ema.shadow.items()})
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{j}.{key}": torch.as_tensor(value) for key, value in state.items()})
    partial = path.with_suffix(".partial")
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, partial)
    os.replace(partial, path)


def load(path: Path, model: nn.Module, ema: Ema, optimizers: list[torch.optim.Optimizer]) -> int:
    """Restore what `save` wrote; returns the number of steps already done (0 where there is no checkpoint)."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    model.load_state_dict({name[6:]: t for name, t in tensors.items() if name.startswith("model.")}, strict=False)
    for name in ema.shadow:
        ema.shadow[name].copy_(tensors[f"ema.{name}"])
    for i, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, t in tensors.items():
            if name.startswith(f"optimizer.{i}."):
                _, _, j, key = name.split(".")
                # Fused optimizers walk the memory of parameter and state side by side: the layouts must agree.
                like = parameters[int(j)].detach()
                state.setdefault(int(j), {})[key] = torch.empty_like(like).copy_(t) if t.shape == like.shape else t
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(tensors["step"])
