"""Stable-Baselines3's policies as policies of KL shaping."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from textgym.vec_env_adapter import StableBaselinesVecEnv
from textgym.wrappers import ActorCriticAdapter
from textgym.wrappers.vector import KLShaping


@pytest.fixture
def shaped(make_envs: Any) -> tuple[PPO, KLShaping]:
    envs = KLShaping(make_envs(), beta=0.5, full_kl=True)
    model = PPO("MultiInputPolicy", StableBaselinesVecEnv(envs), n_steps=16, batch_size=12, n_epochs=2, learning_rate=0.05, seed=0)
    envs.set_policy(ActorCriticAdapter(model.policy))
    envs.set_reference(ActorCriticAdapter(model.policy).frozen_copy())
    return model, envs


def test_log_probs_are_those_of_the_policy(shaped: tuple[PPO, KLShaping]) -> None:
    model, envs = shaped
    observations, _ = envs.reset(seed=0)
    actions = np.array([3, 4, 5])
    model.policy.set_training_mode(True)
    mine = ActorCriticAdapter(model.policy).log_probs(observations, actions)
    assert model.policy.training, "the policy's mode was not put back"
    with torch.no_grad():
        tensors, _ = model.policy.obs_to_tensor(observations)
        _, theirs, _ = model.policy.evaluate_actions(tensors, torch.tensor(actions))
    np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-5)


def test_stock_ppo_learns_under_a_penalty_that_follows_it(shaped: tuple[PPO, KLShaping]) -> None:
    model, envs = shaped
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []

    def note(local: dict[str, Any], _: Any) -> bool:
        ends = [info for info in local["infos"] if "kl_per_sequence" in info]
        first.extend(ends if not model.policy.optimizer.state else [])
        last[:] = ends or last
        return True

    model.learn(16 * 3 * 4, callback=note)
    assert first and all(info["kl_per_sequence"] == 0.0 == info["kl_full_per_sequence"] for info in first), "before any update π is π_ref"
    assert all(info["kl_full_per_sequence"] > 0 for info in last)
    assert envs.reference.policy is not model.policy


def test_it_needs_a_discrete_action_space() -> None:
    model = PPO("MlpPolicy", DummyVecEnv([lambda: gym.make("Pendulum-v1")]), n_steps=8, batch_size=8)
    with pytest.raises(ValueError, match="`Discrete`"):
        ActorCriticAdapter(model.policy).log_probs(np.zeros((1, 3), dtype=np.float32), np.zeros(1, dtype=np.int64))
