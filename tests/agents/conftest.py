"""What agent tests share: a small task (the hard tree as an environment, and a tiny language model on it), and a recorder of steps."""

import contextlib
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import textgym  # noqa: F401  (registers the ids)
from textgym.agents.common import captured_step
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


class Borrowed:
    """A tensor in memory of somebody else's, whose life it does not prolong."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.place = tensor.dtype, (tensor.storage_offset(), tensor.shape, tensor.stride())

    def tensor(self) -> torch.Tensor:
        assert not self.storage.expired(), "a replay uses memory that has been freed"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Recorder(TorchDispatchMode):
    """Writes down every operation with the memory it was given; replaying computes on this memory again, and on nothing else.

    As with a graph, memory that was allocated on the way belongs to the recording, and all other must be kept alive by others.
    """

    def __init__(self):
        super().__init__()
        self.operations = []
        self.own = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_map_only(torch.Tensor, self.frozen, (args, kwargs or {}))
        inputs = {tensor.untyped_storage().data_ptr() for tensor in tree_flatten((args, kwargs))[0] if isinstance(tensor, torch.Tensor)}
        results = func(*args, **(kwargs or {}))
        outputs = [tensor.detach() for tensor in tree_flatten(results)[0] if isinstance(tensor, torch.Tensor)]
        fresh = {tensor.untyped_storage().data_ptr() for tensor in outputs} - inputs
        self.own |= fresh
        if func._schema.is_mutable or fresh:  # a view needs no computing
            self.operations.append((func, *given, [] if func._schema.is_mutable else outputs))
        return results

    def frozen(self, tensor):
        return tensor.detach() if tensor.untyped_storage().data_ptr() in self.own else Borrowed(tensor)

    @torch.inference_mode()
    def replay(self):
        for func, *given, outputs in self.operations:
            args, kwargs = tree_map_only(Borrowed, Borrowed.tensor, tuple(given))
            results = [tensor for tensor in tree_flatten(func(*args, **kwargs))[0] if isinstance(tensor, torch.Tensor)]
            for output, result in zip(outputs, results, strict=bool(outputs)):
                output.copy_(result)


class Captures:
    """Captures steps on the CPU, and counts captures and replays."""

    recorder = Recorder

    def __init__(self):
        self.captured = self.replayed = 0

    def capture(self, step):
        self.captured += 1
        recorder, first = Recorder(), [step]

        def replay():
            self.replayed += 1
            if first:
                # A capture computes nothing; this one does, and so it is the first replay.
                with recorder:
                    first.pop()()
            else:
                recorder.replay()

        return replay

    @contextlib.contextmanager
    def off(self):
        capture = captured_step.CAPTURES.pop("cpu")
        yield
        captured_step.CAPTURES["cpu"] = capture

    def check(self, policy, *arguments, tolerance=5e-5, **settings):
        """Compares with what is found without capturing; returns that and the number of captures."""
        before, replayed = self.captured, self.replayed
        found = policy.generate(*arguments, **settings)
        captured = self.captured - before
        with self.off():
            expected = policy.generate(*arguments, **settings)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.lengths, expected.lengths)
        torch.testing.assert_close(found.log_probs, expected.log_probs, atol=tolerance, rtol=0)
        assert (self.replayed > replayed) == (policy.backbone.fast_trunk is not None)
        return expected, captured


@pytest.fixture
def captures(monkeypatch):
    """See `Captures`."""
    counts = Captures()
    monkeypatch.setitem(captured_step.CAPTURES, "cpu", counts.capture)
    return counts
