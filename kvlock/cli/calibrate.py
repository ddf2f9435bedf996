"""kvlock calibrate: print values for tau, from the variance of an edit without the lock, and write nothing."""

from __future__ import annotations

import argparse
from typing import Any

from kvlock.cli import inputs, runs

PERCENTILES = (10, 25, 50, 75, 90)


def add_options(parser: argparse.ArgumentParser) -> None:
    runs.add_options(parser)


def run(args: argparse.Namespace) -> None:
    """Denoise with preset plain and print percentiles of the variance as values for tau.

    Raises:
        ValueError: bad input, or no step of the run could be locked.
    """
    from kvlock.config import preset

    config = preset("plain")
    inputs.check_run_options(args)
    task = runs.read(args, config)
    pipe = runs.load(args, task)
    rows = runs.denoise(pipe, config, task, args).trace.rows()
    variances = steering_variances(rows)
    if not variances:
        raise ValueError(f"the lock would act in none of the {len(rows)} steps; wanted more --steps")
    window, count = sum(row["in_window"] for row in rows), len(variances)
    acts = f"the last {window}" if count == window else f"{count} of the last {window}"
    print(f"steps       {len(rows)} without a lock; it would act in {acts}")
    print(f"variance    {min(variances):.3g} to {max(variances):.3g} inside the mask, before these steps")
    for percentile, tau, share in proposals(variances):
        print(f"tau         {tau:.3g} (percentile {percentile}): full lock in {share:.0%} of them")


def steering_variances(rows: list[dict[str, Any]]) -> list[float]:
    """The variance that each step of the window would be steered by: the masked one after the step before it.

    Steps before which their transformer made fewer than two predictions have none, and would not be locked.
    """
    return [
        last["variance_masked"][0]
        for before, last, row in zip(rows, rows[1:], rows[2:], strict=False)
        if row["in_window"] and before["expert"] == last["expert"] == row["expert"]
    ]


def proposals(variances: list[float]) -> list[tuple[int, float, float]]:
    """For each percentile: it, the variance there, and the share of the steps whose lock is full with that as tau."""
    import torch

    values = torch.tensor(variances, dtype=torch.float64)
    taus = values.quantile(torch.tensor(PERCENTILES, dtype=torch.float64) / 100)
    shares = (values >= taus[:, None]).double().mean(dim=1)  # alpha = var / tau, at most 1
    return list(zip(PERCENTILES, taus.tolist(), shares.tolist(), strict=True))
