"""What is queued between a kernel and the one that starts under its end: nothing, for that one waits for the last."""

from typing import Any

import pytest
import torch
from samples import normal
from torch.utils._python_dispatch import TorchDispatchMode

from kvlock_kernels._triton import guidance, variance

SHAPE = 1, 4, 3, 4, 6


class Queue(TorchDispatchMode):
    """Kernels and whatever of torch writes, in the order of their launches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, kernels: tuple[str, str]) -> None:
        super().__init__()
        self.found: list[str] = []
        for name in kernels:
            monkeypatch.setattr(module, name, Recorded(self.found, name))
        monkeypatch.setattr(module, "starts_early", lambda x: True)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(function) for word in ("clone", "copy")):
            self.found.append("copy")
        return function(*args, **(kwargs or {}))


class Recorded:
    """A kernel that is not launched."""

    def __init__(self, found: list[str], name: str) -> None:
        self.found, self.name = found, name

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, launch_pdl=False, **options: self.found.append(self.name + " early" * launch_pdl)


def strided(*shape: int) -> torch.Tensor:
    return normal(*shape[:1], *shape[:0:-1]).permute(0, *range(len(shape) - 1, 0, -1))


@pytest.mark.parametrize("odd", ["nothing", "x", "mask", "a frame's mask", "cond", "uncond"])
def test_the_velocity_follows_the_projection(monkeypatch: pytest.MonkeyPatch, odd: str) -> None:
    inputs: dict[str, Any] = {name: normal(*SHAPE) for name in ("cond", "uncond", "x")}
    inputs |= {"guidance_scale": torch.tensor(5.0), "sigma": torch.tensor(0.5), "background_guidance": 1.5}
    inputs["mask"] = torch.ones(1, 1, 3, 1, 1) if odd == "a frame's mask" else torch.ones(1, 1, *SHAPE[2:])
    if odd in inputs:
        inputs[odd] = strided(*inputs[odd].shape)
    with Queue(monkeypatch, guidance, ("projection_kernel", "velocity_kernel")) as queue:
        guidance.guided_velocity(**inputs)
    assert queue.found[-2:] == ["projection_kernel", "velocity_kernel early"]
    assert ("copy" in queue.found) == (odd != "nothing")


@pytest.mark.parametrize("odd", ["nothing", "x0", "history", "weight"])
def test_the_mean_follows_the_pass_over_the_ring(monkeypatch: pytest.MonkeyPatch, odd: str) -> None:
    inputs = {"x0": normal(*SHAPE), "history": normal(5, *SHAPE), "weight": normal(1, 1, *SHAPE[2:]).abs()}
    if odd in inputs:
        inputs[odd] = strided(*inputs[odd].shape)
    with Queue(monkeypatch, variance, ("ring_kernel", "mean_kernel")) as queue:
        variance.windowed_variance_(**inputs, step=torch.tensor(7))
    first = queue.found.index("ring_kernel")
    assert queue.found[first : first + 2] == ["ring_kernel", "mean_kernel early"]
    assert ("copy" in queue.found) == (odd != "nothing")
