"""What a reward model is worth on feedback that it was not trained on, beside what the length of the texts alone would say."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from textgym.evaluation.bootstrap import Estimate, bootstrap_cluster_mean
from textgym.evaluation.calibration import ReliabilityBin, expected_calibration_error, log_loss, reliability_table, sigmoid

Floats = npt.NDArray[np.float64]
NUM_BINS = 5  # of the confidence ½ to 1


class Decisions(NamedTuple):
    """What feedback says, one by one: a comparison of two pieces, or a verdict on one.

    Attributes:
        differences: Δ: the reward of the first minus that of the second, or the reward of the one, (N,).
        outcomes: p: the probability that the first is better, or that the verdict is "good", in [0, 1], (N,).
        weights: (N,), those of one record add up to the record's weight.
        length_differences: Δ of the lengths in tokens, or the length minus the median of the training texts, (N,).
        clusters: the prompt of each.
    """

    differences: Floats
    outcomes: Floats
    weights: Floats
    length_differences: Floats
    clusters: Sequence[str]

    def right(self, differences: Floats) -> Floats:
        """How right each decision by the sign of `differences` is: 1, 0, or between where the label is; no difference is half right."""
        p = self.outcomes
        return np.where(differences > 0, p, np.where(differences < 0, 1 - p, 0.5))


@dataclass(frozen=True)
class RewardModelReport:
    """A reward model on held-out feedback.

    Attributes:
        num_records: records of feedback.
        num_decisions: comparisons and verdicts in them.
        loss: the mean training loss on them.
        accuracy: share of the decisions that the model gets right (a tie in the reward is half right), with a bootstrap interval over
            prompts. A label that is itself a coin's, p = ½, is got half right by everybody.
        length_accuracy: the same of the rule that knows the lengths only, in the direction that was more often right in training.
        longer_wins: that direction.
        log_loss: mean −log probability of the outcomes under σ(Δ), in nats; ln 2 = 0.693 is a coin's.
        expected_calibration_error: of σ(|Δ|) as the probability of being right.
        reliability: stated against observed shares of right decisions, by σ(|Δ|) from ½ to 1.
        reward_mean: of the different texts or pieces.
        reward_std: the same.
    """

    num_records: int
    num_decisions: int
    loss: float
    accuracy: Estimate
    length_accuracy: Estimate
    longer_wins: bool
    log_loss: float
    expected_calibration_error: float
    reliability: list[ReliabilityBin]
    reward_mean: float
    reward_std: float

    @classmethod
    def of(cls, decisions: Decisions, rewards: Floats, *, num_records: int, loss: float, longer_wins: bool) -> "RewardModelReport":
        """Makes the report.

        Args:
            decisions: what the feedback says and the model thinks.
            rewards: those of the different pieces, (M,).
            num_records: how many records the decisions come from.
            loss: the training loss on them.
            longer_wins: whether the length baseline takes the longer text.
        """
        delta, weights, clusters = decisions.differences, decisions.weights, decisions.clusters
        # Folded to the side that the model favours: which answer stands first says nothing.
        observed = np.where(delta >= 0, decisions.outcomes, 1 - decisions.outcomes)
        table = reliability_table(sigmoid(np.abs(delta)), observed, weights, num_bins=NUM_BINS, low=0.5)
        by_length = decisions.right(decisions.length_differences * (1.0 if longer_wins else -1.0))
        return cls(
            num_records=num_records,
            num_decisions=len(delta),
            loss=loss,
            accuracy=bootstrap_cluster_mean(decisions.right(delta), clusters, weights),
            length_accuracy=bootstrap_cluster_mean(by_length, clusters, weights),
            longer_wins=longer_wins,
            log_loss=log_loss(delta, decisions.outcomes, weights),
            expected_calibration_error=expected_calibration_error(table),
            reliability=table,
            reward_mean=float(rewards.mean()),
            reward_std=float(rewards.std()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON types."""
        document = asdict(self)
        document["reliability"] = [
            {key: None if value != value else value for key, value in one._asdict().items()} for one in self.reliability
        ]
        return document

    def __str__(self) -> str:
        """A few lines for a terminal."""
        rule = "longer wins" if self.longer_wins else "shorter wins"
        lines = [
            f"{self.num_decisions} decisions in {self.num_records} held-out records",
            f"accuracy           {_share(self.accuracy)}",
            f"length alone       {_share(self.length_accuracy)}  ({rule})",
            f"log loss           {self.log_loss:.4f} nats (a coin: 0.6931)",
            f"calibration error  {self.expected_calibration_error:.4f}",
            f"rewards            {self.reward_mean:.3f} ± {self.reward_std:.3f}",
        ]
        return "\n".join(lines)


def _share(interval: Estimate) -> str:
    return f"{interval.mean:.1%}  [{interval.low:.1%}, {interval.high:.1%}]"


def best_direction(decisions: Decisions) -> bool:
    """Returns whether the longer of two texts is at least as often the better one as the shorter."""
    right = decisions.right(decisions.length_differences)
    return float(np.average(right, weights=decisions.weights)) >= 0.5
