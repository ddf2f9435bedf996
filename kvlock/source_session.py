"""A session that makes a recording: the transformer runs on the source alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvlock.recorder import Recorder
from kvlock.session import Session


class SourceSession(Session):
    """A session that records the source and lets the transformer run on nothing else."""

    def begin_call(
        self,
        expert: int,
        x: Tensor,
        timestep: Tensor,
        conditions: Mapping[str, Any] | None = None,
        *,
        branches: int = 1,
    ) -> Tensor | None:
        source = super().begin_call(expert, x, timestep, conditions, branches=branches)
        run = self._require_run()
        run.forwards -= branches * len(x)
        run.mixes = run.mixed = False
        return source

    def finish_step(self, latents: Tensor) -> Tensor:
        ended = self._require_run()
        latents = super().finish_step(latents)
        if ended.finished:
            assert isinstance(self._ledger, Recorder)
            self._ledger.end_run()
        return latents

    def keep_inputs(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """What the readers of the recording find again: tensors by name, and JSON types."""
        assert isinstance(self._ledger, Recorder)
        self._ledger.keep_inputs(tensors, about)
