"""What a reward model is worth on feedback that it was not trained on, beside what the length of the texts alone would say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from textgym.evaluation.bootstrap import Estimate, bootstrap_cluster_mean
from textgym.evaluation.calibration import (
    ReliabilityBin,
    area_under_roc,
    expected_calibration_error,
    log_loss,
    reliability_table,
    sigmoid,
    weighted_average,
)

Floats = npt.NDArray[np.float64]
NUM_BINS = 5  # of the confidence ½ to 1
NOTHING = Estimate(math.nan, math.nan, math.nan)  # the mean of no decisions


class Decisions(NamedTuple):
    """What feedback says, one by one: a comparison of two pieces, or a verdict on one.

    Attributes:
        differences: Δ: the reward of the first minus that of the second, or the reward of the one, (N,).
        outcomes: p: the probability that the first is better, or that the verdict is "good", in [0, 1], (N,).
        weights: (N,), those of one record add up to the record's weight.
        length_differences: Δ of the lengths in tokens, or the length minus the median of the training texts, (N,).
        clusters: the prompt of each.
        categories: what each verdict is about, where markings have categories ("" of others); empty where nothing has one.
    """

    differences: Floats
    outcomes: Floats
    weights: Floats
    length_differences: Floats
    clusters: Sequence[str]
    categories: Sequence[str] = ()

    def right(self, differences: Floats) -> Floats:
        """How right each decision by the sign of `differences` is: 1, 0, or between where the label is; no difference is half right."""
        p = self.outcomes
        return np.where(differences > 0, p, np.where(differences < 0, 1 - p, 0.5))

    def share_right(self, differences: Floats) -> Estimate:
        """The weighted mean of `right`, with a bootstrap interval over prompts; NaN where nothing was decided."""
        if not self.weights.sum():
            return NOTHING
        return bootstrap_cluster_mean(self.right(differences), self.clusters, self.weights)

    def of_category(self, category: str) -> "Decisions":
        """The decisions that are about one category."""
        places = [place for place, one in enumerate(self.categories) if one == category]
        return Decisions(
            self.differences[places],
            self.outcomes[places],
            self.weights[places],
            self.length_differences[places],
            [self.clusters[place] for place in places],
        )


@dataclass(frozen=True)
class CategoryReport:
    """A reward model on the held-out verdicts of one category of markings.

    Attributes:
        num_decisions: verdicts: one per segment.
        clean: the share of segments without a fault, which is the accuracy of calling all of them clean.
        accuracy: the share of right verdicts by the sign of the score, with a bootstrap interval over prompts.
        area_under_roc: the probability that a clean segment has a higher score than a faulty one; ½ says nothing, NaN: all are of one kind.
        log_loss: of σ(score), in nats.
    """

    num_decisions: int
    clean: float
    accuracy: Estimate
    area_under_roc: float
    log_loss: float

    @classmethod
    def of(cls, decisions: Decisions) -> "CategoryReport":
        """Makes the report of the decisions about one category."""
        scores, outcomes, weights = decisions.differences, decisions.outcomes, decisions.weights
        return cls(
            num_decisions=len(scores),
            clean=weighted_average(outcomes, weights),
            accuracy=decisions.share_right(scores),
            area_under_roc=area_under_roc(scores, outcomes, weights),
            log_loss=log_loss(scores, outcomes, weights),
        )


@dataclass(frozen=True)
class RewardModelReport:
    """A reward model on held-out feedback.

    Where the feedback decides nothing, as rankings that are all ties, the numbers of decisions are NaN (None in `to_dict`).

    Attributes:
        num_records: records of feedback.
        num_decisions: comparisons and verdicts in them.
        loss: the mean training loss on them.
        accuracy: share of the decisions that the model gets right (a tie in the reward is half right), with a bootstrap interval over
            prompts. A label that is itself a coin's, p = ½, is got half right by everybody.
        length_accuracy: the same of the rule that knows the lengths only, in the direction that was more often right in training.
        longer_wins: that direction; None where the training feedback decides nothing.
        log_loss: mean −log probability of the outcomes under σ(Δ), in nats; ln 2 = 0.693 is a coin's.
        expected_calibration_error: of σ(|Δ|) as the probability of being right.
        reliability: stated against observed shares of right decisions, by σ(|Δ|) from ½ to 1.
        reward_mean: of the different texts or pieces.
        reward_std: the same.
        left_out: records of the feedback that were not measured, by the reason: `too_long`, `same_answers`, `comments`.
        by_category: of markings, each of their categories.
    """

    num_records: int
    num_decisions: int
    loss: float
    accuracy: Estimate
    length_accuracy: Estimate
    longer_wins: bool | None
    log_loss: float
    expected_calibration_error: float
    reliability: list[ReliabilityBin]
    reward_mean: float
    reward_std: float
    left_out: dict[str, int] = field(default_factory=dict)
    by_category: dict[str, CategoryReport] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        decisions: Decisions,
        rewards: Floats,
        *,
        num_records: int,
        loss: float,
        longer_wins: bool | None,
        left_out: Mapping[str, int] | None = None,
    ) -> "RewardModelReport":
        """Makes the report.

        Args:
            decisions: what the feedback says and the model thinks.
            rewards: those of the different pieces, (M,).
            num_records: how many records the decisions come from.
            loss: the training loss on them.
            longer_wins: whether the length baseline takes the longer text; None where no direction is known.
            left_out: records that were not measured, by the reason.
        """
        delta, weights = decisions.differences, decisions.weights
        # Folded to the side that the model favours: which answer stands first says nothing.
        observed = np.where(delta >= 0, decisions.outcomes, 1 - decisions.outcomes)
        table = reliability_table(sigmoid(np.abs(delta)), observed, weights, num_bins=NUM_BINS, low=0.5)
        by_length = decisions.length_differences * (1.0 if longer_wins else -1.0)
        return cls(
            num_records=num_records,
            num_decisions=len(delta),
            loss=loss,
            accuracy=decisions.share_right(delta),
            length_accuracy=NOTHING if longer_wins is None else decisions.share_right(by_length),
            longer_wins=longer_wins,
            log_loss=log_loss(delta, decisions.outcomes, weights),
            expected_calibration_error=expected_calibration_error(table),
            reliability=table,
            reward_mean=float(rewards.mean()),
            reward_std=float(rewards.std()),
            left_out=dict(left_out or {}),
            by_category={name: CategoryReport.of(decisions.of_category(name)) for name in dict.fromkeys(decisions.categories) if name},
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON types; what is not a number is None."""
        document: dict[str, Any] = _without_nan({**asdict(self), "reliability": [one._asdict() for one in self.reliability]})
        return document

    def __str__(self) -> str:
        """A few lines for a terminal."""
        rule = {True: "longer wins", False: "shorter wins", None: "the training feedback decides nothing"}[self.longer_wins]
        lines = [
            f"{self.num_decisions} decisions in {self.num_records} held-out records",
            *([f"left out           {words}"] if (words := left_out_in_words(self.left_out)) else []),
            f"accuracy           {_share(self.accuracy)}",
            f"length alone       {_share(self.length_accuracy)}  ({rule})",
            f"log loss           {self.log_loss:.4f} nats (a coin: 0.6931)",
            f"calibration error  {self.expected_calibration_error:.4f}",
            f"rewards            {self.reward_mean:.3f} ± {self.reward_std:.3f}",
        ]
        lines += [
            f"{name}: {one.num_decisions} verdicts, {one.clean:.1%} clean, accuracy {_share(one.accuracy)}, AUC {one.area_under_roc:.3f}"
            for name, one in self.by_category.items()
        ]
        return "\n".join(lines)


REASONS = {
    "too_long": "longer than `max_tokens`",
    "same_answers": "whose answers are the same tokens",
    "comments": "comments",
}


def left_out_in_words(left_out: Mapping[str, int]) -> str:
    """Returns what `RewardModelReport.left_out` counts in words, "731 longer than `max_tokens`, 2 comments"; "" for nothing."""
    return ", ".join(f"{count:,} {REASONS[reason]}" for reason, count in left_out.items() if count)


def _without_nan(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _without_nan(value) for key, value in document.items()}
    if isinstance(document, list):
        return [_without_nan(value) for value in document]
    return None if isinstance(document, float) and math.isnan(document) else document


def _share(interval: Estimate) -> str:
    return "no decisions" if math.isnan(interval.mean) else f"{interval.mean:.1%}  [{interval.low:.1%}, {interval.high:.1%}]"


def best_direction(decisions: Decisions) -> bool | None:
    """Returns whether the longer of two texts is at least as often the better one as the shorter; None where nothing was decided."""
    if not decisions.weights.sum():
        return None
    right = decisions.right(decisions.length_differences)
    return weighted_average(right, decisions.weights) >= 0.5
