"""Clipping and normalising the rewards of a single environment. The vector forms are in `textgym.wrappers.vector`."""

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from textgym.types import Info
from textgym.wrappers.reward_changes import Clipping, ReturnNormalisation, RewardChange, RunningMoments, WithStatistics

_ROW = np.ones(1, dtype=np.bool_)


class RewardLayer(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """A wrapper that changes rewards by a rule, and nothing else.

    Args:
        env: the environment.
        rule: what is done to the rewards, for one row.
        **arguments: the wrapper's own, for its specification.
    """

    changes_rewards_only = True

    def __init__(self, env: gym.Env[Any, Any], rule: RewardChange, **arguments: Any) -> None:
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, **arguments)
        gym.Wrapper.__init__(self, env)
        self._rule = rule

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        """Resets the environment."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._rule.begin(_ROW)
        return observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Steps the environment and changes its reward."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        changed = self._rule.change(np.array([float(reward)]), _ROW, np.array([bool(terminated)]))
        keys = {**changed.step, **(changed.episode if terminated or truncated else {})}
        return observation, float(changed.rewards[0]), terminated, truncated, {**info, **{key: float(keys[key][0]) for key in keys}}


class ClipReward(RewardLayer):
    """Bounds the reward of every step: `r' = min(max(r, min_reward), max_reward)`.

    It bounds payments, not returns: for a text with one reward at its end that is the same, for one that is paid by segments it is not.
    `info` of every step has `unclipped_reward`. Gymnasium's `ClipReward` does the same to the rewards, without the key, and is stepped
    token by token where whole completions are walked.

    Args:
        env: the environment.
        min_reward: lower bound, None for none.
        max_reward: upper bound, None for none.

    Raises:
        ValueError: both bounds are None, or the lower one is above the upper one.
    """

    def __init__(self, env: gym.Env[Any, Any], min_reward: float | None = None, max_reward: float | None = None) -> None:
        super().__init__(env, Clipping(min_reward, max_reward), min_reward=min_reward, max_reward=max_reward)


class NormalizeReward(WithStatistics, RewardLayer):
    """Brings the returns of episodes to mean 0 and standard deviation 1, by the running mean μ and standard deviation σ of past returns.

        r'_t = r_t / σ,   at the end of the episode (r_T - μ) / σ,   so that the return G becomes (G - μ) / σ

    An episode is changed by the statistics of the episodes that had terminated when it began, so all its rewards are changed alike. Its own
    return enters them when it terminates; one that an outer time limit cuts, unscored, enters nothing and has no mean taken off. Before
    there are two different returns, σ is 1; before there is one, μ is 0.

    `info` of every step has `unnormalized_reward`; at the end of an episode also `unnormalized_return`, and `return_mean` and `return_std`
    as they were used.

    Below KL shaping (where it is when an agent adds the shaping) it normalises the reward alone: β is then in standard deviations per
    nat. Above it the penalty is divided too, and β keeps its unit. Gymnasium's `NormalizeReward` divides by the standard deviation of
    discounted sums of rewards over steps and takes no mean off: meant for dense rewards and long episodes.

    Args:
        env: the environment.
        center: take the mean off. It is the same for every text, and changes no optimum.
        clip: bound of the absolute value of a changed reward, None for none.
        epsilon: a standard deviation of at most this counts as 1.
        statistics: moments to begin with and to go on with, shared with whoever else holds them (the rows of a batch, or an evaluation);
            by default new ones.
        frozen: use the statistics and leave them as they are; also an attribute that can be set.

    Raises:
        ValueError: an argument breaks these rules.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        center: bool = True,
        clip: float | None = None,
        epsilon: float = 1e-8,
        statistics: RunningMoments | None = None,
        frozen: bool = False,
    ) -> None:
        self._normalisation = ReturnNormalisation(1, statistics, center, clip, epsilon, frozen)
        super().__init__(
            env, self._normalisation, center=center, clip=clip, epsilon=epsilon, statistics=self._normalisation.statistics, frozen=frozen
        )
