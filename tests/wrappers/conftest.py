from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import textgym  # noqa: F401

V, T = 12, 5


def _reward(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [len(p) + sum((t + 1) * i for t, i in enumerate(ids)) / 7 for p, ids in zip(prompts, completion_ids, strict=True)]


@pytest.fixture(scope="session")
def arguments() -> dict[str, Any]:
    """A text environment of 12 words, of which `w1` ends a text; prompts of different lengths; at most 5 tokens."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")
    return {"prompts": ["w2 w3 w4", "w5", "w6 w7"], "tokenizer": fast, "reward": _reward, "max_new_tokens": T}


@pytest.fixture
def make_env(arguments: dict[str, Any]) -> Callable[..., gym.Env]:
    return lambda **kwargs: gym.make("TextGen-v0", **{**arguments, **kwargs})


@pytest.fixture
def make_envs(arguments: dict[str, Any]) -> Callable[..., Any]:
    return lambda num_envs=3, **kwargs: gym.make_vec("TextGen-v0", num_envs=num_envs, **{**arguments, **kwargs})


@pytest.fixture(scope="session")
def hand() -> Callable[..., np.ndarray]:
    """Log-ratios of a completion, computed from the two policies' tables: `hand(policy, reference, prompt, tokens)`."""

    def log_ratios(policy: Any, reference: Any, prompt: list[int], tokens: list[int]) -> np.ndarray:
        prefixes = [[*prompt, *tokens[:t]] for t in range(len(tokens))]
        return np.array([policy.distribution(p)[a] - reference.distribution(p)[a] for p, a in zip(prefixes, tokens, strict=True)])

    return log_ratios
