import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import textgym  # noqa: F401
from textgym.bundled import bundled_prompts, bundled_tokenizer_path
from textgym.tokenizers import load_tokenizer

IDS = sorted(spec.id for spec in gym.registry.values() if str(spec.entry_point).startswith("textgym."))


def test_the_ids() -> None:
    assert IDS == ["TextGen-v0"]


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("check", [gymnasium_check_env, sb3_check_env])
def test_checkers_have_nothing_to_say_about_the_default(env_id: str, check: Any, capsys: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(gym.make(env_id).unwrapped)
    capsys.readouterr()  # what mode "human" printed


@pytest.mark.parametrize("env_id", IDS)
def test_no_time_limit_is_part_of_the_spec(env_id: str) -> None:
    assert gym.spec(env_id).max_episode_steps is None


def test_the_default_plays_the_bundled_prompts_and_reward() -> None:
    env = gym.make("TextGen-v0")
    rows = bundled_prompts("train")
    assert env.unwrapped.prompt_set.texts == [row["prompt"] for row in rows]
    _, info = env.reset(seed=0)
    good = env.unwrapped.tokenizer(" was brilliant and i loved it.")["input_ids"]
    for token in [*good, env.unwrapped.eos_token_ids[0]]:
        _, reward, terminated, _, end = env.step(token)
    assert terminated and end["prompt"] == rows[info["prompt_index"]]["prompt"]
    assert end["rewards"] == {"film-review": reward} and np.isfinite(reward)


def test_single_and_batched_defaults_agree() -> None:
    env, envs = gym.make("TextGen-v0", max_new_tokens=3), gym.make_vec("TextGen-v0", num_envs=2, max_new_tokens=3)
    envs.reset(seed=4)
    actions = np.random.default_rng(0).integers(1, envs.unwrapped.vocab_size, (3, 2))
    rewards = sum(envs.step(action)[1] for action in actions)
    for row in range(2):
        env.reset(seed=4 + row)
        assert sum(float(env.step(action)[1]) for action in actions[:, row]) == pytest.approx(rewards[row], abs=1e-4)


def test_a_spec_is_json_where_its_arguments_are():
    spec = gym.make("TextGen-v0", reward="length", max_new_tokens=3).spec
    assert gym.make(EnvSpec.from_json(spec.to_json())).unwrapped.max_new_tokens == 3
    for make in (gym.make, gym.make_vec):
        spec = make(
            "TextGen-v0",
            prompts=["a"],
            tokenizer=load_tokenizer(bundled_tokenizer_path()),
            reward=lambda completions: [0.0] * len(completions),
        ).spec
        with pytest.raises(ValueError, match=r"`prompts` as the path of a \.jsonl file.*`tokenizer` as the folder.*`reward` as the name"):
            spec.to_json()
    assert gym.make(gym.make("TextGen-v0", prompts=["a"], reward="length").spec).unwrapped.num_prompts == 1
