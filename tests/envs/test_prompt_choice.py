from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import textgym  # noqa: F401

END = 1
PROMPTS = [{"prompt": "w2 w3 w4", "answer": "a"}, {"prompt": "w5", "answer": "b"}, {"prompt": "w6 w7"}]


@pytest.fixture
def kwargs(tokenizer: Any) -> dict[str, Any]:
    def seen(prompts: list[str], completions: list[str], answer: list[Any], **columns: Any) -> list[float]:
        calls.append((list(prompts), list(answer)))
        return [0.0] * len(completions)

    calls: list[Any] = []
    return {"prompts": PROMPTS, "tokenizer": tokenizer, "reward": seen, "max_new_tokens": 3, "calls": calls}


@pytest.fixture
def calls(kwargs: dict[str, Any]) -> list[Any]:
    """What the rewards of `kwargs` were called with: prompts and answers."""
    return kwargs.pop("calls")


@pytest.fixture
def env(calls: list[Any], kwargs: dict[str, Any]) -> Any:
    return gym.make("TextGen-v0", **kwargs)


@pytest.fixture
def envs(calls: list[Any], kwargs: dict[str, Any]) -> Any:
    return gym.make_vec("TextGen-v0", num_envs=3, **kwargs)


@pytest.mark.parametrize("index", [1, np.int64(1), np.int32(1)])
def test_by_index(env: Any, index: Any, calls: list[Any]) -> None:
    assert env.reset(options={"prompt_index": index})[1] == {"prompt_index": 1}
    env.step(END)
    assert calls == [(["w5"], ["b"])]


def test_by_text(env: Any, calls: list[Any]) -> None:
    observation, info = env.reset(options={"prompt": "w8 w9"})
    assert info == {"prompt_index": -1}
    np.testing.assert_array_equal(observation["input_ids"][1:3], [8, 9])
    np.testing.assert_array_equal(observation["attention_mask"], [0, 1, 1, 0, 0, 0])
    assert env.step(END)[4]["prompt"] == "w8 w9"
    env.reset(options={"prompt": {"prompt": "w8", "answer": "c"}})
    env.step(END)
    assert calls == [(["w8 w9"], [None]), (["w8"], ["c"])]


def test_choosing_draws_no_random_number(env: Any) -> None:
    def draws(options: dict[str, Any] | None) -> list[int]:
        env.reset(seed=0, options=options)
        return [env.reset()[1]["prompt_index"] for _ in range(10)]

    assert draws({"prompt_index": 0}) == draws({"prompt": "w2"})


def test_next_prompt_index_serves_one_reset(env: Any) -> None:
    base = env.unwrapped
    base.next_prompt_index = 2
    assert base.next_prompt_index == 2
    assert env.reset()[1] == {"prompt_index": 2}
    assert base.next_prompt_index is None
    base.next_prompt_index = 2
    assert env.reset(options={"prompt_index": 0})[1] == {"prompt_index": 0}
    assert base.next_prompt_index is None


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_set_attr_of_vectorised_single_environments(vectorization: str, calls: list[Any], kwargs: dict[str, Any]) -> None:
    envs = gym.make_vec("TextGen-v0", num_envs=3, vectorization_mode=vectorization, **kwargs)
    envs.set_attr("next_prompt_index", [2, 0, 1])
    assert envs.reset()[1]["prompt_index"].tolist() == [2, 0, 1]
    assert envs.reset(options={"prompt_index": 2})[1]["prompt_index"].tolist() == [2, 2, 2]
    envs.close()


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({"prompt_index": 1}, [1, 1, 1]),
        ({"prompt_index": [2, 0, 1]}, [2, 0, 1]),
        ({"prompt_index": np.array([2, 0, 1])}, [2, 0, 1]),
        ({"prompt": "w9"}, [-1, -1, -1]),
        ({"prompt": ["w9", {"prompt": "w8"}, "w7 w7"]}, [-1, -1, -1]),
    ],
    ids=str,
)
def test_of_rows(envs: Any, options: dict[str, Any], indices: list[int]) -> None:
    _, infos = envs.reset(options=options)
    assert infos["prompt_index"].tolist() == indices
    assert infos["_prompt_index"].all()


def test_free_prompts_of_rows_reach_the_reward_in_their_places(envs: Any, calls: list[Any]) -> None:
    envs.reset(options={"prompt": [{"prompt": "w9", "answer": "c", "more": 1}, "w8", "w7 w7"]})
    envs.reset(options={"prompt_index": [0, 1, 0], "reset_mask": np.array([False, True, False])})
    observations, *_, infos = envs.step([END, END, END])
    assert infos["prompt"].tolist() == ["w9", "w5", "w7 w7"]
    assert calls == [(["w9", "w5", "w7 w7"], ["c", "b", None])]
    np.testing.assert_array_equal(observations["attention_mask"].sum(axis=1), [2, 2, 3])


def test_a_free_prompt_leaves_with_its_episode(envs: Any, calls: list[Any]) -> None:
    envs.reset(options={"prompt": "w9"})
    envs.reset(options={"prompt_index": 1})
    assert envs.step([END] * 3)[4]["prompt"].tolist() == ["w5"] * 3


def test_masked_reset_touches_nothing_else(envs: Any) -> None:
    first, _ = envs.reset(seed=0)
    envs.step([5, 6, 7])
    mask = np.array([False, True, False])
    before = [generator.bit_generator.state["state"]["state"] for generator in envs.np_random]
    options = {"reset_mask": mask, "prompt_index": [9, 1, 9]}  # the entries of other rows are not looked at
    second, infos = envs.reset(options=options)
    assert options.keys() == {"reset_mask", "prompt_index"}
    after = [generator.bit_generator.state["state"]["state"] for generator in envs.np_random]
    assert before == after
    np.testing.assert_array_equal(infos["_prompt_index"], mask)
    np.testing.assert_array_equal(
        second["attention_mask"].sum(axis=1) - first["attention_mask"].sum(axis=1), [1, 1 - first["attention_mask"][1].sum(), 1]
    )


@pytest.mark.parametrize("index", [[2, None, 1], (2, None, 1)])
def test_next_prompt_index_of_rows(envs: Any, index: Any) -> None:
    envs.next_prompt_index = index
    assert envs.next_prompt_index == (2, None, 1)
    infos = envs.reset(options={"reset_mask": np.array([True, False, False])})[1]
    assert infos["prompt_index"][0] == 2
    assert envs.next_prompt_index == (None, None, 1)
    assert envs.reset()[1]["prompt_index"][2] == 1
    assert envs.next_prompt_index is None
    envs.next_prompt_index = np.array([1, 1, 0])
    envs.next_prompt_index = 2
    assert envs.reset()[1]["prompt_index"].tolist() == [2, 2, 2]
    envs.next_prompt_index = 2
    envs.next_prompt_index = None
    assert envs.next_prompt_index is None


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_next_prompt_index_serves_automatic_resets(mode: AutoresetMode, calls: list[Any], kwargs: dict[str, Any]) -> None:
    envs = gym.make_vec("TextGen-v0", num_envs=3, autoreset_mode=mode, **kwargs)
    envs.reset()
    envs.next_prompt_index = [2, 0, 1]
    infos = envs.step([END, 5, END])[4]
    if mode == AutoresetMode.NEXT_STEP:
        infos = envs.step([5, 5, 5])[4]
    assert infos["prompt_index"].tolist() == [2, 0, 1]
    assert infos["_prompt_index"].tolist() == [True, False, True]
    assert envs.next_prompt_index == (None, 0, None)


@pytest.mark.parametrize("seed", [7, [7, 8, 9], np.int64(7)])
def test_row_i_is_seeded_with_seed_plus_i(envs: Any, env: Any, seed: Any) -> None:
    first = envs.reset(seed=seed)[1]["prompt_index"].tolist()
    again = [envs.reset()[1]["prompt_index"].tolist() for _ in range(5)]
    assert envs.np_random_seed == (7, 8, 9)
    for row in range(3):
        assert env.reset(seed=7 + row)[1]["prompt_index"] == first[row]
        assert [env.reset()[1]["prompt_index"] for _ in range(5)] == [indices[row] for indices in again]


def test_a_list_of_seeds_may_leave_rows_out(envs: Any) -> None:
    envs.reset(seed=[7, None, 9])
    assert envs.np_random_seed[::2] == (7, 9)
    before = envs.np_random[0]
    envs.reset(seed=[None, 8, None])
    assert envs.np_random[0] is before and envs.np_random_seed == (7, 8, 9)


def test_longer_prompts_keep_their_end(calls: list[Any], kwargs: dict[str, Any]) -> None:
    env = gym.make("TextGen-v0", max_prompt_tokens=2, truncate_prompts=True, **kwargs)
    observation, _ = env.reset(options={"prompt_index": 0})
    assert observation["input_ids"][:2].tolist() == [3, 4]
    observation, _ = env.reset(options={"prompt": "w2 w3 w4 w5"})
    assert observation["input_ids"][:2].tolist() == [4, 5]
    assert env.step(END)[4]["prompt"] == "w2 w3 w4 w5"  # rewards and infos see the whole text
    env = gym.make("TextGen-v0", truncate_prompts=True, **kwargs)
    observation, _ = env.reset(options={"prompt": "w2 w3 w4 w5"})
    assert observation["input_ids"][:3].tolist() == [3, 4, 5]
