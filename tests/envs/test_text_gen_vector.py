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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "wrapper", [gym.wrappers.vector.RecordEpisodeStatistics, gym.wrappers.vector.DictInfoToList, gym.wrappers.vector.NormalizeReward]
)
def test_gymnasiums_vector_wrappers_see_no_difference(wrapper: Any, mode: AutoresetMode, kwargs: dict[str, Any], assert_equal: Any) -> None:
    if wrapper is gym.wrappers.vector.RecordEpisodeStatistics and mode == AutoresetMode.DISABLED:
        pytest.skip("with a sync vector environment, which takes the mask out of the options, it loses the other rows' statistics")
    seen = []
    for envs in make_pair(mode, kwargs):
        played = play(wrapper(envs), mode, 20)
        for result in played:  # the time an episode took is not compared
            for info in result[-1] if isinstance(result[-1], list) else [result[-1]]:
                for final in (info, info.get("final_info", {})):
                    final.get("episode", {}).pop("t", None)
        seen.append(played)
    assert_equal(*seen)


def test_episode_statistics_outlive_the_reset_of_other_rows(kwargs: dict[str, Any]) -> None:
    envs = gym.make_vec("TextGen-v0", num_envs=NUM_ENVS, autoreset_mode="Disabled", **kwargs)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    options = {"reset_mask": np.array([True, False, False])}
    envs.reset(seed=0)
    envs.step([1, 5, 5])
    envs.reset(options=options)
    *_, infos = envs.step([5, 1, 5])
    assert infos["episode"]["l"].tolist() == [0, 2, 0]


def test_a_spec_makes_the_same_again(kwargs: dict[str, Any], assert_equal: Any) -> None:
    native = gym.make_vec("TextGen-v0", num_envs=NUM_ENVS, autoreset_mode="SameStep", **kwargs)
    again = gym.make_vec(native.spec)
    assert again.num_envs == NUM_ENVS and again.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert again.unwrapped.prompt_set is native.unwrapped.prompt_set
    assert_equal(play(native, AutoresetMode.SAME_STEP, 10), play(again, AutoresetMode.SAME_STEP, 10))


def test_no_time_limit_can_be_said_in_gymnasiums_way(kwargs: dict[str, Any]) -> None:
    assert gym.make_vec("TextGen-v0", num_envs=1, max_episode_steps=-1, **kwargs).unwrapped.max_episode_steps is None


def test_returned_arrays_are_the_callers_own(kwargs: dict[str, Any]) -> None:
    envs = gym.make_vec("TextGen-v0", num_envs=NUM_ENVS, **kwargs)
    results = [envs.reset(seed=0), envs.step([5, 1, 5]), envs.step([5, 5, 1]), envs.step([5, 5, 5])]
    arrays = [[array for part in result for array in _arrays(part)] for result in results]
    for i, ours in enumerate(arrays):
        for theirs in arrays[i + 1 :]:
            assert not any(np.shares_memory(one, other) for one in ours for other in theirs)
        assert all(not np.shares_memory(one, other) for j, one in enumerate(ours) for other in ours[j + 1 :])


def _arrays(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [array for inner in value.values() for array in _arrays(inner)]
    return [value] if isinstance(value, np.ndarray) else []


def test_held_rows_stay_as_they_are(kwargs: dict[str, Any]) -> None:
    envs = gym.make_vec("TextGen-v0", num_envs=NUM_ENVS, **kwargs)
    before, _ = envs.reset(seed=0)
    mask = np.array([False, True, False])
    envs.hold_rows(mask)
    mask[:] = True  # the caller's own
    observations, rewards, terminated, truncated, infos = envs.step([1, -7, 5])
    np.testing.assert_array_equal(observations["input_ids"][1], before["input_ids"][1])
    assert (rewards[1], terminated[1], truncated[1]) == (0.0, False, False)
    assert not infos["_completion"][1] and infos["_completion"][0]
    envs.hold_rows(np.array([True, True, False]))  # row 0 has ended: no automatic reset
    states = [generator.bit_generator.state["state"] for generator in envs.np_random]
    *_, infos = envs.step([5, 5, 5])
    assert (
        not infos.pop("_prompt_index").any()
        and infos.keys() == {"prompt_index"}
        and states == [generator.bit_generator.state["state"] for generator in envs.np_random]
    )
    assert envs.fresh.tolist() == [False, False, False]
    envs.hold_rows(None)
    *_, infos = envs.step([5, 5, 5])
    assert infos["_prompt_index"].tolist() == [True, False, False]


def test_a_reset_ends_the_holds_of_its_rows(kwargs: dict[str, Any]) -> None:
    envs = gym.make_vec("TextGen-v0", num_envs=NUM_ENVS, **kwargs)
    envs.reset(seed=0)
    envs.hold_rows(np.array([True, True, False]))
    envs.reset(options={"reset_mask": np.array([True, False, False])})
    assert envs.fresh.tolist() == [True, False, True]
    envs.step([5, 5, 5])
    assert envs._rows.lengths.tolist() == [1, 0, 1]
    envs.reset()
    assert envs.fresh.all()


@pytest.mark.parametrize("mode", MODES)
def test_while_hold_is_set_ended_rows_stay_as_they_are(mode: AutoresetMode, kwargs: dict[str, Any], assert_equal: Any) -> None:
    envs = gym.make_vec("TextGen-v0", num_envs=NUM_ENVS, autoreset_mode=mode, **kwargs)
    envs.reset(seed=0)
    envs.hold = True
    states = [generator.bit_generator.state["state"] for generator in envs.np_random]
    last, rewards, *_, infos = envs.step([1, 5, 1])
    assert rewards[0] > 0 and not infos["_prompt_index"].any()
    for _ in range(2):
        observations, rewards, terminated, _, infos = envs.step([-5, 5, 5])
        assert_equal(observations["input_ids"][::2], last["input_ids"][::2])
        assert not rewards.any() and not terminated.any() and not infos["_prompt_index"].any()
    assert states == [generator.bit_generator.state["state"] for generator in envs.np_random]
    envs.hold = False
    envs.reset()
    assert envs.fresh.all()
