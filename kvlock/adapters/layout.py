"""Latents as a session has them, and as the transformer and the scheduler of a pipeline have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A session has videos, [B, C, T, h, w]; so have most models, and some have one token a latent, [B, T * h * w, C].

    Attributes:
        grid: T, h and w of a model that has tokens, None for the others.
    """

    grid: tuple[int, int, int] | None

    def require(self, grid: tuple[Any, ...]) -> None:
        """Wants the grid of a call to be this one: other grids may have as many tokens.

        Raises:
            ValueError: it is another.
        """
        if grid != self.grid:
            raise ValueError(
                f"masks were made for latents of [T, h, w] = {list(self.grid or ())}; the edit's have {list(grid)}"
            )

    def video(self, x: Tensor) -> Tensor:
        """The model's latents as a session has them; a view.

        Raises:
            ValueError: there are more or fewer tokens than in the grid.
        """
        if self.grid is None:
            return x
        t, h, w = self.grid
        if x.ndim != 3 or x.shape[1] != t * h * w:
            raise ValueError(
                f"latents have shape {list(x.shape)}; wanted [B, {t * h * w}, C], because the masks were made for "
                f"[T, h, w] = {[t, h, w]}"
            )
        return x.unflatten(1, self.grid).movedim(-1, 1)

    def of_model(self, x: Tensor) -> Tensor:
        """A session's latents as the model has them; undoes `video`."""
        return x if self.grid is None else x.movedim(1, -1).flatten(1, 3)
