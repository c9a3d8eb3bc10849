"""Agents on clipped and normalised rewards: what they are paid, what they log, and runs that go on where they stopped."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import VectorEnv

from textgym.agents import PPO, REINFORCE
from textgym.wrappers import RunningMoments
from textgym.wrappers.vector import ClipReward, NormalizeReward


def weights(agent: Any) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(agent.policy.parameters()).detach().cpu()


def train(task: Any, envs: VectorEnv, rollouts: int = 4) -> Any:
    agent = REINFORCE(task.policy(), envs, beta=0.5, learning_rate=0.01, seed=0)
    return agent.learn(rollouts * 32 * task.tree.horizon // 2, log_interval=1000)


def test_a_training_on_normalised_rewards_is_one_on_the_normalised_function(task: Any) -> None:
    """Mean 3 and standard deviation 2, known beforehand: the KL term is not divided."""
    reward = task.tree.reward_function()

    def by_hand(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
        return [(score - 3.0) / 2.0 for score in reward(prompts=prompts, completion_ids=completion_ids)]

    wrapped = train(task, NormalizeReward(task.envs(), statistics=RunningMoments.of([1.0, 5.0]), frozen=True))
    expected = train(task, gym.make_vec("TextGen-v0", num_envs=32, **{**task.arguments(), "reward": by_hand}))
    torch.testing.assert_close(weights(wrapped), weights(expected), rtol=1e-3, atol=1e-4)
    logged, other = wrapped.logger.name_to_value, expected.logger.name_to_value
    for key in ("rollout/reward_mean", "rollout/kl_per_sequence", "rollout/shaped_reward_mean"):
        assert logged[key] == pytest.approx(other[key], rel=1e-4)
    assert logged["rewards/counting/mean"] == pytest.approx(2 * logged["rollout/reward_mean"] + 3, rel=1e-4), "parts stay as they were"


def test_clipped_rewards_are_what_is_learned_from(task: Any) -> None:
    logged = train(task, ClipReward(task.envs(), -0.5, 0.5), rollouts=1).logger.name_to_value
    plain = train(task, task.envs(), rollouts=1).logger.name_to_value
    assert logged["rewards/counting/mean"] == plain["rewards/counting/mean"]
    assert abs(logged["rollout/reward_mean"]) <= 0.5 and logged["rollout/reward_std"] <= 0.5 < plain["rollout/reward_std"]


def test_a_resumed_run_equals_an_uninterrupted_one(task: Any, tmp_path: Path) -> None:
    """The statistics are in the checkpoint."""

    def envs() -> VectorEnv:
        return ClipReward(NormalizeReward(task.envs()), -2.0, 2.0)

    whole = PPO(task.policy(), envs(), beta=0.5, learning_rate=0.01, seed=0).learn(1200)
    first = PPO(task.policy(), envs(), beta=0.5, learning_rate=0.01, seed=0).learn(600)
    first.save(tmp_path / "agent")
    resumed = PPO.load(tmp_path / "agent", env=envs(), device=task.device)
    assert find(resumed).count == find(first).count > 32
    resumed.learn(1200 - first.num_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps and find(resumed).mean == find(whole).mean
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    other = PPO.load(tmp_path / "agent", env=task.envs(), device=task.device)
    assert other.num_timesteps == first.num_timesteps, "an environment without the wrapper has nothing to restore"


def find(agent: Any) -> RunningMoments:
    from textgym.wrappers import find_normalize_reward

    (wrapper,) = find_normalize_reward(agent.vector_env)
    return wrapper.statistics
