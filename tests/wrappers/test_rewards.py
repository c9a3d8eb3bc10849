"""Clipping and normalising rewards: hand-computed numbers, statistics of real episodes only, one pass equal to the loop, both forms."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorRewardWrapper

import textgym
from textgym.rewards import token_level
from textgym.sequences import one_pass
from textgym.wrappers import ClipReward, KLShaping, NormalizeReward, RunningMoments
from textgym.wrappers.vector import ClipReward as VectorClipReward
from textgym.wrappers.vector import KLShaping as VectorKLShaping
from textgym.wrappers.vector import NormalizeReward as VectorNormalizeReward

N, T, END = 3, 5, 1


@token_level
def ids(completion_ids: list[list[int]]) -> list[list[float]]:
    return [[float(token) for token in row] for row in completion_ids]


class Unchanged(VectorRewardWrapper):
    """A user's wrapper: the stack is stepped token by token below it."""

    def rewards(self, rewards: Any) -> Any:
        return rewards


def test_running_moments() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=50)
    moments = RunningMoments()
    assert (moments.count, moments.mean, moments.std) == (0, 0.0, 0.0)
    for part in np.split(values, [1, 1, 7, 30]):
        moments.update(part)
    assert moments.count == 50
    assert (moments.mean, moments.std) == pytest.approx((values.mean(), values.std()))
    again = RunningMoments()
    again.load_state_dict(moments.state_dict())
    assert (again.count, again.mean, again.std) == (50, moments.mean, moments.std)
    assert RunningMoments.of(values).std == pytest.approx(values.std())


# --- Single -----------------------------------------------------------------------------------------------------------------------


def test_clipping(make_env: Any) -> None:
    env = ClipReward(make_env(reward=ids), 2.5, 6.0)
    env.reset(seed=0)
    steps = [env.step(token) for token in (2, 5, 9, END)]
    assert [reward for _, reward, *_ in steps] == [2.5, 5.0, 6.0, 2.5]
    assert [info["unclipped_reward"] for *_, info in steps] == [2.0, 5.0, 9.0, 1.0]
    assert steps[-1][-1]["rewards"] == {"ids": 17.0}, "what the reward functions gave stays visible"
    env = ClipReward(make_env(reward=ids), max_reward=3.0)
    env.reset(seed=0)
    assert [env.step(token)[1] for token in (2, 5)] == [2.0, 3.0]


def test_an_episode_is_normalised_by_those_before_it(make_env: Any) -> None:
    env = NormalizeReward(make_env(reward=ids))
    returns, seen = [], []
    for tokens in ([4, END], [8, 2, END], [3, 3, 3, END], [6, END]):
        env.reset(seed=0)
        rewards = [env.step(token) for token in tokens]
        mean = float(np.mean(returns)) if returns else 0.0
        std = float(np.std(returns)) if len(returns) > 1 else 1.0
        info = rewards[-1][-1]
        assert (info["unnormalized_return"], info["return_mean"], info["return_std"]) == pytest.approx((sum(tokens), mean, std))
        assert [step[-1]["unnormalized_reward"] for step in rewards] == tokens
        assert [step[1] for step in rewards[:-1]] == pytest.approx([token / std for token in tokens[:-1]])
        assert sum(step[1] for step in rewards) == pytest.approx((sum(tokens) - mean) / std)
        seen.append(rewards[0][1])
        returns.append(sum(tokens))
    assert env.statistics.count == 4 and env.statistics.mean == pytest.approx(np.mean(returns))


def test_options_of_normalising(make_env: Any) -> None:
    past = RunningMoments.of([0.0, 4.0])  # mean 2, standard deviation 2

    def rewards(**options: Any) -> list[float]:
        env = NormalizeReward(make_env(reward=ids), statistics=past, frozen=True, **options)
        env.reset(seed=0)
        return [float(env.step(token)[1]) for token in (5, 9, END)]

    assert rewards() == [2.5, 4.5, -0.5]
    assert rewards(center=False) == [2.5, 4.5, 0.5]
    assert rewards(clip=3.0) == [2.5, 3.0, -0.5]
    assert rewards(epsilon=2.0) == [5.0, 9.0, -1.0], "a standard deviation that small counts as 1"
    assert past.count == 2, "frozen statistics moved"
    env = NormalizeReward(make_env(reward=ids), statistics=past, frozen=True)
    env.frozen = False
    env.reset(seed=0)
    env.step(END)
    assert past.count == 3 and env.state_dict() == past.state_dict()


def test_equal_returns_leave_the_scale(make_env: Any) -> None:
    env = NormalizeReward(make_env(reward=ids))
    for _ in range(3):
        env.reset(seed=0)
        env.step(4)
        _, reward, *_ = env.step(END)
    assert reward == 1.0 - 5.0


def test_episodes_that_are_cut_or_left_enter_nothing(make_env: Any) -> None:
    env = NormalizeReward(gym.wrappers.TimeLimit(make_env(reward=ids), 2), statistics=RunningMoments.of([0.0, 4.0]))
    env.reset(seed=0)
    env.step(5)
    _, reward, terminated, truncated, info = env.step(7)
    assert truncated and not terminated and reward == 3.5, "a return that was never scored has no mean"
    assert info["unnormalized_return"] == 12.0 and env.statistics.count == 2
    env.reset(seed=0)
    env.step(5)
    env.reset(seed=0)
    env.step(END)
    assert env.statistics.count == 3 and env.statistics.mean == pytest.approx((0 + 4 + 1) / 3)


def test_state_goes_on_in_another_environment(make_env: Any) -> None:
    first = NormalizeReward(make_env(reward=ids))
    for tokens in ([4, END], [8, END]):
        first.reset(seed=0)
        for token in tokens:
            first.step(token)
    second = NormalizeReward(make_env(reward=ids))
    second.load_state_dict(first.state_dict())
    for env in (first, second):
        env.reset(seed=0)
    assert first.step(6)[1] == second.step(6)[1] == pytest.approx(6 / 2)


def test_specs_make_them_again(make_env: Any) -> None:
    env = NormalizeReward(ClipReward(make_env(reward=ids), -1.0, 3.0), clip=2.0)
    again = gym.make(env.spec)
    env.reset(seed=0)
    again.reset(seed=0)
    assert again.step(4)[1] == env.step(4)[1] == 2.0
    assert again.get_wrapper_attr("statistics") is env.statistics


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda env: ClipReward(env), "`min_reward` or `max_reward` must be given"),
        (lambda env: ClipReward(env, 2.0, 1.0), "`min_reward` must be at most `max_reward`, got 2.0 and 1.0"),
        (lambda env: NormalizeReward(env, clip=0.0), "`clip` must be more than 0 or None, got 0.0"),
        (lambda env: NormalizeReward(env, epsilon=-1.0), "`epsilon` must be at least 0, got -1.0"),
        (lambda env: NormalizeReward(env, statistics={"mean": 0}), "`statistics` must be `RunningMoments` or None, got dict"),
    ],
)
def test_bad_arguments(make_env: Any, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(make_env())


# --- Vector -----------------------------------------------------------------------------------------------------------------------


def episodes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of which some end, and lengths of which some cut an episode before its end."""
    actions = rng.integers(2, 12, size=(N, T))
    actions[rng.random((N, T)) < 0.2] = END
    lengths = np.where(rng.random(N) < 0.3, rng.integers(1, T + 1, N), T)
    return actions, lengths


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_one_pass_means_the_loop_and_statistics_see_real_episodes_only(
    make_env: Any, make_envs: Any, sequence_policy: Any, mode: AutoresetMode
) -> None:
    """Rollout by rollout: rewards by hand from the returns of earlier rollouts, in one pass, token by token, and in sync rows."""
    policy, reference = sequence_policy(1), sequence_policy(2)

    def layers(envs: Any) -> Any:
        return VectorKLShaping(VectorNormalizeReward(envs, clip=50.0), policy, reference, beta=0.3)

    plain = make_envs(N, reward=ids, autoreset_mode=mode)
    rows = SyncVectorEnv([lambda: make_env(reward=ids)] * N, autoreset_mode=mode)
    stacks = [layers(make_envs(N, reward=ids, autoreset_mode=mode)), Unchanged(layers(make_envs(N, reward=ids, autoreset_mode=mode)))]
    stacks.append(layers(rows))
    assert [one_pass(envs) for envs in stacks] == [True, False, False]
    rng = np.random.default_rng(0)
    returns: list[float] = []
    for turn in range(6):
        actions, lengths = episodes(rng)
        plain.reset(seed=turn)
        raw = textgym.step_sequence(plain, actions, lengths)
        std = float(np.std(returns)) if len(returns) > 1 else 1.0
        mean = float(np.mean(returns)) if returns else 0.0
        expected = raw.rewards / std
        ended = np.flatnonzero(raw.terminated)
        expected[ended, raw.lengths_used[ended] - 1] -= mean / std
        returns += raw.rewards.sum(axis=1)[ended].tolist()
        for envs in stacks:
            envs.reset(seed=turn)
            result = textgym.step_sequence(envs, actions, lengths)
            infos = result.infos
            np.testing.assert_allclose(
                [info["unshaped_reward"] for info in infos], expected[np.arange(N), raw.lengths_used - 1], rtol=1e-5, atol=1e-5
            )
            for row in ended:
                assert infos[row]["unnormalized_return"] == pytest.approx(raw.rewards[row].sum(), rel=1e-6)
                assert infos[row]["unshaped_return"] == pytest.approx((raw.rewards[row].sum() - mean) / std, rel=1e-5, abs=1e-5)
                penalty = 0.3 * infos[row]["kl_per_sequence"]
                assert result.rewards[row].sum() == pytest.approx(infos[row]["unshaped_return"] - penalty, rel=1e-4, abs=1e-4)
            inner = envs.env if isinstance(envs, VectorKLShaping) else envs.env.env
            assert inner.statistics.count == len(returns)
            assert (inner.statistics.mean, inner.statistics.std) == pytest.approx((np.mean(returns), np.std(returns)), rel=1e-6)
    assert len(returns) > 8


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_clipping_equals_single_forms(make_env: Any, make_envs: Any, mode: AutoresetMode) -> None:
    """Rewards and infos of the vector form are those of single forms in a synchronous vector, automatic resets included."""
    sync = SyncVectorEnv([lambda: ClipReward(make_env(reward=ids), 2.5, 6.0)] * N, autoreset_mode=mode)
    vector = VectorClipReward(make_envs(N, reward=ids, autoreset_mode=mode), 2.5, 6.0)
    rng = np.random.default_rng(0)
    for envs in (sync, vector):
        envs.reset(seed=0)
    restarted = 0
    for _ in range(40):
        actions = np.where(rng.random(N) < 0.3, END, rng.integers(2, 12, N))
        one, other = sync.step(actions), vector.step(actions)
        np.testing.assert_array_equal(one[1], other[1])
        for key in ("unclipped_reward", "_unclipped_reward"):
            assert (key in one[-1]) == (key in other[-1])
            np.testing.assert_array_equal(one[-1].get(key, ()), other[-1].get(key, ()))
        restarted += int((other[1] == 0.0).sum())
        over = one[2] | one[3]
        if mode == AutoresetMode.DISABLED and over.any():
            for envs in (sync, vector):
                envs.reset(options={"reset_mask": over})
    assert (restarted > 0) == (mode == AutoresetMode.NEXT_STEP), "an automatic reset pays nothing, so there is nothing to clip"


def test_below_and_above_kl_shaping(make_envs: Any, sequence_policy: Any) -> None:
    """Below, the reward is divided and the penalty is not; above, both are."""
    policy, reference, past = sequence_policy(1), sequence_policy(2), RunningMoments.of([0.0, 4.0])
    actions, lengths = np.array([[5, 3, END], [4, 4, 4], [2, END, 0]]), np.array([3, 2, 2])

    def walk(*layers: Any) -> Any:
        envs = make_envs(N, reward=ids)
        for layer in layers:
            envs = layer(envs)
        envs.reset(seed=0)
        assert one_pass(envs)
        return textgym.step_sequence(envs, actions, lengths)

    def shape(envs: Any) -> Any:
        return VectorKLShaping(envs, policy, reference, beta=0.5)

    def normalise(envs: Any) -> Any:
        return VectorNormalizeReward(envs, center=False, statistics=past, frozen=True)

    plain, shaped = walk(), walk(shape)
    penalty = plain.rewards - shaped.rewards
    assert np.abs(penalty).max() > 0.1
    np.testing.assert_allclose(walk(normalise, shape).rewards, plain.rewards / 2 - penalty, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(walk(shape, normalise).rewards, (plain.rewards - penalty) / 2, rtol=1e-5, atol=1e-6)


def test_known_log_probs_pass_through(make_env: Any, make_envs: Any, sequence_policy: Any) -> None:
    """The wrappers change neither observations nor actions, so what is known above them holds below, in both forms."""
    actions, lengths = np.full((N, T), 3), np.full(N, T)
    known = np.random.default_rng(1).normal(size=(N, T)) - 3.0

    class Policy(sequence_policy):
        def paired_sequence_log_probs(self, reference: Any, *sequences: Any) -> Any:
            raise AssertionError("scored what was known")

        def reference_sequence_log_probs(self, reference: Any, *sequences: Any) -> Any:
            return self._tempered(reference).sequence_log_probs(*sequences)

    class Louder(VectorClipReward):
        """A class of the user's that may send other actions than it gets."""

        def step(self, actions: Any) -> Any:
            return super().step(actions)

    policy, reference = Policy(1), sequence_policy(2)
    above = VectorClipReward(Unchanged(VectorKLShaping(make_envs(N), policy, reference)), max_reward=99.0)
    single = SyncVectorEnv([lambda: ClipReward(KLShaping(make_env(), policy, reference), max_reward=99.0)] * N)
    for envs in (above, single):
        envs.reset(seed=0)
        textgym.step_sequence(envs, actions, lengths, known)
    users = Louder(VectorKLShaping(make_envs(N), policy, reference), max_reward=99.0)
    users.reset(seed=0)
    assert not one_pass(users)
    with pytest.raises(AssertionError, match="scored what was known"):
        textgym.step_sequence(users, actions, lengths, known)


def test_held_rows_are_neither_changed_nor_counted(make_envs: Any) -> None:
    envs = VectorNormalizeReward(VectorClipReward(make_envs(N, reward=ids), 2.0, 9.0))
    envs.reset(seed=0)
    envs.hold_rows(np.array([True, False, False]))
    observations, rewards, _, _, infos = envs.step(np.full(N, END))
    assert rewards.tolist() == [0.0, 2.0, 2.0] and infos["_unnormalized_return"].tolist() == [False, True, True]
    assert envs.statistics.count == 2 and observations["attention_mask"][0, 3:].sum() == 0, "the hold was not passed on"


def test_a_walk_needs_a_reset(make_envs: Any) -> None:
    envs = VectorClipReward(make_envs(N, reward=ids), 2.0, 9.0)
    with pytest.raises(ValueError, match="begins with a reset"):
        textgym.step_sequence(envs, np.full((N, T), 3), np.full(N, T))
    envs.reset(seed=0)
    textgym.step_sequence(envs, np.full((N, T), 3), np.full(N, 2))
    with pytest.raises(ValueError, match="begins with a reset"):
        textgym.step_sequence(envs, np.full((N, T), 3), np.full(N, T))
