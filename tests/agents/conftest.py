"""A small task that all agent tests share: the hard tree as an environment, and a tiny language model on it."""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import textgym  # noqa: F401  (registers the ids)
from textgym.agents.policy import CausalLMPolicy
from textgym.exact import TokenTree, hard_tree
from textgym.exact.models import tiny_lm


class CountingReward:
    """The tree's reward, counting how many completions it was asked about."""

    __name__ = "counting"

    def __init__(self, tree: TokenTree) -> None:
        self.reward, self.rows, self.calls = tree.reward_function(), 0, 0

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        self.rows, self.calls = self.rows + len(prompts), self.calls + 1
        return self.reward(prompts=prompts, completion_ids=completion_ids)


@dataclass
class Task:
    """The hard tree, and makers of what agents need on it."""

    tree: TokenTree
    device: str
    reward: CountingReward

    def policy(self, seed: int = 0, **settings: Any) -> CausalLMPolicy:
        return CausalLMPolicy(tiny_lm(self.tree, seed=seed), self.tree.tokenizer(), device=self.device, **settings)

    def arguments(self) -> dict[str, Any]:
        return {
            "prompts": self.tree.prompt_texts,
            "tokenizer": self.tree.tokenizer(),
            "reward": self.reward,
            "max_new_tokens": self.tree.horizon,
        }

    def envs(self, num_envs: int = 32, **extra: Any) -> gym.vector.VectorEnv:
        return gym.make_vec("TextGen-v0", num_envs=num_envs, **self.arguments(), **extra)

    def sync_envs(self, num_envs: int = 4, **extra: Any) -> gym.vector.VectorEnv:
        return gym.make_vec("TextGen-v0", num_envs=num_envs, vectorization_mode="sync", **self.arguments(), **extra)

    def env(self) -> gym.Env:
        return gym.make("TextGen-v0", **self.arguments())


@pytest.fixture
def task(device: str) -> Task:
    tree = hard_tree(0)
    return Task(tree, device, CountingReward(tree))


@pytest.fixture
def small_task(device: str) -> Task:
    """Seven completions a prompt: what an agent learns in seconds, whatever the seed."""
    tree = hard_tree(0, vocab_size=3, horizon=2)
    return Task(tree, device, CountingReward(tree))


class SubtractLength(gym.vector.VectorRewardWrapper):
    """A user's reward wrapper in vector form: every token costs 0.5."""

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        return rewards - 0.5


class SubtractLengthSingle(gym.RewardWrapper):
    """The same in single form."""

    def reward(self, reward: Any) -> float:
        return float(reward) - 0.5
