"""How well predictions meet what ran."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well predictions meet what ran: errors relative to the measured time, and the order of the schedules of each
    layer (Kendall's tau-b, mean and least over layers)."""

    num_cells: int
    mean_error: float
    p95_error: float
    largest_error: float
    bias: float  # mean of predicted / measured - 1
    mean_tau: float
    least_tau: float


def agreement(cells: pd.DataFrame) -> Agreement:
    """``cells``: columns race, measured_s, predicted_s; one row a cell. A race of one cell has no order."""
    from scipy.stats import kendalltau  # slow to import

    error = cells["predicted_s"] / cells["measured_s"] - 1
    races = [race for _, race in cells.groupby("race") if len(race) > 1]
    taus = [float(kendalltau(race["measured_s"], race["predicted_s"]).statistic) for race in races] or [np.nan]
    return Agreement(
        len(cells),
        float(error.abs().mean()),
        float(np.quantile(error.abs(), 0.95)),
        float(error.abs().max()),
        float(error.mean()),
        float(np.mean(taus)),
        float(np.min(taus)),
    )
