"""What the reward wrappers do to the rewards of any number of rows; their single and vector forms are two faces of this.

A change sees each step of each row once, in order, and no step that a row did not take. What it does to a step may depend on that row's
episode so far and on what was known when the episode began, so rows may be stepped in any order or taken through whole completions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from textgym.types import BoolArray
from textgym.wrappers.scoring import DoubleArray


class Changed(NamedTuple):
    """The rewards of one step, and what the infos say about it.

    Attributes:
        rewards: (N,), those of rows that took no step as they came.
        step: info keys of every step, (N,) each.
        episode: info keys of the last step of an episode besides, (N,) each.
    """

    rewards: DoubleArray
    step: dict[str, DoubleArray]
    episode: dict[str, DoubleArray]


class RewardChange(ABC):
    """The rule of a reward wrapper.

    Attributes:
        learns: what it does to an episode depends on episodes before, and on the row's own steps so far.
    """

    learns: ClassVar[bool]

    @abstractmethod
    def begin(self, rows: BoolArray) -> None:
        """Starts the episodes of `rows` (N,)."""

    @abstractmethod
    def change(self, rewards: DoubleArray, acted: BoolArray, terminated: BoolArray) -> Changed:
        """Changes the rewards (N,) of the rows that acted, of which some have terminated."""


class Clipping(RewardChange):
    """Bounds the reward of every step.

    Args:
        min_reward: lower bound, None for none.
        max_reward: upper bound, None for none.
    """

    learns = False

    def __init__(self, min_reward: float | None, max_reward: float | None) -> None:
        low, high = -math.inf if min_reward is None else min_reward, math.inf if max_reward is None else max_reward
        if min_reward is None and max_reward is None:
            raise ValueError("`min_reward` or `max_reward` must be given, got None for both.")
        if not low <= high:
            raise ValueError(f"`min_reward` must be at most `max_reward`, got {min_reward} and {max_reward}.")
        self.low, self.high = float(low), float(high)

    def begin(self, rows: BoolArray) -> None:
        """Nothing is kept."""

    def change(self, rewards: DoubleArray, acted: BoolArray, terminated: BoolArray) -> Changed:
        """Bounds them."""
        return Changed(np.where(acted, np.clip(rewards, self.low, self.high), rewards), {"unclipped_reward": rewards}, {})


class RunningMoments:
    """Count, mean and standard deviation of numbers that come in batches (Chan, Golub & LeVeque 1979).

    Attributes:
        count: how many there were.
        mean: their mean; 0 if there was none.
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Returns the moments of `values`, such as the rewards of completions that were sampled before a training."""
        moments = cls()
        moments.update(np.fromiter(values, dtype=np.float64))
        return moments

    @property
    def std(self) -> float:
        """The standard deviation (divided by the count); 0 for fewer than two numbers."""
        return math.sqrt(self._squares / self.count) if self.count else 0.0

    def update(self, values: DoubleArray) -> None:
        """Takes in `values` (K,)."""
        if not len(values):
            return
        mean, squares, total = float(values.mean()), float(((values - values.mean()) ** 2).sum()), self.count + len(values)
        self._squares += squares + (mean - self.mean) ** 2 * self.count * len(values) / total
        self.mean += (mean - self.mean) * len(values) / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        """Returns everything, as numbers that JSON can hold."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        self.count, self.mean, self._squares = int(state["count"]), float(state["mean"]), float(state["squares"])

    def __repr__(self) -> str:
        return f"RunningMoments(count={self.count}, mean={self.mean:g}, std={self.std:g})"


class ReturnNormalisation(RewardChange):
    """Divides rewards by the running standard deviation of the episodes' returns, and takes their running mean off the last one.

    Args:
        num_rows: N.
        statistics: the moments of the returns.
        center: take the mean off.
        clip: bound of the absolute value of a changed reward, None for none.
        epsilon: a standard deviation of at most this counts as 1.
        frozen: learn nothing more.
    """

    learns = True

    def __init__(
        self, num_rows: int, statistics: RunningMoments | None, center: bool, clip: float | None, epsilon: float, frozen: bool
    ) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"`clip` must be more than 0 or None, got {clip}.")
        if not epsilon >= 0:
            raise ValueError(f"`epsilon` must be at least 0, got {epsilon}.")
        if statistics is not None and not isinstance(statistics, RunningMoments):
            raise ValueError(f"`statistics` must be `RunningMoments` or None, got {type(statistics).__name__}.")
        self.statistics = RunningMoments() if statistics is None else statistics
        self.center, self.clip, self.epsilon, self.frozen = center, clip, epsilon, frozen
        self.means, self.scales, self.returns = np.zeros(num_rows), np.ones(num_rows), np.zeros(num_rows)

    def begin(self, rows: BoolArray) -> None:
        """Reads the statistics: they hold for the whole episode."""
        std = self.statistics.std
        self.means[rows] = self.statistics.mean if self.center else 0.0
        self.scales[rows] = std if std > self.epsilon else 1.0
        self.returns[rows] = 0.0

    def change(self, rewards: DoubleArray, acted: BoolArray, terminated: BoolArray) -> Changed:
        """Changes the rewards, and takes the returns of the rows that terminated into the statistics."""
        self.returns += np.where(acted, rewards, 0.0)
        finished = acted & terminated
        changed = (rewards - np.where(finished, self.means, 0.0)) / self.scales
        if self.clip is not None:
            changed = np.clip(changed, -self.clip, self.clip)
        if not self.frozen:
            self.statistics.update(self.returns[finished])
        episode = {"unnormalized_return": self.returns.copy(), "return_mean": self.means.copy(), "return_std": self.scales.copy()}
        return Changed(np.where(acted, changed, rewards), {"unnormalized_reward": rewards}, episode)


class WithStatistics:
    """What the single and the vector form of a wrapper that normalises show of their statistics.

    Attributes:
        _normalisation: the rule that holds them.
    """

    _normalisation: ReturnNormalisation

    @property
    def statistics(self) -> RunningMoments:
        """The moments of the returns so far."""
        return self._normalisation.statistics

    @property
    def frozen(self) -> bool:
        """Whether the statistics stay as they are."""
        return self._normalisation.frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self._normalisation.frozen = frozen

    def state_dict(self) -> dict[str, float]:
        """Returns the statistics, as numbers that JSON can hold."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from the statistics that `state_dict` returned; for episodes that begin from now on."""
        self.statistics.load_state_dict(state)
