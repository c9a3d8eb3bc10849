"""The single form of KL shaping: numbers by hand, and every way to misuse it."""

import copy
import math
import multiprocessing
import warnings
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

from textgym.errors import EpisodeEndedError, StalePolicyError
from textgym.kl import AdaptiveKLController, LinearSchedule
from textgym.wrappers import KLShaping, find_kl_shaping
from textgym.wrappers.vector import KLShaping as VectorKLShaping

PROMPT, TOKENS = [2, 3, 4], [6, 2, 9, 1]


def run(env: gym.Env, tokens: list[int], prompt_index: int = 0) -> list[tuple[float, dict[str, Any]]]:
    env.reset(options={"prompt_index": prompt_index})
    steps = [env.step(token) for token in tokens]
    return [(float(reward), info) for _, reward, _, _, info in steps]


def test_rewards_and_infos_by_hand(make_env: Any, tabular_policy: Any, hand: Any) -> None:
    policy, reference, beta = tabular_policy(1), tabular_policy(2), 0.3
    plain = [reward for reward, _ in run(make_env(), TOKENS)]
    d = hand(policy, reference, PROMPT, TOKENS)
    steps = run(KLShaping(make_env(), policy, reference, beta=beta), TOKENS)
    for t, (reward, info) in enumerate(steps):
        assert reward == pytest.approx(plain[t] - beta * d[t])
        assert info["unshaped_reward"] == plain[t] and info["log_ratio"] == pytest.approx(d[t])
        assert ("kl_per_sequence" in info) == (t == len(TOKENS) - 1)
    final = steps[-1][1]
    assert final["kl_per_sequence"] == pytest.approx(d.sum())
    assert final["kl_per_token"] == pytest.approx(d.mean())
    assert final["kl_k2_per_sequence"] == pytest.approx((d**2 / 2).sum())
    assert final["kl_k3_per_sequence"] == pytest.approx((np.exp(-d) - 1 + d).sum())
    assert final["unshaped_return"] == pytest.approx(sum(plain))
    assert final["shaped_return"] == pytest.approx(sum(plain) - beta * d.sum()), "the sum is r - β Σ d"
    assert final["shaped_return"] == pytest.approx(sum(reward for reward, _ in steps))
    assert final["beta"] == beta and final["completion_ids"] == TOKENS


def test_an_episode_begins_a_new_account(make_env: Any, tabular_policy: Any, hand: Any) -> None:
    policy, reference = tabular_policy(1), tabular_policy(2)
    env = KLShaping(make_env(), policy, reference)
    run(env, [5, 5])  # given up half way
    assert run(env, [8, 1], 1)[-1][1]["kl_per_sequence"] == pytest.approx(hand(policy, reference, [5], [8, 1]).sum())


def test_paired_log_probs_put_the_reference_at_the_policys_temperature(make_env: Any, sequence_policy: Any, tabular_policy: Any) -> None:
    env = KLShaping(make_env(), sequence_policy(1, temperature=2.0), sequence_policy(2))
    at_two = KLShaping(make_env(), tabular_policy(1, temperature=2.0), tabular_policy(2, temperature=2.0))
    assert run(env, TOKENS)[-1][1]["kl_per_sequence"] == pytest.approx(run(at_two, TOKENS)[-1][1]["kl_per_sequence"])


def test_full_kl(make_env: Any, sequence_policy: Any) -> None:
    policy, reference = sequence_policy(1), sequence_policy(2)
    final = run(KLShaping(make_env(), policy, reference, full_kl=True), TOKENS)[-1][1]
    exact = 0.0
    for t in range(len(TOKENS)):
        own, other = policy.distribution([*PROMPT, *TOKENS[:t]]), reference.distribution([*PROMPT, *TOKENS[:t]])
        exact += float(np.sum(np.exp(own) * (own - other)))
    assert final["kl_full_per_sequence"] == pytest.approx(exact)
    assert "kl_full_per_sequence" not in run(KLShaping(make_env(), policy, reference), TOKENS)[-1][1]


def test_full_kl_needs_a_policy_that_has_it(make_env: Any, tabular_policy: Any, sequence_policy: Any) -> None:
    with pytest.raises(ValueError, match="`full_kl=True` needs a `policy`"):
        KLShaping(make_env(), tabular_policy(1), tabular_policy(2), full_kl=True)
    env = KLShaping(make_env(), full_kl=True)
    with pytest.raises(ValueError, match="`full_kl=True` needs a `policy`"):
        env.set_policy(tabular_policy(1))
    env.set_policy(sequence_policy(1))
    env.set_reference(sequence_policy(2))
    assert run(env, TOKENS)[-1][1]["kl_full_per_sequence"] > 0


def test_beta_changes_between_episodes_only(make_env: Any, tabular_policy: Any) -> None:
    env = KLShaping(make_env(), tabular_policy(1), tabular_policy(2), beta=LinearSchedule(1.0, 0.0))
    env.reset(seed=0)
    env.step(3)
    env.set_progress(0.5)
    assert env.beta == 0.5
    _, reward, _, _, info = env.step(1)
    assert reward == pytest.approx(info["unshaped_reward"] - 1.0 * info["log_ratio"]) and info["beta"] == 1.0
    assert run(env, [3, 1])[-1][1]["beta"] == 0.5


def test_adaptive_beta(make_env: Any, tabular_policy: Any) -> None:
    controller = AdaptiveKLController(0.2, target=1.0, horizon=10)
    env = KLShaping(make_env(), tabular_policy(1), tabular_policy(2), beta=controller)
    assert env.controller is controller
    final = run(env, TOKENS)[-1][1]
    assert final["beta"] == 0.2
    controller.update(100.0, 5)
    assert env.beta == pytest.approx(0.2 * 1.1)
    assert run(env, TOKENS)[-1][1]["beta"] == pytest.approx(0.2 * 1.1)
    assert KLShaping(make_env(), beta=0.3).controller is None


@pytest.mark.parametrize("beta", [-1.0, math.nan, math.inf, "0.1 or so"])
def test_bad_beta(make_env: Any, beta: Any) -> None:
    with pytest.raises(ValueError, match="`beta` must be"):
        KLShaping(make_env(), beta=beta)


def test_beta_zero_leaves_the_reward_and_reports(make_env: Any, tabular_policy: Any) -> None:
    steps = run(KLShaping(make_env(), tabular_policy(1), tabular_policy(2), beta=0), TOKENS)
    assert all(reward == info["unshaped_reward"] for reward, info in steps) and steps[-1][1]["kl_per_sequence"] != 0


def test_stepping_without_a_policy_is_an_error_that_steps_nothing(make_env: Any, tabular_policy: Any) -> None:
    env = KLShaping(make_env())
    before, _ = env.reset(seed=0)
    with pytest.raises(StalePolicyError, match=r"no `policy`.*set_policy"):
        env.step(3)
    env.set_policy(tabular_policy(1))
    with pytest.raises(StalePolicyError, match=r"no `reference`.*set_reference"):
        env.step(3)
    env.set_reference(tabular_policy(2))
    observation, *_ = env.step(3)
    assert observation["attention_mask"].sum() == before["attention_mask"].sum() + 1


def test_a_policy_must_follow_the_protocol(make_env: Any, tabular_policy: Any) -> None:
    with pytest.raises(ValueError, match=r"`policy` must have a method `log_probs.*ActorCriticAdapter"):
        KLShaping(make_env(), policy=object())
    with pytest.raises(ValueError, match="`reference` must have a method"):
        KLShaping(make_env(), tabular_policy(1)).set_reference(tabular_policy)  # the class, not an object of it


def test_an_infinite_penalty_is_an_error(make_env: Any, tabular_policy: Any) -> None:
    class Truncated(tabular_policy):
        def log_probs(self, observations: Any, actions: Any) -> Any:
            return np.where(actions == 3, -np.inf, super().log_probs(observations, actions))

    for policies in ((Truncated(1), tabular_policy(2)), (tabular_policy(1), Truncated(2))):
        env = KLShaping(make_env(), *policies)
        env.reset(seed=0)
        env.step(2)
        with pytest.raises(ValueError, match=r"action 3 .* -inf"):
            env.step(3)


def test_shaping_twice_is_an_error(make_env: Any, make_envs: Any, tabular_policy: Any) -> None:
    env = KLShaping(make_env(), tabular_policy(1), tabular_policy(2))
    with pytest.raises(ValueError, match="KL-shaped already"):
        KLShaping(gym.wrappers.TransformReward(env, lambda r: r), tabular_policy(1), tabular_policy(2))
    with pytest.raises(ValueError, match="KL-shaped already"):
        VectorKLShaping(gym.vector.SyncVectorEnv([lambda: env]))
    with pytest.raises(ValueError, match="KL-shaped already"):
        VectorKLShaping(VectorKLShaping(make_envs()))


def test_it_can_be_found(make_env: Any, make_envs: Any) -> None:
    env = KLShaping(make_env())
    assert find_kl_shaping(make_env()) == [] == find_kl_shaping(make_envs())
    assert find_kl_shaping(gym.wrappers.TimeLimit(env, 3)) == [env]
    assert find_kl_shaping(gym.vector.SyncVectorEnv([lambda: env])) == [env]
    shaped = VectorKLShaping(make_envs())
    assert find_kl_shaping(gym.wrappers.vector.RecordEpisodeStatistics(shaped)) == [shaped]


def test_both_checkers_pass_without_a_warning(make_env: Any, tabular_policy: Any) -> None:
    env = KLShaping(make_env(), tabular_policy(1), tabular_policy(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version")  # said of every wrapper
        check_env(env)
        check_env_for_sb3(env)


def test_its_specification_makes_it_again_with_the_same_policy(make_env: Any, tabular_policy: Any) -> None:
    class Heavy(tabular_policy):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied a model")

    policy, reference, controller = Heavy(1), Heavy(2), AdaptiveKLController(0.2, 1.0, 10)
    env = gym.wrappers.TimeLimit(KLShaping(make_env(), policy, reference, beta=controller), 4)
    spec = env.spec
    copy.deepcopy(spec)
    again = gym.make(spec)
    (shaping,) = find_kl_shaping(again)
    assert shaping.policy is policy and shaping.reference is reference and shaping.controller is controller


def test_an_observation_that_the_caller_changes_does_not_change_the_score(make_env: Any, tabular_policy: Any, hand: Any) -> None:
    policy, reference = tabular_policy(1), tabular_policy(2)
    env = KLShaping(make_env(), policy, reference)
    observation, _ = env.reset(options={"prompt_index": 0})
    for t, token in enumerate(TOKENS):
        observation["input_ids"][:] = 0
        observation, _, _, _, info = env.step(token)
        assert info["log_ratio"] == pytest.approx(hand(policy, reference, PROMPT, TOKENS)[t])


def test_errors_of_the_environment_come_first(make_env: Any, tabular_policy: Any) -> None:
    policy = tabular_policy(1)
    env = KLShaping(make_env(), policy, tabular_policy(2))
    run(env, TOKENS)
    calls = policy.calls
    with pytest.raises(EpisodeEndedError):
        env.step(2)
    env.reset()
    with pytest.raises(ValueError, match="`action`"):
        env.step(99)
    assert policy.calls == calls


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium logs errors of workers as warnings
def test_a_worker_process_refuses_and_names_the_vector_form(make_env: Any, tabular_policy: Any, capfd: Any) -> None:
    policy, reference = tabular_policy(1), tabular_policy(2)
    envs = AsyncVectorEnv([lambda: KLShaping(make_env(), policy, reference)] * 2)
    try:
        with pytest.raises(StalePolicyError, match=r"textgym\.wrappers\.vector\.KLShaping"):
            envs.reset(seed=0)
    finally:
        envs.close(terminate=True)
        capfd.readouterr()


def test_a_process_that_trains_by_itself_is_no_worker(make_env: Any, tabular_policy: Any, monkeypatch: Any) -> None:
    """As under `torch.multiprocessing.spawn`, where policy and environment live in one child process."""
    env = KLShaping(make_env(), tabular_policy(1), tabular_policy(2))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=False, name="SpawnProcess-1"))
    run(env, TOKENS)
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=False, name="Worker<AsyncVectorEnv>-0"))
    with pytest.raises(StalePolicyError):
        env.step(2)
