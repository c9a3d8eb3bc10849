"""Calibration of stated probabilities: are 80 % of the comparisons that a reward model calls with 80 % right? And how well scores order.

Pure numpy. Means over nothing, or over weights that are all 0, are NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class ReliabilityBin(NamedTuple):
    """The cases whose stated probability lies in one interval.

    Attributes:
        low: the interval's lower end.
        high: its upper end; the last interval holds it too.
        weight: how much its cases weigh together: how many they are, without weights.
        stated: their mean stated probability; NaN without any.
        observed: how often it happened, their mean outcome; NaN without any.
    """

    low: float
    high: float
    weight: float
    stated: float
    observed: float


def sigmoid(x: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Returns 1/(1 + exp(−x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, dtype=np.float64)))


def log_loss(differences: npt.ArrayLike, outcomes: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Returns the mean of −[p log σ(Δ) + (1 − p) log σ(−Δ)] in nats; ln 2 = 0.693 is what a coin says.

    Args:
        differences: Δ, (N,).
        outcomes: p in [0, 1], (N,).
        weights: (N,); None for equal ones.

    Returns:
        nats; NaN where there is nothing to average.
    """
    delta, p = np.asarray(differences, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    losses = p * np.logaddexp(0, -delta) + (1 - p) * np.logaddexp(0, delta)
    return weighted_average(losses, np.ones_like(losses) if weights is None else weights)


def weighted_average(values: npt.ArrayLike, weights: npt.ArrayLike) -> float:
    """Returns Σ w v / Σ w; NaN where the weights, (N,) as the values, add up to 0."""
    numbers, shares = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    total = float(shares.sum())
    return float((numbers * shares).sum() / total) if total else float("nan")


def area_under_roc(scores: npt.ArrayLike, outcomes: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Returns the probability that a case of outcome 1 has a higher score than one of outcome 0, equal scores counting half.

    ½ is what scores reach that know nothing, whatever share of the outcomes is 1 (Hanley & McNeil 1982).

    Args:
        scores: (N,).
        outcomes: p in [0, 1], (N,); p between counts as a share p of a 1 and 1 − p of a 0.
        weights: (N,); None for 1 each.

    Returns:
        a number from 0 to 1; NaN where all outcomes are the same.
    """
    values, p = np.asarray(scores, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    weight = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    _, places = np.unique(values, return_inverse=True)
    ones, zeros = np.bincount(places, weights=weight * p), np.bincount(places, weights=weight * (1 - p))
    total = float(ones.sum() * zeros.sum())
    below = np.cumsum(zeros) - zeros  # the zeros of lower scores
    return float((ones * (below + zeros / 2)).sum() / total) if total else float("nan")


def reliability_table(
    probabilities: npt.ArrayLike,
    outcomes: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    num_bins: int = 10,
    low: float = 0.0,
) -> list[ReliabilityBin]:
    """Returns stated against observed frequencies in intervals of equal width.

    Args:
        probabilities: what was stated, in [`low`, 1], (N,).
        outcomes: what happened, in [0, 1], (N,).
        weights: (N,); None for 1 each.
        num_bins: intervals.
        low: where the first one begins: ½ for the probability of the side that is favoured.
    """
    stated, observed = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    weight = np.ones_like(stated) if weights is None else np.asarray(weights, dtype=np.float64)
    if stated.size and not (low - 1e-9 <= stated.min() and stated.max() <= 1 + 1e-9):
        raise ValueError(f"`probabilities` must lie in [{low:g}, 1], got {stated.min():g} to {stated.max():g}.")
    edges = np.linspace(low, 1.0, num_bins + 1)
    places = np.clip(np.searchsorted(edges, stated, side="right") - 1, 0, num_bins - 1)
    table = []
    for place in range(num_bins):
        inside = weight * (places == place)
        count = float(inside.sum())
        means = (float((inside * values).sum() / count) if count else float("nan") for values in (stated, observed))
        table.append(ReliabilityBin(float(edges[place]), float(edges[place + 1]), count, *means))
    return table


def expected_calibration_error(table: Sequence[ReliabilityBin]) -> float:
    """Returns Σ_b n_b/n |stated_b − observed_b| (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    total = sum(one.weight for one in table)
    return sum(one.weight * abs(one.stated - one.observed) for one in table if one.weight) / total if total else float("nan")
