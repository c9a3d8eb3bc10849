"""Weights that change during a training: every rollout is paid with those of its beginning, and the agent learns what they say."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback

from textgym.agents import REINFORCE
from textgym.rewards import FineGrainedReward, Objective, TokenCount


def zeros(completion_ids: list[list[int]]) -> list[float]:
    return [float(ids.count(0)) for ids in completion_ids]


def ones(completion_ids: list[list[int]]) -> list[float]:
    return [float(ids.count(1)) for ids in completion_ids]


def objectives() -> FineGrainedReward:
    return FineGrainedReward([Objective(zeros, TokenCount(1), sees="segment"), Objective(ones, TokenCount(1), weight=0.0, sees="segment")])


class Switch(BaseCallback):
    """From some rollout on, the other objective counts."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.rollouts = after, 0
        self.seen: list[dict[str, float]] = []

    def _on_rollout_start(self) -> None:
        self.rollouts += 1
        if self.rollouts == self.after + 1:
            self.training_env.env_method("set_reward_weights", {"zeros": 0.0, "ones": 1.0})

    def _on_rollout_end(self) -> None:
        rollout = self.locals["rollout"]
        parts = [info["rewards"] for info in rollout.infos]
        weights = np.array([0.0, 1.0] if self.rollouts > self.after else [1.0, 0.0])
        expected = [np.array([part["zeros"], part["ones"]]) @ weights for part in parts]
        np.testing.assert_allclose(rollout.unshaped_returns.cpu().numpy(), expected, rtol=1e-5, atol=1e-5)
        self.seen.append({name: float(np.mean([part[name] for part in parts])) for name in ("zeros", "ones")})

    def _on_step(self) -> bool:
        return True


@pytest.mark.filterwarnings("ignore::textgym.errors.TrainingWarning")  # both objectives can be had in full
@pytest.mark.parametrize("vectorization", ["native", "sync"])
def test_a_training_follows_its_weights(small_task: Any, vectorization: str) -> None:
    arguments = small_task.arguments() | {"reward": objectives()}
    kind = {} if vectorization == "native" else {"vectorization_mode": "sync"}
    envs = gym.make_vec("TextGen-v0", num_envs=32, **arguments, **kind)
    agent = REINFORCE(small_task.policy(), envs, beta=0.5, learning_rate=0.02, seed=0)
    switch = Switch(after=20)
    agent.learn(32 * 2 * 40, callback=switch, log_interval=1000)
    assert switch.rollouts >= 40
    logged = agent.logger.name_to_value
    assert (logged["rewards/zeros/weight"], logged["rewards/ones/weight"]) == (0.0, 1.0)
    assert logged["rewards/zeros/mean"] == pytest.approx(switch.seen[-1]["zeros"])
    before, turn, after = switch.seen[0], switch.seen[20], switch.seen[-1]
    assert turn["zeros"] > before["zeros"] + 0.5, "the first objective was not learned"
    assert after["ones"] > turn["ones"] + 0.5 and after["zeros"] < turn["zeros"], "the second one was not"
