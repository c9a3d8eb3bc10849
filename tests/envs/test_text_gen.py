import copy
import doctest
import pickle
import subprocess
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import DummyVecEnv

import textgym  # noqa: F401
from textgym.envs import text_gen, text_gen_vector
from textgym.envs.text_gen import TextGenEnv

END = 1


@pytest.fixture
def kwargs(tokenizer: Any, reward: Any) -> dict[str, Any]:
    return {"prompts": ["w2 w3 w4", "w5"], "tokenizer": tokenizer, "reward": reward, "max_new_tokens": 4}


@pytest.fixture
def env(kwargs: dict[str, Any]) -> Any:
    return gym.make("TextGen-v0", **kwargs)


@pytest.mark.parametrize("check", [gymnasium_check_env, sb3_check_env])
@pytest.mark.parametrize("arguments", [{}, {"max_new_tokens": 1}, {"render_mode": "ansi"}], ids=str)
def test_checkers_have_nothing_to_say(check: Any, arguments: dict[str, Any], kwargs: dict[str, Any], capsys: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(gym.make("TextGen-v0", **{**kwargs, **arguments}).unwrapped)
    capsys.readouterr()  # what mode "human" printed


@pytest.mark.parametrize("module", [text_gen, text_gen_vector])
def test_docstring_lines_are_true(module: Any, kwargs: dict[str, Any]) -> None:
    names = {"gym": gym, "tokenizer": _five_tokens(), "reward": kwargs["reward"]}
    results = doctest.testmod(module, extraglobs=names, raise_on_error=False)
    assert results.attempted >= 3 and results.failed == 0


def _five_tokens() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, "<end>": 1, "a": 2, "b": 3, "c": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


@pytest.mark.parametrize("env_class", [text_gen.TextGenEnv, text_gen_vector.TextGenVectorEnv])
def test_docstring_has_gymnasium_headings_in_order(env_class: Any) -> None:
    headings = [line.strip().removeprefix("## ") for line in env_class.__doc__.splitlines() if line.strip().startswith("## ")]
    assert headings == [
        "Description",
        "Action Space",
        "Observation Space",
        "Rewards",
        "Starting State",
        "Episode End",
        "Arguments",
        "Version History",
    ]


def test_every_constructor_argument_is_documented() -> None:
    import inspect

    for env_class in (text_gen.TextGenEnv, text_gen_vector.TextGenVectorEnv):
        documented = (text_gen.TextGenEnv.__doc__ or "") + (env_class.__doc__ or "")
        for name in inspect.signature(env_class).parameters:
            assert f"- `{name}`: " in documented


def test_one_episode(env: Any) -> None:
    observation, info = env.reset(options={"prompt_index": 1})
    assert info == {"prompt_index": 1}
    np.testing.assert_array_equal(observation["attention_mask"], [0, 0, 1, 0, 0, 0, 0])
    assert observation["input_ids"][2] == 5
    observation, reward, terminated, truncated, info = env.step(7)
    np.testing.assert_array_equal(observation["attention_mask"], [0, 0, 1, 1, 0, 0, 0])
    assert observation["input_ids"][3] == 7
    assert (reward, terminated, truncated, info) == (0.0, False, False, {})
    observation, reward, terminated, truncated, info = env.step(np.int64(END))
    np.testing.assert_array_equal(observation["input_ids"][3:5], [7, END])
    assert (terminated, truncated) == (True, False)
    assert info == {
        "prompt": "w5",
        "completion": " w7",
        "completion_ids": [7, END],
        "finish_reason": "eos",
        "rewards": {"count_reward": pytest.approx(3.08)},
    }
    assert reward == pytest.approx(3.08)
    assert [type(value) for value in (reward, terminated, truncated)] == [float, bool, bool]


def test_length_ends_the_episode_as_part_of_the_mdp(env: Any) -> None:
    env.reset()
    flags = [env.step(9)[2:4] for _ in range(4)]
    assert flags == [(False, False)] * 3 + [(True, False)]


def test_end_token_as_the_last_possible_one_is_eos(env: Any) -> None:
    env.reset()
    for _ in range(3):
        env.step(9)
    assert env.step(END)[4]["finish_reason"] == "eos"


def test_an_outer_time_limit_truncates(kwargs: dict[str, Any]) -> None:
    env = gym.make("TextGen-v0", max_episode_steps=2, **kwargs)
    env.reset()
    assert env.step(9)[2:4] == (False, False)
    _, reward, terminated, truncated, info = env.step(9)
    assert (reward, terminated, truncated, info) == (0.0, False, True, {})


def test_what_is_returned_is_the_callers_own(env: Any) -> None:
    observation, info = env.reset(seed=0, options={"prompt_index": 0})
    before = {key: value.copy() for key, value in observation.items()}
    observation["input_ids"][:] = 0
    observation["attention_mask"][:] = 0
    info.clear()
    after, *_ = env.step(9)
    prompt = slice(0, 3)
    np.testing.assert_array_equal(after["input_ids"][prompt], before["input_ids"][prompt])
    np.testing.assert_array_equal(after["attention_mask"][prompt], before["attention_mask"][prompt])


def test_same_seed_same_prompts(env: Any) -> None:
    def draws(seed: int) -> list[int]:
        first = env.reset(seed=seed)[1]["prompt_index"]
        return [first] + [env.reset()[1]["prompt_index"] for _ in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert set(draws(3)) == {0, 1}


def test_prompts_are_drawn_uniformly(tokenizer: Any, reward: Any) -> None:
    env = TextGenEnv([f"w{i}" for i in range(2, 6)], tokenizer, reward)
    env.reset(seed=0)
    counts = np.bincount([env.reset()[1]["prompt_index"] for _ in range(2000)], minlength=4)
    assert np.abs(counts - 500).max() < 4 * np.sqrt(2000 * 0.25 * 0.75)


def test_copies_share_prompts_tokenizer_and_rewards(env: Any) -> None:
    base = env.unwrapped
    for other in (copy.deepcopy(base), gym.make(env.spec).unwrapped, gym.make(copy.deepcopy(env.spec)).unwrapped):
        assert other.prompt_set is base.prompt_set
        assert other.tokenizer is base.tokenizer
        assert other._task.rewards is base._task.rewards


def test_a_copy_has_a_state_of_its_own(env: Any) -> None:
    env.reset(seed=0)
    other = copy.deepcopy(env.unwrapped)
    env.step(9)
    assert other.fresh and not env.unwrapped.fresh
    first, again = other.step(8)[0], env.unwrapped.observation_space
    assert first in again


def test_spec_of_a_changed_tokenizer_reads_the_prompts_again(env: Any, word_tokenizer: Any) -> None:
    larger = word_tokenizer(20)
    other = gym.make(env.spec, tokenizer=larger).unwrapped
    assert other.vocab_size == 20
    assert other.prompt_set.tokenizer is larger
    assert other.prompt_set.texts == env.unwrapped.prompt_set.texts


def test_reward_weights_survive_the_spec(kwargs: dict[str, Any], reward: Any) -> None:
    def other(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    env = gym.make("TextGen-v0", **{**kwargs, "reward": [reward, other], "reward_weights": [0.0, 5.0]})
    for one in (env, gym.make(env.spec)):
        one.reset()
        assert one.step(END)[1] == 5.0


def test_a_spec_of_strings_can_be_written_as_json(kwargs: dict[str, Any], tmp_path: Any) -> None:
    kwargs["tokenizer"].save_pretrained(tmp_path)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w2"}\n')
    env = gym.make("TextGen-v0", prompts=str(path), tokenizer=str(tmp_path), reward="film-review-true", max_new_tokens=3)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.max_new_tokens == 3


def test_environments_can_be_pickled(env: Any) -> None:
    env.reset(seed=0)
    again = pickle.loads(pickle.dumps(env.unwrapped))
    np.testing.assert_array_equal(again.step(9)[0]["input_ids"], env.step(9)[0]["input_ids"])


def test_attributes(env: Any, tokenizer: Any) -> None:
    base = env.unwrapped
    assert base.tokenizer is tokenizer
    assert (base.vocab_size, base.max_prompt_tokens, base.max_new_tokens) == (12, 3, 4)
    assert (base.eos_token_ids, base.num_prompts, len(base.prompt_set)) == ((END,), 2, 2)
    assert 0 <= base.fill_token_id < base.vocab_size


def test_several_end_tokens(kwargs: dict[str, Any]) -> None:
    env = gym.make("TextGen-v0", eos_token_ids=[3, 9], **kwargs)
    for token, ends in ((3, True), (9, True), (END, False)):
        env.reset()
        assert env.step(token)[2] is ends


def test_no_token_is_banned(env: Any) -> None:
    for token in range(12):
        env.reset()
        assert env.step(token)[0]["input_ids"][3] == token


def test_nothing_depends_on_the_filler(kwargs: dict[str, Any], word_tokenizer: Any) -> None:
    seen = []
    for special in ({}, {"pad_token": "w11"}, {"pad_token": "<end>"}):
        tokenizer = word_tokenizer(12, eos_token="<end>", **special)
        env = gym.make("TextGen-v0", **{**kwargs, "tokenizer": tokenizer})
        env.reset(options={"prompt_index": 1})
        env.step(2)
        observation, *rest = env.step(END)
        seen.append((np.where(observation["attention_mask"], observation["input_ids"], 0).tolist(), rest))
    assert seen[0] == seen[1] == seen[2]


def test_stepping_stock_sb3_vec_env(kwargs: dict[str, Any]) -> None:
    envs = DummyVecEnv([lambda: gym.make("TextGen-v0", **kwargs)] * 2)
    observations = envs.reset()
    assert observations["input_ids"].dtype == np.int64
    _, rewards, dones, infos = envs.step(np.array([END, 5]))
    assert dones.tolist() == [True, False]
    assert infos[0]["terminal_observation"]["input_ids"][3] == END
    assert rewards[0] > 0


def test_hold_keeps_an_ended_episode(env: Any) -> None:
    base = env.unwrapped
    base.reset(options={"prompt_index": 1})
    base.hold = True
    held, info = base.reset()
    assert info == {} and held["attention_mask"].sum() == 1  # a running episode is kept too
    last, _, ended, *_ = base.step(END)
    assert ended
    for observation, *rest in (base.step(5), base.step(-3), (*base.reset(),)):
        np.testing.assert_array_equal(observation["input_ids"], last["input_ids"])
        assert rest in ([0.0, False, False, {}], [{}])
    assert base.reset(seed=1)[1] != {}  # a reset with a seed or options is meant
    base.step(END)
    assert base.reset(options={"prompt_index": 0})[1] == {"prompt_index": 0}


def test_require_reset(env: Any) -> None:
    env.reset()
    env.unwrapped.require_reset()
    with pytest.raises(ValueError, match="call `reset` first"):
        env.step(5)


def test_making_and_stepping_loads_no_torch() -> None:
    code = """
import sys
import gymnasium as gym, textgym
assert "transformers" not in sys.modules
env = gym.make("TextGen-v0", reward=lambda completions, **columns: [0.0] * len(completions), max_new_tokens=2)
env.reset(seed=0); env.step(5); env.step(6)
envs = gym.make_vec("TextGen-v0", 2, reward=lambda completions, **columns: [0.0] * len(completions), max_new_tokens=2)
envs.reset(seed=0); envs.step([5, 5]); envs.step([6, 6])
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_the_id_works_without_importing_textgym_first() -> None:
    code = """
import gymnasium as gym
gym.make("textgym:TextGen-v0", reward="film-review-true").reset()
import importlib, textgym.envs
importlib.reload(textgym.envs)
"""
    subprocess.run([sys.executable, "-P", "-W", "error", "-c", code], check=True)
