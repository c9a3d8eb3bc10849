import numpy as np
import pytest
import torch

from textgym.agents import BestOfN
from textgym.exact import best_of_n


def frequencies(tree, prompts, completion_ids):
    """Relative frequencies of all completions, (N, C)."""
    places = {tree.ids(j): j for j in range(tree.num_completions)}
    counts = np.zeros(tree.rewards.shape)
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        counts[prompt, places[tuple(ids)]] += 1
    return counts / counts.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("n", [2, 5])
def test_samples_have_the_exact_distribution(task, n):
    tree, policy = task.tree, task.policy()
    size = 6000
    sampled = BestOfN(policy, task.reward, n).generate(tree.prompt_texts, tree.horizon, num_generations=size, seed=0)
    found = frequencies(tree, np.repeat(range(tree.num_prompts), size), sampled.completion_ids)
    expected = np.exp(best_of_n(tree, policy, n))
    # Σ (f − p)² / p over C − 1 degrees of freedom, per prompt; completions too rare to be counted stay out.
    often = expected * size > 5
    chi = [(np.square(f - p)[keep] / p[keep]).sum() * size / keep.sum() for f, p, keep in zip(found, expected, often, strict=True)]
    assert max(chi) < 1.6
    plain = np.exp(tree.log_probs(policy))
    assert 0.5 * np.abs(found - plain).sum(axis=1).min() > 5 * 0.5 * np.abs(found - expected).sum(axis=1).max()


def test_of_one_is_the_policy(task):
    policy, prompts = task.policy(), task.tree.prompt_texts
    own = policy.generate(prompts, 3, num_generations=4, seed=1)
    best = BestOfN(policy, task.reward, n=1).generate(prompts, 3, num_generations=4, seed=1)
    for name in ("ids", "lengths", "log_probs", "prompt_ids", "prompt_lengths"):
        assert torch.equal(getattr(own, name), getattr(best, name))
    assert own.texts == best.texts


def test_the_best_of_each_group_is_kept(task):
    policy, prompts = task.policy(), task.tree.prompt_texts
    best = BestOfN(policy, task.reward, n=3)
    kept = best.generate(prompts, 3, num_generations=2, seed=2)
    everything = policy.generate(prompts, 3, num_generations=6, seed=2)
    owners = [prompt for prompt in prompts for _ in range(6)]
    rewards = np.reshape(task.reward(prompts=owners, completion_ids=everything.completion_ids), (-1, 3))
    rows = np.arange(len(rewards)) * 3 + rewards.argmax(axis=1)
    assert kept.completion_ids == [everything.completion_ids[row] for row in rows]
    assert kept.texts == [everything.texts[row] for row in rows]
    assert torch.equal(kept.log_probs, everything.log_probs[rows])
    assert [reason for reason in kept.finish_reasons] == [everything.finish_reasons[row] for row in rows]
    assert best.reward_queries == 18
    # Prompts are prompt-major, as the policy's own.
    assert torch.equal(kept.prompt_ids, policy.generate(prompts, 3, num_generations=2, seed=0).prompt_ids)


def test_of_equals_the_first_is_kept(task):
    policy = task.policy()
    best = BestOfN(policy, lambda completions, **_: [0.0] * len(completions), n=4)
    everything = policy.generate(task.tree.prompt_texts, 3, num_generations=4, seed=3)
    assert best.generate(task.tree.prompt_texts, 3, seed=3).completion_ids == everything.completion_ids[::4]


def test_a_prompt_is_prefilled_once(task, monkeypatch):
    policy = task.policy()
    seen = []
    generate_ids = policy.generate_ids
    monkeypatch.setattr(policy, "generate_ids", lambda ids, *rest, **options: seen.append(ids.shape) or generate_ids(ids, *rest, **options))
    BestOfN(policy, task.reward, n=8).generate(task.tree.prompt_texts, 3, seed=0)
    assert seen == [(3, 3)]


def test_columns_reach_the_reward(task):
    rows = [{"prompt": prompt, "wanted": wanted} for prompt, wanted in zip(task.tree.prompt_texts, (1, 2, 3), strict=True)]
    seen = []

    def reward(completion_ids, wanted, **_):
        seen.extend(wanted)
        return [-abs(len(ids) - length) for ids, length in zip(completion_ids, wanted, strict=True)]

    kept = BestOfN(task.policy(), reward, n=64).generate(rows, 3, seed=0)
    assert seen == [1] * 64 + [2] * 64 + [3] * 64
    assert kept.lengths.tolist() == [1, 2, 3]


def test_dense_rewards_are_summed(task):
    from textgym.rewards import token_level

    @token_level
    def zeros_of_token_0(completion_ids, **_):
        return [[float(token == 0) for token in ids] for ids in completion_ids]

    kept = BestOfN(task.policy(), zeros_of_token_0, n=200).generate(task.tree.prompt_texts, 3, seed=0)
    assert kept.completion_ids == [[0, 0, 0]] * 3


def test_truncated_sampling_keeps_its_sets(task):
    kept = BestOfN(task.policy(top_k=2), task.reward, n=3).generate(task.tree.prompt_texts, 3, seed=0)
    assert kept.kept is not None and len(kept.kept) == 3


def test_wrong_arguments_are_errors(task):
    with pytest.raises(ValueError, match="`n`"):
        BestOfN(task.policy(), task.reward, n=0)
    with pytest.raises(ValueError, match="`num_generations`"):
        BestOfN(task.policy(), task.reward).generate(["w0"], num_generations=0)
