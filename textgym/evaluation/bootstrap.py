"""Bootstrap intervals of means: how sure a mean over prompts, or over training runs, can be."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

Float64Array: TypeAlias = npt.NDArray[np.float64]
Over: TypeAlias = Literal["prompts", "seeds", "both"]
_DRAWS_AT_ONCE = 2**22  # numbers of one chunk of resamples: 32 MB


@dataclass(frozen=True)
class Estimate:
    """A mean and its percentile bootstrap interval.

    Attributes:
        mean: the mean.
        low: lower end of the interval.
        high: upper end.
        confidence: how much of the resampled means lies between them.
    """

    mean: float
    low: float
    high: float
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        # Rounded first: a mean of rounding errors is 0, not -0.
        mean, low, high = (round(value, 3) + 0.0 for value in (self.mean, self.low, self.high))
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def bootstrap_mean(values: npt.ArrayLike, *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Returns the mean of `values` with its percentile bootstrap interval (Efron 1979).

    The interval is a little too narrow for few values, and has no width where all values are equal: the sample says nothing of its spread.

    Args:
        values: (N,), one independent value each: one per prompt, not one per completion where prompts have several.
        confidence: in (0, 1).
        num_resamples: how often N values are drawn with replacement.
        seed: of the draws.

    Raises:
        ValueError: `values` is empty, of another shape, or not finite.
    """
    checked = _checked("values", values, 1)
    means = resampled_means(checked[None], "prompts", num_resamples, seed)
    return Estimate(float(checked.mean()), *percentile_interval(means, confidence), confidence)


def bootstrap_cluster_mean(
    values: npt.ArrayLike,
    clusters: Sequence[Hashable],
    weights: npt.ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Returns the weighted mean of `values` with its percentile bootstrap interval, in which whole clusters are drawn.

    Comparisons of one prompt share their answers, so they are no independent values; prompts are.

    Args:
        values: (N,).
        clusters: which cluster each value belongs to, N of them.
        weights: (N,), at least 0, not all 0; None for 1 each.
        confidence: in (0, 1).
        num_resamples: how often the clusters are drawn with replacement.
        seed: of the draws.
    """
    checked = _checked("values", values, 1)
    shares = np.ones_like(checked) if weights is None else _checked("weights", weights, 1)
    if not len(checked) == len(shares) == len(clusters) or shares.min() < 0 or not shares.sum():
        raise ValueError("`clusters` and `weights` must have one entry per value, and some weight above 0.")
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.array([places[cluster] for cluster in clusters])
    sums, totals = (np.bincount(index, weights=numbers, minlength=len(places)) for numbers in (shares * checked, shares))
    rng, chunk, means = np.random.default_rng(seed), max(1, _DRAWS_AT_ONCE // len(places)), []
    for start in range(0, num_resamples, chunk):
        drawn = _weights(rng, len(places), min(chunk, num_resamples - start), drawn=True)
        weight = drawn @ totals
        means.append((drawn @ sums)[weight > 0] / weight[weight > 0])
    return Estimate(float(sums.sum() / totals.sum()), *percentile_interval(np.concatenate(means), confidence), confidence)


def resampled_means(values: npt.ArrayLike, over: Over, num_resamples: int, seed: int) -> Float64Array:
    """Returns the means of resamples of a table of training runs by prompts, (num_resamples,).

    Rows and columns are drawn independently of each other, because all runs are measured on the same prompts (the crossed bootstrap of
    Owen 2007, which is conservative: it covers another set of prompts and another set of runs at once).

    Args:
        values: (S, P), S runs (seeds) and P prompts.
        over: what is drawn with replacement: the prompts, the runs, or both.
        num_resamples: how often.
        seed: of the draws.
    """
    table = _checked("values", values, 2)
    if over not in get_args(Over):
        raise ValueError(f"`over` must be one of {', '.join(map(repr, get_args(Over)))}, got {over!r}.")
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` must be at least 1, got {num_resamples}.")
    rng, (runs, prompts) = np.random.default_rng(seed), table.shape
    chunk = max(1, _DRAWS_AT_ONCE // (runs + prompts))
    means = []
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        run_weights = _weights(rng, runs, size, drawn=over != "prompts")
        prompt_weights = _weights(rng, prompts, size, drawn=over != "seeds")
        sums = ((run_weights @ table) * prompt_weights).sum(axis=1)  # (size, S) @ (S, P) -> (size, P) -> (size,)
        means.append(sums / table.size)
    return np.concatenate(means)


def _weights(rng: np.random.Generator, count: int, size: int, *, drawn: bool) -> Float64Array:
    """How often each of `count` things is in `size` resamples, (size, count); rows sum up to `count`."""
    if not drawn:
        return np.ones((size, count))
    return rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)


def percentile_interval(means: Float64Array, confidence: float) -> tuple[float, float]:
    """Returns the ends of the middle `confidence` of resampled means."""
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be above 0 and below 1, got {confidence}.")
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _checked(name: str, values: npt.ArrayLike, dimensions: int) -> Float64Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or not array.size:
        raise ValueError(f"`{name}` must be a non-empty array of {dimensions} dimension(s), got the shape {array.shape}.")
    if not np.isfinite(array).all():
        place = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"`{name}` must be finite, got {array[tuple(place)]} at {place}.")
    return array
