from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import textgym  # noqa: F401

NUM_ENVS = 3
MODES = list(AutoresetMode)


@pytest.fixture
def kwargs(tokenizer: Any, reward: Any) -> dict[str, Any]:
    prompts = [{"prompt": "w2 w3 w4", "answer": 1}, {"prompt": "w5", "answer": 2}, {"prompt": "w6 w7"}]
    return {"prompts": prompts, "tokenizer": tokenizer, "reward": reward, "max_new_tokens": 4}


def make_pair(mode: AutoresetMode, kwargs: dict[str, Any], vectorization: str = "sync") -> tuple[Any, Any]:
    native = gym.make_vec("TextGen-v0", num_envs=NUM_ENVS, autoreset_mode=mode, **kwargs)
    others = gym.make_vec(
        "TextGen-v0", num_envs=NUM_ENVS, vectorization_mode=vectorization, vector_kwargs={"autoreset_mode": mode}, **kwargs
    )
    return native, others


def play(envs: Any, mode: AutoresetMode, steps: int, seed: int = 3) -> list[Any]:
    """Everything that an environment returns over some steps of actions that do not depend on it."""
    rng = np.random.default_rng(seed)
    seen: list[Any] = [envs.reset(seed=seed)]
    for _ in range(steps):
        seen.append(envs.step(rng.integers(0, 12, envs.num_envs) % 8))
        over = seen[-1][2] | seen[-1][3]
        if mode == AutoresetMode.DISABLED and over.any():
            seen.append(envs.reset(options={"reset_mask": over}))
    envs.close()
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [{}, {"max_episode_steps": 3}], ids=["", "time limit"])
def test_native_is_sync(mode: AutoresetMode, limit: dict[str, int], kwargs: dict[str, Any], assert_equal: Any) -> None:
    native, sync = make_pair(mode, {**kwargs, **limit})
    assert native.observation_space == sync.observation_space
    assert native.action_space == sync.action_space
    assert native.single_observation_space == sync.single_observation_space
    assert native.single_action_space == sync.single_action_space
    assert native.metadata == sync.metadata
    assert_equal(play(native, mode, 40), play(sync, mode, 40))


@pytest.mark.parametrize("mode", MODES)
def test_native_is_async(mode: AutoresetMode, kwargs: dict[str, Any], assert_equal: Any) -> None:
    native, workers = make_pair(mode, kwargs, "async")
    assert_equal(play(native, mode, 12), play(workers, mode, 12))
