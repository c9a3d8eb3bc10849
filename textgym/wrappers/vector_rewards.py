"""Clipping and normalising the rewards of a vector environment, also of whole completions in one pass."""

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv, VectorWrapper

from textgym import sequences
from textgym.pending import Pending
from textgym.plans import checked_plan
from textgym.types import BoolArray, Info, SequenceResult
from textgym.wrappers.reward_changes import Clipping, ReturnNormalisation, RewardChange, RunningMoments, WithStatistics
from textgym.wrappers.scoring import DoubleArray
from textgym.wrappers.turns import RowTurns


class VectorRewardLayer(VectorWrapper[Any, Any, Any, Any, Any]):
    """A wrapper of a vector environment that changes rewards by a rule, and nothing else.

    Rows that take no step of their own (held rows, a row's autoreset in `NEXT_STEP` mode) are not seen by the rule.

    Args:
        env: any vector environment, in any autoreset mode.
        rule: what is done to the rewards, for as many rows as `env` has.
    """

    changes_rewards_only = True

    def __init__(self, env: VectorEnv[Any, Any, Any], rule: RewardChange) -> None:
        super().__init__(env)
        self._rule = rule
        self._turns = RowTurns(env)

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        """Resets the environment, or the rows of `options["reset_mask"]`."""
        rows, options = self._turns.reset(options)
        observations, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        self._rule.begin(rows)
        return observations, infos

    def step(self, actions: Any) -> tuple[Any, DoubleArray, BoolArray, BoolArray, Info]:
        """Steps the environment and changes the reward of each row that acted."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        turn = self._turns.step(terminated, truncated)
        changed = self._rule.change(np.asarray(rewards, dtype=np.float64), turn.acted, np.asarray(terminated))
        infos = self._turns.add_keys(infos, turn, changed.step, changed.episode)
        if turn.restarted.any():
            self._rule.begin(turn.restarted)
        return observations, changed.rewards, terminated, truncated, infos

    def hold_rows(self, mask: BoolArray | None) -> None:
        """Holds rows (see `TextGenVectorEnv.hold_rows`): they are not changed until their next reset. Passed on to the layers below.

        Args:
            mask: (N,) True for the rows to hold; None holds none.
        """
        self._turns.hold(mask)
        sequences.hold_below(self.env, mask)

    def step_sequence(
        self, actions: npt.NDArray[Any], lengths: npt.NDArray[Any], log_probs: npt.NDArray[Any] | None = None
    ) -> SequenceResult:
        """Takes whole completions through the environment; the same as `textgym.step_sequence(self, actions, lengths, log_probs)`."""
        return self.start_sequence(actions, lengths, log_probs).result()

    def start_sequence(
        self, actions: npt.NDArray[Any], lengths: npt.NDArray[Any], log_probs: npt.NDArray[Any] | None = None
    ) -> Pending[SequenceResult]:
        """Begins a `step_sequence`; a rule that learns from returns before its next episodes begin has the rewards waited for now."""
        plan = checked_plan(self, actions, lengths, log_probs)
        if self._turns.ended.any():
            raise ValueError(sequences.NOT_FRESH)
        if not sequences.one_pass(self):
            return Pending.of(sequences.walk_through(self, *plan))
        changed = sequences.start_sequence(self.env, *plan).then(self._change_sequences)
        self._turns.ended[:] = True
        if self._rule.learns:
            changed.result()
        return changed

    def _change_sequences(self, result: SequenceResult) -> SequenceResult:
        rewards = result.rewards.copy()
        infos = [dict(info) for info in result.infos]
        for t in range(int(result.lengths_used.max())):
            last = result.lengths_used == t + 1
            changed = self._rule.change(result.rewards[:, t].astype(np.float64), result.lengths_used > t, result.terminated & last)
            rewards[:, t] = changed.rewards
            for row in np.flatnonzero(last).tolist():
                keys = {**changed.step, **(changed.episode if result.terminated[row] or result.truncated[row] else {})}
                infos[row].update({key: float(values[row]) for key, values in keys.items()})
        return result._replace(rewards=rewards, infos=infos)


class ClipReward(VectorRewardLayer):
    """Bounds the reward of every step and row: the vector form of `textgym.wrappers.ClipReward`.

    Args:
        env: any vector environment, in any autoreset mode.
        min_reward: lower bound, None for none.
        max_reward: upper bound, None for none.

    Raises:
        ValueError: both bounds are None, or the lower one is above the upper one.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], min_reward: float | None = None, max_reward: float | None = None) -> None:
        super().__init__(env, Clipping(min_reward, max_reward))


class NormalizeReward(WithStatistics, VectorRewardLayer):
    """Brings the returns of episodes to mean 0 and standard deviation 1: the vector form of `textgym.wrappers.NormalizeReward`.

    All rows share one set of statistics. The rows of a rollout that begin with one reset are therefore changed alike, by the statistics of
    the rollouts before; the first rollout is not changed, unless `statistics` are given.

    Args:
        env: any vector environment, in any autoreset mode.
        center: take the mean off.
        clip: bound of the absolute value of a changed reward, None for none.
        epsilon: a standard deviation of at most this counts as 1.
        statistics: moments to begin with and to go on with, shared with whoever else holds them; by default new ones.
        frozen: use the statistics and leave them as they are; also an attribute that can be set.

    Raises:
        ValueError: an argument breaks these rules.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        center: bool = True,
        clip: float | None = None,
        epsilon: float = 1e-8,
        statistics: RunningMoments | None = None,
        frozen: bool = False,
    ) -> None:
        self._normalisation = ReturnNormalisation(env.num_envs, statistics, center, clip, epsilon, frozen)
        super().__init__(env, self._normalisation)
