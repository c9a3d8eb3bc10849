"""KL shaping with language models: cached steps, one-pass walks and known log-probs give the same numbers."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import textgym
from textgym.agents.policy import CausalLMPolicy
from textgym.wrappers import KLShaping
from textgym.wrappers.vector import KLShaping as VectorKLShaping

N, T = 4, 6
SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 0.7, "top_k": 9}, {"temperature": 1.3, "top_p": 0.8}]


@pytest.fixture
def arguments(tokenizer: Any) -> dict[str, Any]:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [0.1 * len(text) for text in completions]

    return {"prompts": ["a", "good film", "it was, it was"], "tokenizer": tokenizer, "reward": reward, "max_new_tokens": T}


@pytest.fixture
def policies(model: Any, tokenizer: Any) -> Any:
    """Makes a policy and a reference that differ, both with the sampling given."""

    def make(**sampling: Any) -> tuple[CausalLMPolicy, CausalLMPolicy]:
        policy = CausalLMPolicy(model, tokenizer, device=str(model.device), **sampling)
        reference = policy.frozen_copy()
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        return policy, reference

    return make


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_steps_and_walks_agree(arguments: Any, policies: Any, sampling: dict[str, Any]) -> None:
    policy, reference = policies(**sampling)
    make = [
        lambda: VectorKLShaping(gym.make_vec("TextGen-v0", num_envs=N, **arguments), policy, reference, 0.5, full_kl=True),
        lambda: gym.vector.SyncVectorEnv([lambda: KLShaping(gym.make("TextGen-v0", **arguments), policy, reference, 0.5, True)] * N),
    ]
    observations, _ = make[0]().reset(seed=0)
    generation = policy.generate(observations, max_new_tokens=T, seed=0)
    actions, lengths = generation.ids.cpu().numpy(), generation.lengths.cpu().numpy()
    results = []
    for known in (None, generation.log_probs.cpu().numpy()):
        for made in make:
            envs = made()
            envs.reset(seed=0)
            results.append(textgym.step_sequence(envs, actions, lengths, known))
    stepped, shaped_returns = make[0](), np.zeros(N)
    stepped.reset(seed=0)
    active, finals = np.ones(N, dtype=bool), [{}] * N
    for tokens in actions.T:
        _, rewards, terminated, _, infos = stepped.step(tokens)
        shaped_returns += np.where(active, rewards, 0.0)
        for i in np.flatnonzero(active & terminated):
            finals[i] = {key: infos[key][i] for key in ("kl_per_sequence", "kl_full_per_sequence", "unshaped_return", "shaped_return")}
        active &= ~terminated
        if not active.any():
            break
    for result in results:
        np.testing.assert_allclose(result.rewards.sum(1), shaped_returns, atol=1e-4)
        for info, final in zip(result.infos, finals, strict=True):
            for key, value in final.items():
                assert info[key] == pytest.approx(value, abs=1e-4), key
    assert max(abs(final["kl_per_sequence"]) for final in finals) > 0.01


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_before_any_update_the_kl_is_zero(arguments: Any, model: Any, tokenizer: Any, sampling: dict[str, Any]) -> None:
    policy = CausalLMPolicy(model, tokenizer, device=str(model.device), **sampling)
    envs = VectorKLShaping(gym.make_vec("TextGen-v0", num_envs=N, **arguments), policy, policy.reference(), full_kl=True)
    observations, _ = envs.reset(seed=0)
    generation = policy.generate(observations, max_new_tokens=T, seed=0)
    actions, lengths = generation.ids.cpu().numpy(), generation.lengths.cpu().numpy()
    for info in textgym.step_sequence(envs, actions, lengths).infos:
        for key in ("kl_per_sequence", "kl_k2_per_sequence", "kl_k3_per_sequence", "kl_full_per_sequence"):
            assert info[key] == pytest.approx(0.0, abs=1e-6)
        assert info["shaped_return"] == pytest.approx(info["unshaped_return"], abs=1e-6)


def test_stepping_keeps_the_caches_when_rows_are_reset_at_different_times(arguments: Any, policies: Any, monkeypatch: Any) -> None:
    """One new token per row and step goes through the model, also in steps that reset some of the rows."""
    policy, reference = policies()
    envs = VectorKLShaping(gym.make_vec("TextGen-v0", num_envs=N, **arguments), policy, reference)
    envs.reset(seed=0)
    tokens, prefilled = [], []
    features, prefill = policy.backbone.features, policy._acting._prefill
    monkeypatch.setattr(policy.backbone, "features", lambda ids, *rest: tokens.append(ids.shape[1]) or features(ids, *rest))
    monkeypatch.setattr(policy._acting, "_prefill", lambda *rest: prefilled.append(int(rest[-1].sum())) or prefill(*rest))
    resets = 0
    for step in range(20):
        actions = np.full(N, 5)
        actions[step % N] = envs.unwrapped.eos_token_ids[0] if step % 3 == 0 else 5
        *_, infos = envs.step(actions)
        resets += int(infos.get("_prompt_index", np.zeros(1)).sum())
    assert resets > 5
    assert sum(prefilled) <= N + resets, "rows that went on were run again from their starts"
