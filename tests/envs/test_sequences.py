from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import textgym  # noqa: F401
from textgym.errors import EpisodeEndedError

NUM_ENVS = 4


@pytest.fixture
def make(tokenizer: Any, reward: Any) -> Any:
    def make_envs(**kwargs: Any) -> Any:
        prompts = ["w2 w3 w4", "w5", "w6 w7"]
        arguments = {"prompts": prompts, "tokenizer": tokenizer, "reward": reward, "max_new_tokens": 5, **kwargs}
        return gym.make_vec("TextGen-v0", num_envs=NUM_ENVS, **arguments)

    return make_envs


def walk(envs: Any, actions: Any, lengths: Any) -> tuple[Any, ...]:
    """What `step_sequence` means: each row is stepped until its length is used up or its episode is over, then held."""
    rewards = np.zeros(actions.shape, dtype=np.float32)
    terminated, truncated = np.zeros((2, NUM_ENVS), dtype=bool)
    used, infos = np.zeros(NUM_ENVS, dtype=np.int64), [{} for _ in range(NUM_ENVS)]
    envs.hold = True  # an episode that is over stays as it is
    for t in range(actions.shape[1]):
        active = (t < lengths) & ~terminated & ~truncated
        envs.hold_rows(~active)
        _, reward, ended, cut, info = envs.step(actions[:, t])
        if "final_info" in info:
            info = {**info, **info["final_info"]}
        rewards[:, t] = reward
        terminated |= ended
        truncated |= cut
        used += active
        for row in np.flatnonzero(active):
            infos[row] = single_info(info, row)
    envs.hold = False
    return rewards, terminated, truncated, used, infos


def single_info(info: dict[str, Any], row: int) -> dict[str, Any]:
    """The info of one row out of a vector info."""
    own: dict[str, Any] = {}
    for key, value in info.items():
        if not key.startswith(("_", "final_")) and info[f"_{key}"][row]:
            own[key] = single_info(value, row) if isinstance(value, dict) else value[row]
            own[key] = own[key].item() if isinstance(own[key], np.generic) else own[key]
    return own


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("limit", [None, 2, 5])
def test_a_sequence_is_its_steps(make: Any, mode: AutoresetMode, limit: int | None, assert_equal: Any) -> None:
    rng = np.random.default_rng(5)
    for seed in range(10):
        actions = rng.integers(0, 12, (NUM_ENVS, 7))
        lengths = rng.integers(0, 8, NUM_ENVS)
        envs = make(autoreset_mode=mode, max_episode_steps=limit)
        envs.reset(seed=seed)
        stepped = walk(envs, actions, lengths)
        after_steps = envs.np_random[0].random()
        envs.reset(seed=seed)
        result = envs.step_sequence(np.where(np.arange(7) < lengths[:, None], actions, -100), lengths)
        assert_equal(tuple(result), stepped)
        assert envs.np_random[0].random() == after_steps  # neither draws a random number
        with pytest.raises(EpisodeEndedError, match="none has begun in rows \\[0, 1, 2, 3\\]"):
            envs.step(actions[:, 0])
        with pytest.raises(EpisodeEndedError, match="freshly reset"):
            envs.step_sequence(actions, lengths)
