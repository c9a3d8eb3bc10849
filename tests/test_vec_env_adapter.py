"""Stable-Baselines3 environments as Gymnasium's and back: the same episodes, and walks through them."""

import functools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecMonitor
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import textgym
from textgym.vec_env_adapter import GymnasiumVectorEnv, StableBaselinesVecEnv, as_gymnasium_vector_env, as_sb3_vec_env
from textgym.wrappers import KLShaping, find_kl_shaping
from textgym.wrappers.vector import KLShaping as VectorKLShaping

N, T, V = 3, 5, 12
MODES = list(AutoresetMode)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")


def _reward(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [len(p) + sum((t + 1) * i for t, i in enumerate(ids)) / 7 for p, ids in zip(prompts, completion_ids, strict=True)]


ARGUMENTS = {"prompts": ["w2 w3 w4", "w5", "w6 w7"], "tokenizer": _tokenizer(), "reward": _reward, "max_new_tokens": T}


def row(*layers: Callable[[Any], Any]) -> Callable[[], gym.Env]:
    return lambda: functools.reduce(lambda env, layer: layer(env), layers, gym.make("TextGen-v0", **ARGUMENTS))


def native(mode: AutoresetMode = AutoresetMode.NEXT_STEP, **kwargs: Any) -> Any:
    return gym.make_vec("TextGen-v0", num_envs=N, autoreset_mode=mode, **{**ARGUMENTS, **kwargs})


def assert_same_step(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    for key in one[0]:
        np.testing.assert_array_equal(one[0][key], other[0][key])
    np.testing.assert_allclose(one[1], other[1], rtol=1e-6)
    assert one[1].dtype == other[1].dtype == np.float32
    np.testing.assert_array_equal(one[2], other[2])
    for a, b in zip(one[3], other[3], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key == "terminal_observation":
                for part in a[key]:
                    np.testing.assert_array_equal(a[key][part], b[key][part])
            else:
                assert a[key] == pytest.approx(b[key]) if isinstance(a[key], float) else a[key] == b[key]


class Early(gym.Wrapper):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward - 0.5, terminated or action == 7, truncated, info


class Probe(gym.Wrapper):
    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.steps = self.resets = 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self.env.step(action)

    def reset(self, **kwargs: Any) -> Any:
        self.resets += 1
        return self.env.reset(**kwargs)


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["native", "sync"])
def test_a_vector_environment_is_seen_as_the_dummy_vec_env_of_its_rows(kind: str, mode: AutoresetMode, limit: int | None) -> None:
    timed = [lambda env: gym.wrappers.TimeLimit(env, limit)] if limit else []
    dummy = DummyVecEnv([row(*timed)] * N)
    envs = native(mode, max_episode_steps=limit) if kind == "native" else SyncVectorEnv([row(*timed)] * N, autoreset_mode=mode)
    view = as_sb3_vec_env(envs)
    for venv in (dummy, view):
        venv.seed(7)
    one, other = dummy.reset(), view.reset()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(30):
        assert dummy.reset_infos == view.reset_infos
        actions = np.where(rng.random(N) < 0.15, 1, rng.integers(0, V, N))
        one, other = dummy.step(actions), view.step(actions)
        assert_same_step(one, other)
        ended += int(one[2].sum())
    assert ended > 10


@pytest.mark.parametrize("mode", MODES)
def test_kl_shaping_goes_through_the_view(mode: AutoresetMode, tabular_policy: Any) -> None:
    policy, reference = tabular_policy(1), tabular_policy(2)
    dummy = DummyVecEnv([row(lambda env: KLShaping(env, policy, reference))] * N)
    view = StableBaselinesVecEnv(VectorKLShaping(native(mode), policy, reference))
    rng = np.random.default_rng(0)
    for venv in (dummy, view):
        venv.seed(7)
        venv.reset()
    for _ in range(20):
        actions = np.where(rng.random(N) < 0.15, 1, rng.integers(0, V, N))
        assert_same_step(dummy.step(actions), view.step(actions))


def test_options_of_rows_reach_them() -> None:
    for envs in (native(), SyncVectorEnv([row()] * N)):
        view = StableBaselinesVecEnv(envs)
        view.set_options({"prompt_index": 1})
        view.reset()
        assert [info["prompt_index"] for info in view.reset_infos] == [1, 1, 1]
    view = StableBaselinesVecEnv(native())
    view.set_options([{"prompt_index": i} for i in (2, 0, 1)])
    view.reset()
    assert [info["prompt_index"] for info in view.reset_infos] == [2, 0, 1]
    view.set_options([{"prompt_index": 0}, {}, {}])
    with pytest.raises(ValueError, match="same keys"):
        view.reset()


@pytest.mark.parametrize("kind", ["native", "sync", "async"])
def test_attributes_and_methods_of_rows(kind: str) -> None:
    envs = native(eos_token_ids=(1, 2, 3)) if kind == "native" else None
    envs = envs or (SyncVectorEnv([row()] * N) if kind == "sync" else AsyncVectorEnv([row()] * N))
    view = StableBaselinesVecEnv(envs)
    try:
        assert view.get_attr("max_new_tokens") == [T] * N
        assert view.get_attr("eos_token_ids", indices=[0, 2]) == [(1, 2, 3) if kind == "native" else (1,)] * 2
        assert view.get_attr("render_mode") == [None] * N
        view.set_attr("next_prompt_index", 2, indices=[1])
        view.set_attr("next_prompt_index", 0, indices=[0, 2])
        view.reset()
        assert [info["prompt_index"] for info in view.reset_infos] == [0, 2, 0]
        assert view.env_is_wrapped(Monitor) == [False] * N
        assert view.has_attr("fresh") and not view.has_attr("no_such_attribute") if kind != "async" else True
        view.env_method("require_reset")
        assert not any(view.get_attr("fresh"))
        if kind == "async":
            with pytest.raises(ValueError, match="`indices` must be all rows"):
                view.env_method("require_reset", indices=0)
    finally:
        view.close()


def test_an_async_environment_that_would_reset_twice_is_refused() -> None:
    envs = AsyncVectorEnv([row()] * 2, shared_memory=False)
    with pytest.raises(ValueError, match="shared_memory=True"):
        StableBaselinesVecEnv(envs)
    envs.close()


def test_views_of_views_are_the_thing_itself() -> None:
    envs, venv = native(), DummyVecEnv([row()])
    assert as_gymnasium_vector_env(as_sb3_vec_env(envs)) is envs
    assert as_sb3_vec_env(as_gymnasium_vector_env(venv)) is venv


def test_a_vec_env_is_seen_as_a_vector_environment() -> None:
    envs = GymnasiumVectorEnv(DummyVecEnv([row(lambda env: gym.wrappers.TimeLimit(env, 3))] * N))
    sync = SyncVectorEnv([row(lambda env: gym.wrappers.TimeLimit(env, 3))] * N, autoreset_mode=AutoresetMode.SAME_STEP)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP and envs.action_space == sync.action_space
    for one in (envs, sync):
        one.set_attr("next_prompt_index", [2, 1, 0])
    (observations, infos), _ = envs.reset(seed=3), sync.reset(seed=3)
    assert infos["prompt_index"].tolist() == [2, 1, 0] and envs.observation_space.contains(observations)
    assert envs.get_attr("max_new_tokens") == (T,) * N and envs.call("has_wrapper_attr", "fresh") == (True,) * N
    rng = np.random.default_rng(0)
    for _ in range(20):
        actions = np.where(rng.random(N) < 0.15, 1, rng.integers(0, V, N))
        one, other = envs.step(actions), sync.step(actions)
        np.testing.assert_allclose(one[1], other[1], rtol=1e-6)
        np.testing.assert_array_equal(one[2], other[2])
        # A `VecEnv` does not say that a row which terminates was cut in the same step too.
        np.testing.assert_array_equal(one[3], other[3] & ~other[2])
        for i in np.flatnonzero(one[2] | one[3]):
            np.testing.assert_array_equal(one[4]["final_obs"][i]["input_ids"], other[4]["final_obs"][i]["input_ids"])
            assert one[4]["prompt_index"][i] == other[4]["prompt_index"][i]
    with pytest.raises(ValueError, match="reset_mask"):
        envs.reset(options={"reset_mask": np.array([True, False, True])})
    with pytest.raises(ValueError, match="one per row"):
        envs.set_attr("next_prompt_index", [1])


def plans(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    for turn in range(4):
        actions = np.where(rng.random((N, T + 1)) < 0.12, 1, rng.integers(0, V, (N, T + 1)))
        yield turn, actions, rng.integers(1, T + 2, N)


def by_hand(venv: VecEnv, actions: np.ndarray, lengths: np.ndarray) -> tuple[Any, ...]:
    """The loop over a `VecEnv` as a user writes it."""
    rewards, used, infos = np.zeros(actions.shape, dtype=np.float32), np.zeros(N, dtype=np.int64), [{} for _ in range(N)]
    active, ended, cut = np.ones(N, dtype=bool), np.zeros(N, dtype=bool), np.zeros(N, dtype=bool)
    for t in range(actions.shape[1]):
        _, reward, dones, step_infos = venv.step(actions[:, t])
        rewards[active, t] = reward[active]
        used += active
        for i in np.flatnonzero(active):
            infos[i] = step_infos[i]
        truncated = np.array([info["TimeLimit.truncated"] for info in step_infos])
        ended, cut = ended | (active & dones & ~truncated), cut | (active & truncated)
        active &= ~dones & (t + 1 < lengths)
    return rewards, ended, cut, used, infos


def assert_walks_alike(walked: VecEnv, looped: VecEnv) -> None:
    for turn, actions, lengths in plans():
        for venv in (walked, looped):
            venv.seed(turn)
            venv.reset()
        result = textgym.step_sequence(walked, actions, lengths)
        expected = by_hand(looped, actions, lengths)
        np.testing.assert_allclose(result.rewards, expected[0], rtol=1e-5, atol=1e-6)
        for one, other in zip(result[1:4], expected[1:4], strict=True):
            np.testing.assert_array_equal(one, other)
        for one, other in zip(result.infos, expected[4], strict=True):
            assert one.keys() == other.keys()
            assert one.get("completion_ids") == other.get("completion_ids")
            assert one.get("kl_per_sequence") == pytest.approx(other.get("kl_per_sequence"))


@pytest.mark.parametrize("layers", [[], [Monitor], [Early, Monitor], [lambda env: gym.wrappers.TimeLimit(env, 3)]])
def test_walking_a_dummy_vec_env(layers: Any, sequence_policy: Any) -> None:
    policy, reference = sequence_policy(1), sequence_policy(2)
    assert_walks_alike(DummyVecEnv([row(*layers)] * N), DummyVecEnv([row(*layers)] * N))
    shaped = [*layers, lambda env: KLShaping(env, policy, reference)]
    walked = VecMonitor(DummyVecEnv([row(*shaped)] * N)) if Monitor not in layers else DummyVecEnv([row(*shaped)] * N)
    looped = DummyVecEnv([row(*shaped)] * N)
    if isinstance(walked, VecMonitor):
        looped = VecMonitor(looped)
    assert_walks_alike(walked, looped)


def test_finished_rows_of_a_dummy_vec_env_are_left_alone() -> None:
    venv = DummyVecEnv([row(Monitor, Probe)] * N)
    steps = np.zeros(N, dtype=np.int64)
    for turn, actions, lengths in plans():
        venv.seed(turn)
        venv.reset()
        generators = [env.unwrapped.np_random.bit_generator.state for env in venv.envs]
        steps += textgym.step_sequence(venv, actions, lengths).lengths_used
        assert all(type(env) is Probe for env in venv.envs)
        assert [env.steps for env in venv.envs] == steps.tolist() and [env.resets for env in venv.envs] == [turn + 1] * N
        assert [env.unwrapped.np_random.bit_generator.state for env in venv.envs] == generators
        with pytest.raises(ValueError, match="reset"):
            textgym.step_sequence(venv, actions, lengths)


def test_single_forms_in_a_dummy_vec_env_are_primed_together(sequence_policy: Any) -> None:
    policy, reference = sequence_policy(1), sequence_policy(2)
    venv = DummyVecEnv([row(lambda env: KLShaping(env, policy, reference), Monitor)] * N)
    assert len(find_kl_shaping(GymnasiumVectorEnv(venv))) == N
    venv.reset()
    _, actions, lengths = next(plans())
    textgym.step_sequence(venv, actions, lengths)
    assert (policy.sequence_calls, policy.calls) == (1, 0)


def test_walking_a_subproc_vec_env() -> None:
    walked = SubprocVecEnv([row(Early, Probe)] * N, start_method="fork")
    try:
        assert_walks_alike(walked, DummyVecEnv([row(Early)] * N))
        used = np.sum([_used(actions, lengths, turn) for turn, actions, lengths in plans()], axis=0)
        np.testing.assert_array_equal(walked.get_attr("steps"), used)
        with pytest.raises(ValueError, match="reset"):
            textgym.step_sequence(walked, np.full((N, 2), 2), np.full(N, 2))
    finally:
        walked.close()


def _used(actions: np.ndarray, lengths: np.ndarray, turn: int) -> np.ndarray:
    venv = DummyVecEnv([row(Early)] * N)
    venv.seed(turn)
    venv.reset()
    return by_hand(venv, actions, lengths)[3]


class Passing(VecEnvWrapper):
    """Any wrapper of Stable-Baselines3's own kind."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


@pytest.mark.parametrize("mode", MODES)
def test_walking_through_wrappers_on_a_view(mode: AutoresetMode, sequence_policy: Any) -> None:
    policy, reference = sequence_policy(1), sequence_policy(2)
    envs = VectorKLShaping(native(mode), policy, reference)
    walked = VecMonitor(Passing(StableBaselinesVecEnv(envs)))
    looped = VecMonitor(Passing(StableBaselinesVecEnv(VectorKLShaping(native(mode), policy, reference))))
    assert_walks_alike(walked, looped)
    walked.reset()
    generators = [generator.bit_generator.state for generator in envs.unwrapped.np_random]
    policy.sequence_calls, before = 0, walked.episode_count
    _, actions, lengths = next(plans())
    result = textgym.step_sequence(walked, actions, lengths)
    assert policy.sequence_calls == 1, "it was not told of the plan"
    assert [generator.bit_generator.state for generator in envs.unwrapped.np_random] == generators
    assert walked.episode_count - before == result.terminated.sum()


def test_walking_the_view_itself_is_one_pass() -> None:
    assert textgym.sequences.one_pass(StableBaselinesVecEnv(native()))
    assert not textgym.sequences.one_pass(VecMonitor(StableBaselinesVecEnv(native())))
    assert not textgym.sequences.one_pass(DummyVecEnv([row()]))
