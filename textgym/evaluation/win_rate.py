"""How often the texts of A are better than those of B: by scores (a gold reward, a reward model) or by a judge that is shown both.

    win rate = (wins + ½ ties) / comparisons

It is the number that the RLHF literature reports (against human summaries on TL;DR, for one), with a bootstrap interval.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from textgym.evaluation.bootstrap import Float64Array, Over, percentile_interval, resampled_means
from textgym.feedback.judging import PairJudge, ask_twice
from textgym.prompts import PromptText


@dataclass(frozen=True)
class WinRate:
    """How often A beat B.

    Attributes:
        rate: (wins + ½ ties) / comparisons, in [0, 1]; with a judge that gives probabilities, their mean.
        low: lower end of the bootstrap interval.
        high: upper end.
        wins: comparisons that A won.
        ties: comparisons without a winner.
        losses: comparisons that B won.
        confidence: of the interval.
        per_seed: the rate of each training run, where there were several.
    """

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    confidence: float = 0.95
    per_seed: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as JSON types."""
        return {**asdict(self), "per_seed": list(self.per_seed)}

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}] ({self.wins} won, {self.ties} tied, {self.losses} lost)"


def win_rate(
    scores_a: npt.ArrayLike,
    scores_b: npt.ArrayLike,
    *,
    tie_margin: float = 0.0,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> WinRate:
    """Returns the win rate of A against B from the scores of their texts; the interval is a percentile bootstrap over prompts.

    Args:
        scores_a: scores of A's texts on P prompts, (P,); or (P, G), G texts per prompt.
        scores_b: scores of B's texts on the same prompts in the same order, (P,) or (P, G). Text g is compared with text g; where one side
            has one text per prompt, (P,) or (P, 1), each of the other's is compared with it.
        tie_margin: scores that differ by at most this are a tie, in units of the scores.
        confidence: of the interval, in (0, 1).
        num_resamples: resamples of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: the shapes do not fit, there is nothing to compare, or a score is not finite.
    """
    points = win_points(scores_a, scores_b, tie_margin=tie_margin)
    return win_rate_from_points(points, confidence=confidence, num_resamples=num_resamples, seed=seed)


def win_rate_over_seeds(
    scores_a: npt.ArrayLike,
    scores_b: npt.ArrayLike,
    *,
    over: Over = "both",
    tie_margin: float = 0.0,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> WinRate:
    """Returns the win rate of several training runs of A, on the same prompts each, with one interval.

    Args:
        scores_a: scores of S runs on P prompts, (S, P).
        scores_b: those of B, (S, P), or (P,) where all runs are compared with the same texts.
        over: what the bootstrap draws: "seeds" (would another set of runs do as well on these prompts? With a handful of runs this
            interval is too narrow, by about √(1 − 1/S)), "prompts" (would these runs do as well on other prompts?) or "both".
        tie_margin: see `win_rate`.
        confidence: see `win_rate`.
        num_resamples: see `win_rate`.
        seed: see `win_rate`.
    """
    runs = np.asarray(scores_a, dtype=np.float64)
    if runs.ndim != 2:
        raise ValueError(f"`scores_a` must be a table of training runs by prompts, (S, P), got the shape {runs.shape}.")
    others = np.broadcast_to(np.asarray(scores_b, dtype=np.float64), runs.shape)
    points = _points(_finite("scores_a", runs), _finite("scores_b", others), tie_margin)
    return _summary(points, points, over, confidence, num_resamples, seed)


def judged_win_rate(
    judge: PairJudge,
    prompts: Sequence[PromptText],
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> WinRate:
    """Returns the win rate of A against B by a judge, who is asked twice about each pair, once in each order.

    Args:
        judge: `judge(prompt, first, second)` returns "first", "second" or "tie", or the probability that the first is better.
        prompts: P prompts.
        texts_a: A's text on each.
        texts_b: B's text on each.
        confidence: of the interval, in (0, 1).
        num_resamples: resamples of the bootstrap.
        seed: of the bootstrap.
    """
    points = judged_points(judge, prompts, texts_a, texts_b)
    return win_rate_from_points(points, confidence=confidence, num_resamples=num_resamples, seed=seed)


def win_points(scores_a: npt.ArrayLike, scores_b: npt.ArrayLike, *, tie_margin: float = 0.0) -> Float64Array:
    """Returns what each comparison counts for A: 1 won, ½ tied, 0 lost; (P,) or (P, G). See `win_rate` for the arguments."""
    first, second = (_finite(name, scores) for name, scores in (("scores_a", scores_a), ("scores_b", scores_b)))
    if first.ndim not in (1, 2) or second.ndim not in (1, 2) or len(first) != len(second) or not first.size:
        raise ValueError(
            f"`scores_a` and `scores_b` must hold the scores of the same prompts, (P,) or (P, G), got the shapes {first.shape} and "
            f"{second.shape}."
        )
    if first.ndim != second.ndim:
        first, second = (table if table.ndim == 2 else table[:, None] for table in (first, second))
    if first.ndim == 2 and first.shape != second.shape and 1 not in (first.shape[1], second.shape[1]):
        raise ValueError(f"`scores_a` and `scores_b` must have equally many texts per prompt, got {first.shape} and {second.shape}.")
    return _points(first, second, tie_margin)


def judged_points(judge: PairJudge, prompts: Sequence[PromptText], texts_a: Sequence[str], texts_b: Sequence[str]) -> Float64Array:
    """Returns what each comparison counts for A by a judge, (P,).

    The judge is asked in both orders, so that a liking for one position cancels out. Verdicts count 1, ½ or 0, and two that name
    different winners (or of which one is a tie) are a tie, as in Zheng et al. 2023 (arXiv:2306.05685, section 3.4); probabilities that are
    no verdicts are averaged. See `judged_win_rate` for the arguments.
    """
    if not len(prompts) == len(texts_a) == len(texts_b) or not len(prompts):
        raise ValueError(
            "`prompts`, `texts_a` and `texts_b` must hold one entry per comparison, at least one, "
            f"got {len(prompts)}, {len(texts_a)} and {len(texts_b)}."
        )
    rows = zip(prompts, texts_a, texts_b, range(len(prompts)), strict=True)
    return np.array([_point(judge, *row) for row in rows])


def win_rate_from_points(
    points: npt.ArrayLike, *, over: Over = "prompts", confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> WinRate:
    """Returns the win rate that points make.

    Args:
        points: what each comparison counts for A, in [0, 1]: above ½ it is won, below it is lost. (P,), or (P, G) with G comparisons per
            prompt, which the bootstrap keeps together; or, where `over` is not "prompts", (S, P) of S training runs.
        over: what the bootstrap draws, see `win_rate_over_seeds`.
        confidence: of the interval, in (0, 1).
        num_resamples: resamples of the bootstrap.
        seed: of the bootstrap.
    """
    table = _finite("points", points)
    if over == "prompts":
        per_prompt = table.mean(axis=1) if table.ndim == 2 else table
        return _summary(table, per_prompt[None], over, confidence, num_resamples, seed)
    return _summary(table, table, over, confidence, num_resamples, seed)


def _summary(points: Float64Array, table: Float64Array, over: Over, confidence: float, num_resamples: int, seed: int) -> WinRate:
    """Counts `points` (any shape) and resamples `table` (S, P), which is the same or means of it."""
    low, high = percentile_interval(resampled_means(table, over, num_resamples, seed), confidence)
    return WinRate(
        rate=float(points.mean()),
        low=low,
        high=high,
        wins=int((points > 0.5).sum()),
        ties=int((points == 0.5).sum()),
        losses=int((points < 0.5).sum()),
        confidence=confidence,
        per_seed=tuple(table.mean(axis=1).tolist()) if len(table) > 1 else (),
    )


def _points(first: Float64Array, second: Float64Array, tie_margin: float) -> Float64Array:
    if not tie_margin >= 0:
        raise ValueError(f"`tie_margin` must be at least 0, got {tie_margin}.")
    difference = first - second
    return np.where(np.abs(difference) <= tie_margin, 0.5, np.heaviside(difference, 0.5))


def _point(judge: PairJudge, prompt: PromptText, text_a: str, text_b: str, row: int) -> float:
    straight, back = ask_twice(judge, prompt, text_a, text_b, f"row {row}")
    swapped = 1.0 - back
    if {straight, swapped} <= {0.0, 0.5, 1.0}:  # verdicts
        return straight if straight == swapped else 0.5
    return (straight + swapped) / 2


def _finite(name: str, scores: npt.ArrayLike) -> Float64Array:
    array = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(array).all():
        place = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"`{name}` must be finite, got {array[tuple(place)]} at {place}; leave rows without a score out of both sides.")
    return array
