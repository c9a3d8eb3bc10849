"""`step_sequence` means the step loop: every stack is compared with a loop written by hand, which steps on through all resets."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorActionWrapper, VectorRewardWrapper, VectorWrapper
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from gymnasium.wrappers import vector as vector_wrappers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import textgym
from textgym.rewards import token_level
from textgym.sequences import SequenceWalk, one_pass
from textgym.types import SequenceResult
from textgym.wrappers import ClipReward, KLShaping, NormalizeReward, RunningMoments
from textgym.wrappers.vector import ClipReward as VectorClipReward
from textgym.wrappers.vector import KLShaping as VectorKLShaping
from textgym.wrappers.vector import NormalizeReward as VectorNormalizeReward

N, T, V, EOS = 4, 5, 12, 1
MODES = list(AutoresetMode)


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")


def whole(completion_ids: list[list[int]], prompts: list[str], **columns: Any) -> list[float]:
    """A reward that tells episodes apart, order of tokens and prompt included."""
    return [len(p) + sum((t + 1) * i for t, i in enumerate(ids)) / 7 for p, ids in zip(prompts, completion_ids, strict=True)]


@token_level
def each(completion_ids: list[list[int]], **columns: Any) -> list[list[float]]:
    return [[0.01 * (sum(ids[: t + 1]) % 5) for t in range(len(ids))] for ids in completion_ids]


ARGUMENTS = {"prompts": ["w2 w3 w4", "w5", "w6 w7"], "tokenizer": words(), "reward": [whole, each], "max_new_tokens": T}


# --- Users' wrappers, batched ---------------------------------------------------------------------------------------------------


class Scaled(VectorRewardWrapper):
    def rewards(self, rewards: Any) -> Any:
        return 2.0 * rewards - 0.1


class Bonus(VectorWrapper):
    """Reads actions and infos: 0.5 for token 4, 1 at every end."""

    def step(self, actions: Any) -> Any:
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        return observations, rewards + 0.5 * (np.asarray(actions) == 4) + 1.0 * (terminated | truncated), terminated, truncated, infos


class Other(VectorWrapper):
    """An observation wrapper for every autoreset mode: whoever looks from above sees token 9 where token 3 is."""

    def _changed(self, observations: Any) -> Any:
        ids = observations["input_ids"]
        return {**observations, "input_ids": np.where(ids == 3, 9, ids)}

    def reset(self, **kwargs: Any) -> Any:
        observations, infos = self.env.reset(**kwargs)
        return self._changed(observations), infos

    def step(self, actions: Any) -> Any:
        observations, *rest = self.env.step(actions)
        return self._changed(observations), *rest


class Silent(VectorWrapper):
    """Changes nothing, and does not say so."""


class Swapped(VectorActionWrapper):
    """Token 5 is sent as the end token, the end token as 6."""

    def actions(self, actions: Any) -> Any:
        return np.where(actions == 5, EOS, np.where(actions == EOS, 6, actions))


class Stop(VectorWrapper):
    """Ends a row by itself when it writes token 7, and says so."""

    def step(self, actions: Any) -> Any:
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        early = (np.asarray(actions) == 7) & ~terminated & ~truncated
        return observations, np.where(early, -2.0, rewards), terminated | early, truncated, infos


# --- Users' wrappers, single ----------------------------------------------------------------------------------------------------


class Doubled(gym.RewardWrapper):
    def reward(self, reward: Any) -> float:
        return 2.0 * float(reward) - 0.1


class Hidden(gym.ObservationWrapper):
    def observation(self, observation: Any) -> Any:
        ids = observation["input_ids"]
        return {**observation, "input_ids": np.where(ids == 3, 9, ids)}


class Turned(gym.ActionWrapper):
    def action(self, action: Any) -> Any:
        return {5: EOS, EOS: 6}.get(int(action), int(action))


class Early(gym.Wrapper):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if action == 7 and not terminated:
            return observation, -2.0, True, truncated, {**info, "stopped": "early"}
        return observation, reward, terminated, truncated, info


class Probe(gym.Wrapper):
    """Counts what reaches a row."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.steps = self.resets = 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self.env.step(action)

    def reset(self, **kwargs: Any) -> Any:
        self.resets += 1
        return self.env.reset(**kwargs)


# --- Making stacks --------------------------------------------------------------------------------------------------------------

Layers = list[Callable[[Any], Any]]


def make(kind: str, mode: AutoresetMode, single: Layers = (), batched: Layers = (), **arguments: Any) -> Any:  # type: ignore[assignment]
    def row() -> gym.Env:
        env = gym.make("TextGen-v0", **{**ARGUMENTS, **arguments})
        return functools.reduce(lambda inner, layer: layer(inner), single, env)

    if kind == "native":
        envs = gym.make_vec("TextGen-v0", num_envs=N, autoreset_mode=mode, **{**ARGUMENTS, **arguments})
    elif kind == "sync":
        envs = SyncVectorEnv([row] * N, autoreset_mode=mode)
    else:
        envs = AsyncVectorEnv([row] * N, autoreset_mode=mode, shared_memory=kind == "async")
    return functools.reduce(lambda inner, layer: layer(inner), batched, envs)


def episodes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with some ends in them, and lengths before, at and behind those ends; what is behind a length is no token."""
    width = int(rng.integers(1, T + 3))
    actions = rng.integers(0, V, size=(N, width))
    actions[rng.random((N, width)) < 0.1] = EOS
    lengths = rng.integers(1, width + 1, size=N)
    lengths[rng.random(N) < 0.4] = width
    return np.where(np.arange(width) < lengths[:, None], actions, -100), lengths


def pick(infos: Mapping[str, Any], row: int) -> dict[str, Any]:
    """A row's part of Gymnasium's vector infos."""
    result: dict[str, Any] = {}
    for key, value in infos.items():
        if key.startswith("_") or not infos.get(f"_{key}", np.ones(N, dtype=bool))[row]:
            continue
        one = pick(value, row) if isinstance(value, dict) else value[row]
        result[key] = one.item() if isinstance(one, np.generic) else one
    return result


def by_hand(envs: Any, actions: np.ndarray, lengths: np.ndarray) -> SequenceResult:
    """The step loop as a user writes it: every row is stepped on, or reset where the mode asks for it, until all have had their steps."""
    mode = envs.metadata["autoreset_mode"]
    rewards = np.zeros(actions.shape, dtype=np.float32)
    terminated, truncated = np.zeros((2, N), dtype=bool)
    used, active, infos = np.zeros(N, dtype=np.int64), np.ones(N, dtype=bool), [{} for _ in range(N)]
    for t in range(actions.shape[1]):
        _, reward, ends, cuts, info = envs.step(np.where(actions[:, t] < 0, 2, actions[:, t]))
        rewards[active, t] = reward[active]
        used += active
        over = ends | cuts
        for i in np.flatnonzero(active):
            own = pick(info, i)
            own.pop("final_obs", None)
            if mode == AutoresetMode.SAME_STEP and over[i]:
                final = own.pop("final_info", {})
                own.pop("prompt_index", None)  # of the next episode
                own = {**own, **final}
            infos[i] = own
        terminated |= active & ends
        truncated |= active & cuts
        active &= ~over & (t + 1 < lengths)
        if not active.any():
            break
        if mode == AutoresetMode.DISABLED and over.any():
            envs.reset(options={"reset_mask": over})
    return SequenceResult(rewards, terminated, truncated, used, infos)


def assert_same(result: SequenceResult, expected: SequenceResult) -> None:
    np.testing.assert_allclose(result.rewards, expected.rewards, rtol=1e-5, atol=1e-6)
    assert result.rewards.dtype == np.float32
    np.testing.assert_array_equal(result.lengths_used, expected.lengths_used)
    np.testing.assert_array_equal(result.terminated, expected.terminated)
    np.testing.assert_array_equal(result.truncated, expected.truncated)
    for one, other in zip(result.infos, expected.infos, strict=True):
        assert_close_info(one, other)


def assert_close_info(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        if isinstance(one[key], dict):
            assert_close_info(one[key], other[key])
        elif isinstance(one[key], float):
            assert key == "t" or one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6)
        else:
            assert one[key] == other[key], key


def states(envs: Any) -> list[Any]:
    """Where the random generators of all rows stand."""
    base = envs.unwrapped
    generators = base.get_attr("np_random") if isinstance(base, AsyncVectorEnv) else base.np_random
    return [generator.bit_generator.state for generator in generators]


def compare(make_envs: Callable[[], Any], rounds: int = 6, seed: int = 0) -> None:
    """Several walks in a row against hand-written loops on another environment of the same kind, from the same prompts."""
    rng = np.random.default_rng(seed)
    walked, looped = make_envs(), make_envs()
    try:
        for turn in range(rounds):
            actions, lengths = episodes(rng)
            for envs in (walked, looped):
                envs.reset(seed=turn)
            assert_same(textgym.step_sequence(walked, actions, lengths), by_hand(looped, actions, lengths))
    finally:
        walked.close()
        looped.close()


# --- The comparisons ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shaped(sequence_policy: Any) -> Callable[[Any], Any]:
    """The vector form of KL shaping, as a layer."""
    return lambda envs: VectorKLShaping(envs, sequence_policy(1), sequence_policy(2), beta=0.3, full_kl=True)


@pytest.fixture
def shaped_row(tabular_policy: Any) -> Callable[[Any], Any]:
    """The single form, as a layer; its policies can only score steps."""
    policy, reference = tabular_policy(1), tabular_policy(2)
    return lambda env: KLShaping(env, policy, reference, beta=0.3)


# A loop that steps on through resets sees episodes that a walk does not, so the statistics stand still here; see `test_rewards.py` for
# statistics that move.
RETURNS = RunningMoments.of([1.0, 4.0, 2.5])
CLIPPED = functools.partial(VectorClipReward, min_reward=0.2, max_reward=1.5)
NORMALISED = functools.partial(VectorNormalizeReward, clip=1.2, statistics=RETURNS, frozen=True)
CLIPPED_ROW = functools.partial(ClipReward, min_reward=0.2)
NORMALISED_ROW = functools.partial(NormalizeReward, clip=1.2, statistics=RETURNS, frozen=True)


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("mode", MODES)
def test_bundled_stacks_in_one_pass(mode: AutoresetMode, limit: int | None, shaped: Any) -> None:
    stacks = [[], [shaped], [CLIPPED], [NORMALISED], [NORMALISED, CLIPPED, shaped], [CLIPPED, shaped, NORMALISED]]
    for layers in stacks:
        make_envs = functools.partial(make, "native", mode, batched=layers, max_episode_steps=limit)
        assert one_pass(make_envs())
        compare(make_envs)


@pytest.mark.parametrize("wrapper", [Scaled, Bonus, Other, Swapped, Stop, vector_wrappers.RecordEpisodeStatistics])
@pytest.mark.parametrize("mode", MODES)
def test_users_vector_wrappers(wrapper: Any, mode: AutoresetMode, shaped: Any) -> None:
    for layers in ([wrapper], [wrapper, shaped], [shaped, wrapper], [shaped, Scaled, wrapper]):
        make_envs = functools.partial(make, "native", mode, batched=layers)
        assert not one_pass(make_envs())
        compare(make_envs, rounds=3)


@pytest.mark.parametrize(
    "wrapper", [Doubled, Hidden, Turned, Early, RecordEpisodeStatistics, lambda env: TimeLimit(env, 3), CLIPPED_ROW, NORMALISED_ROW]
)
@pytest.mark.parametrize("mode", MODES)
def test_users_single_wrappers_under_sync(wrapper: Any, mode: AutoresetMode, shaped: Any, shaped_row: Any) -> None:
    compare(functools.partial(make, "sync", mode, single=[wrapper]), rounds=3)
    compare(functools.partial(make, "sync", mode, single=[wrapper], batched=[shaped]), rounds=3)
    compare(functools.partial(make, "sync", mode, single=[wrapper, shaped_row]), rounds=3)
    compare(functools.partial(make, "sync", mode, single=[shaped_row, wrapper], batched=[Bonus]), rounds=3)


@pytest.mark.parametrize("kind", ["async", "async without shared memory"])
@pytest.mark.parametrize("mode", MODES)
def test_users_wrappers_under_async(kind: str, mode: AutoresetMode, shaped: Any) -> None:
    single = [Early, Doubled, functools.partial(TimeLimit, max_episode_steps=4)]
    walked = make(kind, mode, single=[*single, Probe], batched=[shaped, Bonus])
    looped = make("sync", mode, single=single, batched=[shaped, Bonus])
    rng = np.random.default_rng(0)
    steps = np.zeros(N, dtype=np.int64)
    try:
        for turn in range(4):
            actions, lengths = episodes(rng)
            for envs in (walked, looped):
                envs.reset(seed=turn)
            generators = states(walked)
            result = textgym.step_sequence(walked, actions, lengths)
            assert_same(result, by_hand(looped, actions, lengths))
            assert states(walked) == generators, "an autoreset drew a prompt"
            steps += result.lengths_used
            np.testing.assert_array_equal(walked.unwrapped.get_attr("steps"), steps)
    finally:
        walked.close()
        looped.close()


RECORDED = functools.partial(vector_wrappers.RecordEpisodeStatistics, stats_key="batched")
LIMITED = functools.partial(TimeLimit, max_episode_steps=3)
SINGLE: Layers = [Doubled, Hidden, Turned, Early, RecordEpisodeStatistics, LIMITED, CLIPPED_ROW, NORMALISED_ROW]
BATCHED: Layers = [Scaled, Bonus, Other, Swapped, Stop, RECORDED, CLIPPED, NORMALISED]


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_stack(data: st.DataObject, sequence_policy: Any, tabular_policy: Any) -> None:
    """Up to three users' wrappers of a kind, in any order, with KL shaping in any place among them or none."""
    kind, mode = data.draw(st.sampled_from(["native", "sync"])), data.draw(st.sampled_from(MODES))
    batched = data.draw(st.lists(st.sampled_from(BATCHED), max_size=3, unique=True))
    single = data.draw(st.lists(st.sampled_from(SINGLE), max_size=3, unique=True)) if kind == "sync" else []
    if kind == "sync" and mode == AutoresetMode.DISABLED:
        # `SyncVectorEnv` takes the reset mask out of the options, and this wrapper then forgets the rows that were not reset.
        batched = [layer for layer in batched if layer is not RECORDED]
    cls = data.draw(st.sampled_from([sequence_policy, tabular_policy]))
    policy, reference = cls(1), cls(2)
    place = data.draw(st.sampled_from(["nowhere", "batched", "single"]))
    if place == "batched":
        batched.insert(data.draw(st.integers(0, len(batched))), lambda envs: VectorKLShaping(envs, policy, reference, 0.3))
    if place == "single" and kind == "sync":
        single.insert(data.draw(st.integers(0, len(single))), lambda env: KLShaping(env, policy, reference, 0.3))
    compare(functools.partial(make, kind, mode, single, batched), rounds=3, seed=data.draw(st.integers(0, 10**6)))


# --- What finished rows must not be seen by -------------------------------------------------------------------------------------


class CountingReward:
    """Counts the episodes it is asked to score."""

    def __init__(self) -> None:
        self.calls = self.rows = 0

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        self.calls, self.rows = self.calls + 1, self.rows + len(completion_ids)
        return [float(len(ids)) for ids in completion_ids]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["native", "native, stepped", "sync"])
def test_fillers_reach_no_reward_no_statistics_and_no_generator(kind: str, mode: AutoresetMode) -> None:
    reward = CountingReward()
    single = [RecordEpisodeStatistics, Probe] if kind == "sync" else []
    batched = [] if kind == "native" else [Scaled, functools.partial(vector_wrappers.RecordEpisodeStatistics, stats_key="batched")]
    envs = make(kind.split(",")[0], mode, single, batched, reward=reward)
    rng = np.random.default_rng(3)
    ended, steps = 0, np.zeros(N, dtype=np.int64)
    for turn in range(5):
        actions, lengths = episodes(rng)
        envs.reset(seed=turn)
        generators = states(envs)
        result = textgym.step_sequence(envs, actions, lengths)
        ended, steps = ended + int(result.terminated.sum()), steps + result.lengths_used
        assert reward.rows == ended
        assert states(envs) == generators
        if batched:
            assert envs.episode_count == ended and len(envs.return_queue) == ended
        if kind == "sync":
            rows = envs.unwrapped.envs
            assert all(type(row) is Probe for row in rows), "the walk left its stand-ins behind"
            assert [row.steps for row in rows] == steps.tolist()
            assert [row.resets for row in rows] == [turn + 1] * N
            assert sum(row.env.episode_count for row in rows) == ended
    assert 0 < ended < 5 * N, "the test needs rows that end and rows that are cut"
    if kind == "native":
        assert reward.calls <= 5, "one reward call per walk"


@pytest.mark.parametrize("mode", MODES)
def test_normalised_rewards_do_not_learn_from_fillers(mode: AutoresetMode) -> None:
    """The running statistics of Gymnasium's own wrapper see the real steps and no others."""
    actions = np.full((N, T), 2)
    lengths = np.array([1, T, T, T])
    envs = make("native", mode, batched=[vector_wrappers.NormalizeReward])
    envs.reset(seed=0)
    textgym.step_sequence(envs, actions, lengths)
    assert envs.return_rms.count == pytest.approx(lengths.sum(), abs=0.01)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["native", "native, stepped", "sync", "async", "async without shared memory"])
def test_every_row_needs_a_reset_afterwards(kind: str, mode: AutoresetMode) -> None:
    envs = make(kind.removesuffix(", stepped"), mode, batched=[Scaled] if "stepped" in kind else [])
    actions = np.full((N, T), 2)
    envs.reset(seed=0)
    textgym.step_sequence(envs, actions, np.array([1, 2, T, T]))
    with pytest.raises(ValueError, match="reset"):
        textgym.step_sequence(envs, actions, np.full(N, 2))
    envs.reset(seed=1)
    again, *_ = envs.step(np.full(N, 3))
    assert (again["input_ids"][:, 3] == 3).all(), "the first step after the reset was not a step"
    if mode != AutoresetMode.DISABLED:
        envs.step(np.full(N, EOS))
        *_, infos = envs.step(np.full(N, EOS))
        assert infos["_prompt_index"].all(), "rows are not reset any more when they end"
    envs.reset(seed=0)
    textgym.step_sequence(envs, actions, np.array([1, 2, T, T]))
    if not kind.startswith("async"):  # an error in a worker closes it, and tells so on the standard error stream
        with pytest.raises((ValueError, AssertionError), match="reset"):
            envs.step(np.full(N, 2))
        envs.reset(seed=1)
        envs.step(np.full(N, 3))
    envs.close()


# --- Log-probs that are known --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [Silent, Bonus, Other, Swapped])
def test_known_log_probs_reach_a_shaping_that_sees_what_they_belong_to(wrapper: Any, tabular_policy: Any) -> None:
    """Below a user's wrapper they are taken if the prompts are the same, never otherwise; the rewards are always those of the loop."""
    policy, reference = tabular_policy(1), tabular_policy(2)
    actions = np.random.default_rng(0).integers(2, V, (N, T))
    lengths = np.full(N, T)
    results = []
    for told in (True, False):
        envs = wrapper(
            VectorKLShaping(
                gym.make_vec("TextGen-v0", num_envs=N, **(ARGUMENTS | {"prompts": ["w2 w3 w4", "w3"]})), policy, reference, beta=0.3
            )
        )
        observations, _ = envs.reset(seed=0)
        states = {key: np.array(observations[key]) for key in ("input_ids", "attention_mask")}
        log_probs = np.zeros((N, T))
        for t in range(T):
            log_probs[:, t] = policy.log_probs(states, actions[:, t])
            column = states["input_ids"].shape[1] - T + t
            states["input_ids"][:, column], states["attention_mask"][:, column] = actions[:, t], 1
        calls = policy.calls
        with SequenceWalk(envs) as walk:
            walk.prime(actions, lengths, log_probs if told else None, observations if told else None)
            primed = policy.calls - calls
            for t in range(T):
                walk.step(actions[:, t])
                if not walk.active.any():
                    break
            results.append((walk.result().rewards, primed))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-6)
    assert results[1][1] > 0, "without log-probs the policy is asked"
    prompts_are_the_same = wrapper is not Other
    assert (results[0][1] == 0) == prompts_are_the_same
