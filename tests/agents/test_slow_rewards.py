"""Rewards that are waited for: the next completions are sampled meanwhile, where the order allows it, and the numbers are the same."""

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from textgym.agents import PPO, CausalLMPolicy, compare_policies, keep_best
from textgym.agents.common.evaluation import evaluate_policy
from textgym.rewards import InBackground


class SlowReward:
    """The tree's reward, which answers when sampling has gone on: the answer to call i waits for `generate` number i + 1.

    Whoever waits for an answer before sampling on waits for ever, that is 20 seconds.
    """

    __name__ = "slow"

    def __init__(self, task: Any, last: int) -> None:
        self.reward, self.last = task.tree.reward_function(), last
        self.called = self.generated = self.cancelled = 0

    async def __call__(self, prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        self.called += 1
        waits_for = min(self.called + 1, self.last)
        try:
            async with asyncio.timeout(20):
                while self.generated < waits_for:
                    await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.reward(prompts=prompts, completion_ids=completion_ids)


@pytest.fixture
def slow(task: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a slow reward for a test in which `generate_ids` is called `last` times."""

    def make(last: int) -> SlowReward:
        reward, generate_ids = SlowReward(task, last), CausalLMPolicy.generate_ids

        def counted(*args: Any, **kwargs: Any) -> Any:
            reward.generated += 1
            return generate_ids(*args, **kwargs)

        monkeypatch.setattr(CausalLMPolicy, "generate_ids", counted)
        return reward

    return make


def parameters(agent: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in agent.trainable_parameters()])


def train(task: Any, reward: Any, callback: Any = None) -> PPO:
    task.reward = reward
    return PPO(task.policy(), task.envs(8), rollout_size=32, learning_rate=1e-3, seed=1).learn(1, callback)


def test_a_rollout_of_several_walks_samples_on(task: Any, slow: Any) -> None:
    expected = parameters(train(task, task.tree.reward_function()))
    reward = slow(4)
    assert torch.equal(parameters(train(task, reward)), expected)
    assert (reward.called, reward.generated) == (4, 4)


def test_a_function_in_a_thread_changes_nothing(task: Any) -> None:
    expected = parameters(train(task, task.tree.reward_function()))
    assert torch.equal(parameters(train(task, InBackground(task.tree.reward_function()))), expected)


class Rewards(BaseCallback):
    """Notes what it is told, and may stop."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.told, self.stop_at = [], stop_at

    def _on_step(self) -> bool:
        self.told.append((self.locals["actions"].copy(), self.locals["rewards"].copy(), self.locals["dones"].copy(), self.num_timesteps))
        return self.stop_at is None or len(self.told) < self.stop_at


def test_callbacks_hear_the_same_in_the_same_order(task: Any, slow: Any) -> None:
    plain, late = Rewards(), Rewards()
    train(task, task.tree.reward_function(), plain)
    train(task, slow(4), late)
    assert len(plain.told) == len(late.told)
    for one, other in zip(plain.told, late.told, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_callback_that_stops_leaves_no_reward_running(task: Any, slow: Any) -> None:
    reward = slow(4)
    agent = train(task, reward, Rewards(stop_at=1))
    assert agent.num_timesteps == 8 and reward.generated == 2
    for _ in range(20_000):
        if reward.cancelled:
            break
        time.sleep(0.001)
    assert (reward.called, reward.cancelled) == (2, 1)


def test_evaluation_samples_on(task: Any, slow: Any) -> None:
    policy = task.policy()
    task.reward = task.tree.reward_function()
    expected = evaluate_policy(policy, task.envs(8), task.policy(1), episodes=20)
    task.reward = slow(3)
    found = evaluate_policy(policy, task.envs(8), task.policy(1), episodes=20)
    np.testing.assert_array_equal(found.rewards, expected.rewards)
    assert (task.reward.called, task.reward.generated) == (3, 3)


def test_rejection_sampling_samples_on(task: Any, slow: Any) -> None:
    policy, prompts = task.policy(), [*task.tree.prompt_texts] * 3
    settings = {"n": 2, "batch_size": 3, "seed": 0, "max_new_tokens": task.tree.horizon}
    expected = keep_best(policy, prompts, task.tree.reward_function(), **settings)
    batches = -(-len(prompts) // 3)
    reward = slow(batches)
    found = keep_best(policy, prompts, reward, **settings)
    assert found.examples == expected.examples and (reward.called, reward.generated) == (batches, batches) and batches > 2


def test_a_comparison_samples_the_other_side_meanwhile(task: Any, slow: Any) -> None:
    arguments = {"against": task.policy(1), "reference": task.policy(2), "max_new_tokens": task.tree.horizon}
    expected = compare_policies(task.policy(), task.tree.prompt_texts, reward=task.tree.reward_function(), **arguments)
    reward = slow(2)
    found = compare_policies(task.policy(), task.tree.prompt_texts, reward=reward, **arguments)
    assert found.to_dict() == expected.to_dict() and (reward.called, reward.generated) == (2, 2)
