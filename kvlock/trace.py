"""What one run did, step by step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlock.config import KVLockConfig


class StepRecord(NamedTuple):
    """One denoising step. The tensors are [B] fp32 and stay on the device until somebody reads them."""

    step: int  # 0-based, of the run
    timestep: float
    sigma: float  # noise share
    expert: int  # which transformer ran: 0, or 1 for a pipeline's second one
    in_window: bool  # inside the window in which the lock and a boosted guidance act
    locked: bool  # the source's rows were mixed into the edit's
    forwards: int  # samples the transformer was run on, source included
    source_bytes: int  # keys and values kept for this step
    variance_masked: Tensor  # of the configured clean prediction, inside the mask, after this step
    variance_global: Tensor  # the same over the whole video
    variance_guided: Tensor  # inside the mask, of the guided prediction
    variance_cond: Tensor  # inside the mask, of the conditional prediction
    fusion_ratio: Tensor  # alpha used at this step; 0 where nothing was mixed
    guidance_scale: Tensor  # omega used at this step; 1 without an unconditional branch
    s_star: Tensor  # 1 where it is switched off


TENSORS = StepRecord._fields[StepRecord._fields.index("variance_masked") :]


class Trace:
    """The record of every step of the latest run, read only when asked for.

    Attributes:
        config: the settings.
        composite: the composite that was applied. One in latent space is not, where a run was stopped before its last
            step.
    """

    def __init__(self, config: KVLockConfig) -> None:
        self.config = config
        self.composite = "none"
        self._records: list[StepRecord] = []

    def __len__(self) -> int:
        return len(self._records)

    def append(self, record: StepRecord) -> None:
        self._records.append(record)

    def clear(self) -> None:
        self._records.clear()
        self.composite = "none"

    def rows(self) -> list[dict[str, Any]]:
        """Every step as plain Python values; per-sample quantities are lists of length B. One copy from the device."""
        return _to_rows(self._records)

    def latest(self) -> dict[str, Any]:
        """The last step as plain Python values; waits for the device.

        Raises:
            IndexError: no step has been taken yet.
        """
        return _to_rows(self._records[-1:])[0]

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON types: settings, steps and totals."""
        rows = self.rows()
        summary = {
            "steps": len(rows),
            "locked_steps": sum(row["locked"] for row in rows),
            "forwards": sum(row["forwards"] for row in rows),
            "peak_source_bytes": max((row["source_bytes"] for row in rows), default=0),
            "composite": self.composite,
        }
        return {"version": 1, "config": self.config.to_dict(), "steps": rows, "summary": summary}


def _to_rows(records: list[StepRecord]) -> list[dict[str, Any]]:
    if not records:
        return []
    values = torch.stack([torch.stack([getattr(r, name).float() for name in TENSORS]) for r in records]).tolist()
    rows = []
    for record, columns in zip(records, values, strict=True):
        row = {name: value for name, value in record._asdict().items() if name not in TENSORS}
        rows.append(row | dict(zip(TENSORS, columns, strict=True)))
    return rows
