"""The vector form of KL shaping: the same numbers as single forms in a synchronous vector, for one call per step or per walk."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import textgym
from textgym.errors import StalePolicyError
from textgym.kl import LinearSchedule
from textgym.sequences import SequenceWalk, step_sequence
from textgym.wrappers import KLShaping
from textgym.wrappers.vector import KLShaping as VectorKLShaping

N, T = 3, 5


def had(infos: dict[str, Any], key: str) -> bool:
    mask = infos.get(key if key.startswith("_") else f"_{key}")
    return mask is None or bool(np.any(mask))


def assert_equal(one: Any, other: Any) -> None:
    """Exactly the same infos, types and masks included; numbers to rounding."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        # A key that no row has may be there or not.
        one, other = ({key: value for key, value in infos.items() if had(infos, key)} for infos in (one, other))
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, np.ndarray) and one.dtype == object:
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-12)
    else:
        assert one == other


@pytest.mark.parametrize("full_kl", [False, True])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_equal_to_single_forms(make_env: Any, make_envs: Any, sequence_policy: Any, mode: AutoresetMode, full_kl: bool) -> None:
    policy, reference = sequence_policy(1, temperature=1.5), sequence_policy(2)
    sync = SyncVectorEnv([lambda: KLShaping(make_env(), policy, reference, 0.3, full_kl)] * N, autoreset_mode=mode)
    vector = VectorKLShaping(make_envs(autoreset_mode=mode), policy, reference, 0.3, full_kl)
    rng = np.random.default_rng(0)
    for envs in (sync, vector):
        envs.reset(seed=0)
    seen = 0
    for _ in range(40):
        actions = np.where(rng.random(N) < 0.2, 1, rng.integers(0, 12, N))
        one, other = sync.step(actions), vector.step(actions)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
        over = one[2] | one[3]
        seen += int(over.sum())
        if mode == AutoresetMode.DISABLED and over.any():
            for envs in (sync, vector):
                envs.reset(options={"reset_mask": over})
    assert seen > 10


def test_an_autoreset_is_neither_scored_nor_penalised(make_envs: Any, tabular_policy: Any) -> None:
    policy = tabular_policy(1)
    envs = VectorKLShaping(make_envs(), policy, tabular_policy(2))
    envs.reset(seed=0)
    envs.step(np.array([1, 2, 2]))
    rows = policy.rows
    _, rewards, _, _, infos = envs.step(np.array([2, 2, 2]))
    assert policy.rows == rows + 2 and rewards[0] == 0.0
    assert infos["_log_ratio"].tolist() == [False, True, True] and infos["_prompt_index"].tolist() == [True, False, False]
    _, rewards, _, _, infos = envs.step(np.array([2, 2, 2]))
    assert infos["_log_ratio"].all() and rewards[0] == pytest.approx(-0.05 * infos["log_ratio"][0])


def test_partial_resets_begin_new_accounts_for_their_rows_only(make_envs: Any, tabular_policy: Any, hand: Any) -> None:
    policy, reference = tabular_policy(1), tabular_policy(2)
    envs = VectorKLShaping(make_envs(autoreset_mode=AutoresetMode.DISABLED), policy, reference)
    envs.reset(options={"prompt_index": [0, 1, 2]})
    envs.step(np.array([8, 8, 8]))
    options = {"reset_mask": np.array([True, False, False]), "prompt_index": [1, 1, 1]}
    envs.reset(options=options)
    assert set(options) == {"reset_mask", "prompt_index"}, "the caller's options were changed"
    assert policy.rows == 3
    *_, infos = envs.step(np.array([1, 1, 1]))
    expected = [hand(policy, reference, prompt, tokens).sum() for prompt, tokens in (([5], [1]), ([5], [8, 1]), ([6, 7], [8, 1]))]
    np.testing.assert_allclose(infos["kl_per_sequence"], expected)


def test_wrappers_above_still_find_the_reset_mask(make_env: Any, tabular_policy: Any) -> None:
    """`SyncVectorEnv` takes it out of the options."""
    sync = SyncVectorEnv([make_env] * N, autoreset_mode=AutoresetMode.DISABLED)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(VectorKLShaping(sync, tabular_policy(1), tabular_policy(2)))
    envs.reset(seed=0)
    envs.step(np.full(N, 2))
    envs.reset(options={"reset_mask": np.array([True, False, False])})
    assert envs.episode_lengths.tolist() == [0, 1, 1]


def test_beta_of_a_row_is_that_of_its_episodes_start(make_envs: Any, tabular_policy: Any) -> None:
    envs = VectorKLShaping(make_envs(), tabular_policy(1), tabular_policy(2), beta=LinearSchedule(1.0, 0.0))
    envs.reset(seed=0)
    envs.step(np.array([1, 2, 2]))
    envs.set_progress(0.25)
    envs.step(np.array([2, 2, 2]))  # row 0 begins its next episode
    _, rewards, _, _, infos = envs.step(np.array([1, 1, 2]))
    assert infos["beta"].tolist() == [0.25, 1.0, 0.0] and infos["_beta"].tolist() == [True, True, False]
    np.testing.assert_allclose(rewards, infos["unshaped_reward"] - np.array([0.25, 1.0, 1.0]) * infos["log_ratio"])


def test_without_a_policy(make_envs: Any) -> None:
    envs = VectorKLShaping(make_envs())
    envs.reset(seed=0)
    with pytest.raises(StalePolicyError, match="no `policy`"):
        envs.step(np.full(N, 2))
    with pytest.raises(StalePolicyError, match="no `policy`"):
        step_sequence(envs, np.full((N, 2), 2), np.full(N, 2))


def test_held_rows_are_not_scored(make_envs: Any, tabular_policy: Any) -> None:
    policy = tabular_policy(1)
    envs = VectorKLShaping(make_envs(), policy, tabular_policy(2))
    envs.reset(seed=0)
    envs.hold_rows(np.array([True, False, False]))
    observations, rewards, *_, infos = envs.step(np.full(N, 2))
    assert policy.rows == 2 and rewards[0] == 0.0 and not infos["_log_ratio"][0]
    assert observations["attention_mask"][0].sum() == observations["attention_mask"][0, :3].sum(), "the hold was not passed on"
    envs.hold_rows(None)
    envs.step(np.full(N, 2))
    assert policy.rows == 5
    *_, infos = envs.step(np.full(N, 1))
    np.testing.assert_allclose(infos["kl_per_token"], infos["kl_per_sequence"] / [2, 3, 3])


def plan(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(2, 12, size=(N, T)), np.array([T, 2, 4])


def test_one_pass_per_model_and_walk(make_envs: Any, sequence_policy: Any) -> None:
    policy, reference = sequence_policy(1), sequence_policy(2)
    envs = VectorKLShaping(make_envs(), policy, reference)
    envs.reset(seed=0)
    textgym.step_sequence(envs, *plan(np.random.default_rng(0)))
    assert (policy.sequence_calls, policy.calls, reference.calls) == (1, 0, 0)


def test_policies_without_sequence_methods_are_asked_once_per_step(make_envs: Any, tabular_policy: Any) -> None:
    policy = tabular_policy(1)
    envs = VectorKLShaping(make_envs(), policy, tabular_policy(2))
    envs.reset(seed=0)
    textgym.step_sequence(envs, *plan(np.random.default_rng(0)))
    assert (policy.calls, policy.rows) == (T, T + 2 + 4)


def test_log_probs_that_are_known_are_taken(make_env: Any, make_envs: Any, sequence_policy: Any) -> None:
    """Known log-probs save the policy a pass, on a batched stack and for single forms alike, through wrappers that change nothing."""
    actions, lengths = plan(np.random.default_rng(0))
    known = np.random.default_rng(1).normal(size=(N, T)) - 3.0

    class Policy(sequence_policy):
        def paired_sequence_log_probs(self, reference: Any, *sequences: Any) -> Any:
            raise AssertionError("scored what was known")

        def reference_sequence_log_probs(self, reference: Any, *sequences: Any) -> Any:
            return self._tempered(reference).sequence_log_probs(*sequences)

    policy, reference = Policy(1), sequence_policy(2)
    results = []
    for envs in (
        VectorKLShaping(make_envs(), policy, reference),
        gym.wrappers.vector.RecordEpisodeStatistics(VectorKLShaping(make_envs(), policy, reference)),
        SyncVectorEnv([lambda: gym.wrappers.TimeLimit(KLShaping(make_env(), policy, reference), 9)] * N),
    ):
        envs.reset(seed=0)
        results.append(textgym.step_sequence(envs, actions, lengths, known).rewards)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
    np.testing.assert_allclose(results[0], results[2], rtol=1e-5)
    envs = VectorKLShaping(make_envs(), sequence_policy(1), sequence_policy(2))
    envs.reset(seed=0)
    computed = textgym.step_sequence(envs, actions, lengths).rewards
    assert np.abs(computed - results[0])[:, :2].min() > 1e-3


def test_known_log_probs_do_not_pass_a_wrapper_that_may_change_states(make_envs: Any, sequence_policy: Any) -> None:
    class Looking(gym.vector.VectorWrapper):
        def step(self, actions: Any) -> Any:
            return self.env.step(actions)

    actions, lengths = plan(np.random.default_rng(0))
    results = []
    for known in (None, np.full((N, T), -3.0)):
        envs = Looking(VectorKLShaping(make_envs(), sequence_policy(1), sequence_policy(2)))
        envs.reset(seed=0)
        results.append(textgym.step_sequence(envs, actions, lengths, known).rewards)
    np.testing.assert_array_equal(results[0], results[1])


def test_a_plan_that_is_not_kept_does_no_harm(make_envs: Any, sequence_policy: Any, tabular_policy: Any) -> None:
    """Rows that leave the plan are scored step by step from then on, the others are still read from it."""
    policy = sequence_policy(1)
    planned = VectorKLShaping(make_envs(), policy, sequence_policy(2))
    plain = VectorKLShaping(make_envs(), tabular_policy(1), tabular_policy(2))
    actions, lengths = plan(np.random.default_rng(0))
    sent = actions.copy()
    sent[0, 1] = (sent[0, 1] - 1) % 10 + 2  # another token in row 0 at step 1
    for envs in (planned, plain):
        envs.reset(seed=0)
    planned.prime(actions, lengths)
    for t in range(T):
        assert planned.step(sent[:, t])[1] == pytest.approx(plain.step(sent[:, t])[1])
        if t == 1:
            assert policy.rows == 1, "only row 0 had left the plan"


def test_single_forms_that_share_policies_are_primed_together(make_env: Any, sequence_policy: Any) -> None:
    policies = [(sequence_policy(1), sequence_policy(2)), (sequence_policy(3), sequence_policy(2))]
    envs = SyncVectorEnv([lambda i=i: KLShaping(make_env(), *policies[i == 2]) for i in range(N)])
    envs.reset(seed=0)
    textgym.step_sequence(envs, *plan(np.random.default_rng(0)))
    assert [(policy.sequence_calls, policy.calls) for policy, _ in policies] == [(1, 0), (1, 0)]


def test_primed_again_for_every_walk(make_envs: Any, sequence_policy: Any, tabular_policy: Any) -> None:
    """A policy that learns between walks is asked again: nothing of an old plan is used."""
    policy = sequence_policy(1)
    envs, rng = VectorKLShaping(make_envs(), policy, sequence_policy(2)), np.random.default_rng(0)
    for seed in (1, 5):
        policy.seed = seed
        expected = VectorKLShaping(make_envs(), tabular_policy(seed), tabular_policy(2))
        actions, lengths = plan(rng)
        for one in (envs, expected):
            one.reset(seed=seed)
        with SequenceWalk(expected) as walk:
            for tokens in actions.T:
                walk.stop(lengths <= walk.result().lengths_used) if walk.result().lengths_used.any() else None
                walk.step(tokens)
            rewards = walk.result().rewards
        np.testing.assert_allclose(textgym.step_sequence(envs, actions, lengths).rewards, rewards, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_policy_that_remembers_rows_is_asked_with_every_row_in_its_place(
    make_envs: Any, tabular_policy: Any, mode: AutoresetMode
) -> None:
    """Between two questions a row's tokens grow by one, stay as they are, or are a new episode's."""

    class Remembering(tabular_policy):
        remembers_rows = True
        last: Any = None

        def log_probs(self, observations: Any, actions: Any) -> Any:
            prefixes = self.prefixes(observations)
            assert len(prefixes) == N and all(len(prefix) < 3 + T for prefix in prefixes), "a finished completion was asked about"
            for old, new in zip(self.last or prefixes, prefixes, strict=True):
                assert new == old or new[:-1] == old or len(new) <= 3, "a row was shown another's tokens"
            self.last = prefixes
            return super().log_probs(observations, actions)

    envs = VectorKLShaping(make_envs(autoreset_mode=mode), Remembering(1), Remembering(2))
    plain = VectorKLShaping(make_envs(autoreset_mode=mode), tabular_policy(1), tabular_policy(2))
    rng = np.random.default_rng(0)
    for one in (envs, plain):
        one.reset(seed=0)
    for _ in range(40):
        actions = np.where(rng.random(N) < 0.2, 1, rng.integers(0, 12, N))
        step, expected = envs.step(actions), plain.step(actions)
        np.testing.assert_allclose(step[1], expected[1])
        if mode == AutoresetMode.DISABLED and (over := step[2] | step[3]).any():
            for one in (envs, plain):
                one.reset(options={"reset_mask": over})
