"""Every misuse ends in one clear `ValueError` that names the argument, the value and what to do."""

import re
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import textgym  # noqa: F401
from textgym.errors import EpisodeEndedError, RewardError
from textgym.rewards.compose import RewardSet

NUM_ENVS = 2


@pytest.fixture(params=["single", "vector"])
def make(request: Any, tokenizer: Any, reward: Any) -> Any:
    """Makes a single or a vector environment; arguments of its own can be replaced."""

    def make_env(**kwargs: Any) -> Any:
        arguments = {"prompts": ["w2 w3", "w4"], "tokenizer": tokenizer, "reward": reward, "max_new_tokens": 3, **kwargs}
        vector = request.param == "vector"
        return gym.make_vec("TextGen-v0", NUM_ENVS, **arguments) if vector else gym.make("TextGen-v0", **arguments).unwrapped

    make_env.vector = request.param == "vector"  # type: ignore[attr-defined]
    return make_env


def expect(*parts: str) -> Any:
    """Expects a `ValueError` whose message has all `parts` in this order."""
    return pytest.raises(ValueError, match=".*".join(re.escape(part) for part in parts))


CONSTRUCTOR = [
    ({"prompts": []}, ("`prompts` must hold at least one prompt", "got none")),
    ({"prompts": 3}, ("`prompts` must be a list of strings", "got int")),
    ({"prompts": "w2 w3"}, ("`prompts`", "must end in .jsonl", "'w2 w3'", "pass one prompt as a list")),
    ({"prompts": "missing.jsonl"}, ("`prompts`", "must be a file", "missing.jsonl")),
    ({"prompts": [{"text": "w2"}]}, ("row 0 of `prompts`", '"prompt" column', "['text']")),
    ({"prompts": ["w2", 5]}, ("row 1 of `prompts`", "must be a string", "got 5")),
    ({"prompts": ["w2", ""]}, ("row 1 of `prompts`", "at least one token", "''", "bos_token")),
    ({"prompts": ["w2", []]}, ("row 1 of `prompts`", "non-empty list", "got []")),
    ({"prompts": [[{"role": "user"}]]}, ("row 0 of `prompts`", '"role" and "content"')),
    ({"prompts": [[{"role": "user", "content": "w2"}]]}, ("row 0 of `prompts`", "no chat template", "tokenizer.chat_template")),
    (
        {"prompts": ["w2 w3", "w4", "w5 w6 w7"], "max_prompt_tokens": 1},
        ("`max_prompt_tokens` = 1", "row 0 (2 tokens), row 2 (3 tokens)", "the longest needs 3", "truncate_prompts=True"),
    ),
    ({"max_prompt_tokens": 0}, ("`max_prompt_tokens` must be an integer of at least 1", "got 0")),
    ({"max_prompt_tokens": 2.0}, ("`max_prompt_tokens` must be an integer of at least 1", "got 2.0")),
    ({"max_new_tokens": 0}, ("`max_new_tokens` must be an integer of at least 1", "got 0")),
    ({"max_new_tokens": True}, ("`max_new_tokens` must be an integer of at least 1", "got True")),
    ({"max_new_tokens": None}, ("`max_new_tokens` must be an integer of at least 1", "got None")),
    ({"truncate_prompts": "yes", "max_prompt_tokens": 4}, ("`truncate_prompts` must be True or False", "'yes'")),
    ({"tokenizer": 5}, ("`tokenizer` must be a transformers tokenizer", "got int", "PreTrainedTokenizerFast(tokenizer_object=")),
    ({"tokenizer": "no/such/folder/anywhere"}, ("`tokenizer` must be", "'no/such/folder/anywhere'")),
    ({"eos_token_ids": []}, ("`eos_token_ids` must name at least one token",)),
    ({"eos_token_ids": 12}, ("`eos_token_ids` must be token ids from 0 to 11", "got 12")),
    ({"eos_token_ids": [1, -1]}, ("`eos_token_ids` must be token ids from 0 to 11", "got -1")),
    ({"eos_token_ids": "<end>"}, ("`eos_token_ids` must be token ids from 0 to 11", "got '<'")),
    ({"reward": []}, ("`reward` must not be an empty list",)),
    ({"reward_weights": [1.0, 2.0]}, ("`reward_weights` must hold one number per reward", "1 rewards")),
    ({"reward": 7}, ("reward", "7")),
]


@pytest.mark.parametrize(("arguments", "parts"), CONSTRUCTOR, ids=lambda value: str(value)[:50] if isinstance(value, dict) else "")
def test_constructor(make: Any, arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    with expect(*parts):
        make(**arguments)


def test_stock_sb3_makes_the_environment_by_its_id(tokenizer: Any, reward: Any) -> None:
    """It asks every environment for "rgb_array"."""
    from stable_baselines3.common.base_class import maybe_make_env

    assert maybe_make_env("TextGen-v0", verbose=0).unwrapped.render_mode == "rgb_array"


def test_unknown_render_mode(tokenizer: Any, reward: Any) -> None:
    from textgym.envs.text_gen import TextGenEnv
    from textgym.envs.text_gen_vector import TextGenVectorEnv

    for env_class in (TextGenEnv, TextGenVectorEnv):
        with expect("`render_mode` must be None or one of ['ansi', 'human', 'rgb_array']", "'video'"):
            env_class(prompts=["w2"], tokenizer=tokenizer, reward=reward, render_mode="video")


def test_tokenizer_without_an_end(make: Any, word_tokenizer: Any) -> None:
    tokenizer = word_tokenizer(12, unk_token="w0")
    with expect("`eos_token_ids` must name at least one token", "pass `eos_token_ids=[...]` or set `tokenizer.eos_token`"):
        make(tokenizer=tokenizer)
    assert make(tokenizer=tokenizer, eos_token_ids=3).unwrapped.eos_token_ids == (3,)


def test_tokenizer_whose_ids_have_holes(make: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1, "z": 9}, unk_token="a"))
    with expect("row 0 of `prompts`", "token id 9", "`len(tokenizer)` is 3"):
        make(prompts=["z"], tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>"))


def test_weights_of_a_reward_set(make: Any, reward: Any) -> None:
    with expect("`reward_weights`"):
        make(reward=RewardSet.build(reward), reward_weights=[2.0])


OPTIONS = [
    ({"prompt_index": 2}, ('`options["prompt_index"]` must be an integer from 0 to 1', "there are 2 prompts", "got 2")),
    ({"prompt_index": -1}, ('`options["prompt_index"]` must be an integer from 0 to 1', "got -1")),
    ({"prompt_index": "0"}, ('`options["prompt_index"]`', "got '0'")),
    ({"prompt_index": True}, ('`options["prompt_index"]`', "got True")),
    ({"prompt_index": 1.0}, ('`options["prompt_index"]`', "got 1.0")),
    ({"prompt": ""}, ('`options["prompt"]` must have at least one token',)),
    ({"prompt": 5}, ('`options["prompt"]` must be a string', "got 5")),
    ({"prompt": "w2 w3 w4"}, ('`options["prompt"]` must have at most `max_prompt_tokens` = 2 tokens, got 3', "truncate_prompts=True")),
    ({"prompt": "w2", "prompt_index": 0}, ('`options` must have either "prompt_index" or "prompt", got both',)),
    ({"prompt_idx": 0}, ("`options` may have the keys prompt_index, prompt", "got 'prompt_idx'")),
    ([("prompt_index", 0)], ("`options` must be None or a dict, got list",)),
]


@pytest.mark.parametrize(("options", "parts"), OPTIONS, ids=lambda value: str(value)[:50] if not isinstance(value, tuple) else "")
def test_options(make: Any, options: Any, parts: tuple[str, ...]) -> None:
    env = make()
    env.reset(seed=0)
    before = [np.copy(one) for one in env.unwrapped._rows.observe().values()]
    with expect(*parts):
        env.reset(options=options)
    for one, other in zip(before, env.unwrapped._rows.observe().values(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("seed", [-1, 1.5, "1", True])
def test_seed(make: Any, seed: Any) -> None:
    with expect("`seed` must be None or an integer of at least 0", f"got {seed!r}"):
        make().reset(seed=seed)


@pytest.mark.parametrize("index", [2, -1, "1", 1.0])
def test_next_prompt_index(make: Any, index: Any) -> None:
    with expect("`next_prompt_index` must be an integer from 0 to 1", f"got {index!r}"):
        make().next_prompt_index = index


def test_stepping_before_the_first_reset(make: Any) -> None:
    with pytest.raises(EpisodeEndedError, match=r"none has begun.*call `reset` first"):
        make().step(np.zeros(NUM_ENVS, dtype=int) if make.vector else 0)


def test_rendering_before_the_first_reset(make: Any) -> None:
    with pytest.raises(EpisodeEndedError, match=r"`render` needs an episode.*call `reset` first"):
        make(render_mode="ansi").render()


def test_rendering_without_a_mode(make: Any) -> None:
    env = make()
    env.reset()
    with pytest.warns(UserWarning, match="needs a render mode"):
        assert env.render() is None


@pytest.mark.parametrize("action", [12, -1, 5.0, "w5", None, True, np.array([5]), np.array(5.0), np.float32(5), [5]], ids=repr)
def test_action_of_a_single_environment(action: Any, tokenizer: Any, reward: Any) -> None:
    env = gym.make("TextGen-v0", prompts=["w2"], tokenizer=tokenizer, reward=reward).unwrapped
    env.reset()
    with expect("`action` must be ", "got"):
        env.step(action)
    assert env.fresh  # nothing happened
    env.step(np.array(5))
    env.step(np.int32(5))
    env.step(np.uint8(5))


def test_stepping_after_the_end_of_a_single_episode(tokenizer: Any, reward: Any) -> None:
    env = gym.make("TextGen-v0", prompts=["w2"], tokenizer=tokenizer, reward=reward, max_new_tokens=1)
    env.reset()
    env.step(5)
    with pytest.raises(EpisodeEndedError, match="has ended; call `reset` first"):
        env.step(5)


# What only a vector environment can be told


@pytest.fixture
def make_vec(tokenizer: Any, reward: Any) -> Any:
    def make_envs(**kwargs: Any) -> Any:
        arguments = {"prompts": ["w2 w3", "w4"], "tokenizer": tokenizer, "reward": reward, "max_new_tokens": 2, **kwargs}
        return gym.make_vec("TextGen-v0", **{"num_envs": NUM_ENVS, **arguments})

    return make_envs


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"num_envs": 0}, ("`num_envs` must be an integer of at least 1", "got 0")),
        ({"max_episode_steps": 0}, ("`max_episode_steps` must be an integer of at least 1", "got 0")),
        ({"autoreset_mode": "never"}, ("`autoreset_mode` must be an AutoresetMode or one of", "'never'")),
    ],
)
def test_vector_constructor(make_vec: Any, arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    with expect(*parts):
        make_vec(**arguments)


@pytest.mark.parametrize(
    ("actions", "shown"),
    [
        ([5], "shape (1,)"),
        (5, "shape ()"),
        (np.full((2, 1), 5), "shape (2, 1)"),
        ([5.0, 5.0], "dtype float64"),
        ([True, False], "dtype bool"),
        ([5, 12], "got 12 in row 1"),
        ([-1, 5], "got -1 in row 0"),
    ],
    ids=str,
)
def test_actions(make_vec: Any, actions: Any, shown: str) -> None:
    envs = make_vec()
    envs.reset()
    with expect("`actions` must be", shown):
        envs.step(actions)
    assert envs.fresh.all()


def test_actions_of_rows_that_are_reset_are_ignored(make_vec: Any) -> None:
    envs = make_vec()
    envs.reset()
    envs.step([1, 5])
    envs.step([-100, 5])


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
def test_stepping_ended_rows(make_vec: Any, mode: AutoresetMode) -> None:
    envs = make_vec(autoreset_mode=mode)
    envs.reset()
    envs.hold = True
    envs.step([5, 1])
    envs.hold = False
    with pytest.raises(EpisodeEndedError, match=r"those of rows \[1\] have ended .*reset_mask"):
        envs.step([5, 5])
    envs.reset(options={"reset_mask": np.array([False, True])})
    envs.step([5, 5])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"reset_mask": [True, False]}, ('`options["reset_mask"]` must be a bool numpy array of shape (2,)',)),
        ({"reset_mask": np.array([1, 0])}, ('`options["reset_mask"]` must be a bool numpy array', "dtype int64")),
        ({"reset_mask": np.array([True])}, ('`options["reset_mask"]` must be a bool numpy array', "shape (1,)")),
        ({"reset_mask": np.array([False, False])}, ('`options["reset_mask"]` must have at least one True',)),
        ({"prompt_index": [0, 1, 0]}, ('`options["prompt_index"]` must be one number or one per row', "got 3")),
        ({"prompt_index": [0, 7]}, ('`options["prompt_index"][1]` must be an integer from 0 to 1', "got 7")),
        ({"prompt": ["w2", "w3", "w4"]}, ('`options["prompt"]` must be one prompt or a list of one per row', "got 3")),
        ({"prompt": []}, ('`options["prompt"]`', "got []")),
    ],
    ids=str,
)
def test_vector_options(make_vec: Any, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    envs = make_vec()
    envs.reset()
    with expect(*parts):
        envs.reset(options=options)


@pytest.mark.parametrize(("seed", "parts"), [([1], ("`seed` given as a list", "got 1 seeds")), ([1, -2], ("`seed[1]` must be", "got -2"))])
def test_vector_seeds(make_vec: Any, seed: Any, parts: tuple[str, ...]) -> None:
    with expect(*parts):
        make_vec().reset(seed=seed)


@pytest.mark.parametrize("mask", [[True, False], np.array([1, 0]), np.array([True])])
def test_hold_rows(make_vec: Any, mask: Any) -> None:
    with expect("`mask` must be a bool numpy array of shape (2,)"):
        make_vec().hold_rows(mask)


@pytest.mark.parametrize(
    ("actions", "lengths", "parts"),
    [
        (np.zeros((1, 2), int), [1, 1], ("`actions` must be integer token ids of shape (2, T)", "shape (1, 2)")),
        (np.zeros(2, int), [1, 1], ("`actions` must be integer token ids of shape (2, T)", "shape (2,)")),
        (np.zeros((2, 2)), [1, 1], ("`actions` must be integer token ids", "dtype float64")),
        (np.zeros((2, 2), int), [1], ("`lengths` must be 2 integers", "shape (1,)")),
        (np.zeros((2, 2), int), [1.0, 1.0], ("`lengths` must be 2 integers", "dtype float64")),
        (np.zeros((2, 2), int), [1, 3], ("`lengths` must be from 0 to 2", "got 3 in row 1")),
        (np.zeros((2, 2), int), [-1, 1], ("`lengths` must be from 0 to 2", "got -1 in row 0")),
        (np.array([[2, 3], [2, 12]]), [2, 2], ("`actions` must be token ids from 0 to 11", "got 12 in row 1, step 1")),
    ],
)
def test_step_sequence(make_vec: Any, actions: Any, lengths: Any, parts: tuple[str, ...]) -> None:
    envs = make_vec()
    envs.reset()
    with expect(*parts):
        envs.step_sequence(actions, np.array(lengths))
    envs.step_sequence(np.full((2, 2), 5), np.array([2, 2]))  # nothing had happened


# Rewards


@pytest.mark.parametrize(
    ("result", "parts"),
    [
        ([float("nan")], ("broken", "row 0", "w2 w3", "w5")),
        ([1.0] * 5, ("broken", "5")),
        ([None], ("broken", "None", "row 0", "w5")),
        (["good"], ("broken", "'good'", "row 0", "w5")),
        (3.0, ("broken",)),
    ],
    ids=str,
)
def test_reward_problems_name_function_row_and_text(result: Any, parts: tuple[str, ...], tokenizer: Any) -> None:
    def broken(completions: list[str], **columns: Any) -> Any:
        return result

    env = gym.make("TextGen-v0", prompts=["w2 w3"], tokenizer=tokenizer, reward=broken)
    env.reset()
    env.step(5)
    with pytest.raises(RewardError, match="(?s)" + ".*".join(re.escape(part) for part in parts)):
        env.step(1)


def test_prompt_set_of_a_column_that_rewards_use_otherwise(tokenizer: Any, reward: Any) -> None:
    with expect("`prompts`", "'completions'", "rename"):
        gym.make("TextGen-v0", prompts=[{"prompt": "w2", "completions": 1}], tokenizer=tokenizer, reward=reward)
    env = gym.make("TextGen-v0", prompts=["w2"], tokenizer=tokenizer, reward=reward)
    with expect('`options["prompt"]`', "'completion_ids'", "rename"):
        env.reset(options={"prompt": {"prompt": "w2", "completion_ids": 1}})
