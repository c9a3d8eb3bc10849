import numpy as np
import pytest
import torch

from textgym.agents import SFT, CausalLMPolicy, RejectionSampling, keep_best
from textgym.exact import best_of_n, completion_distance, expected_reward, hard_tree
from textgym.exact.models import tiny_lm


def test_the_best_of_each_prompt_become_examples(task):
    policy = task.policy()
    samples = keep_best(policy, task.tree.prompt_texts, task.reward, n=4, max_new_tokens=3, seed=0)
    everything = policy.generate(task.tree.prompt_texts, 3, num_generations=4, seed=0)
    assert samples.rewards.shape == samples.kept.shape == (3, 4)
    best = samples.rewards.argmax(axis=1)
    assert (samples.kept.sum(axis=1) == 1).all() and samples.kept[range(3), best].all()
    for row, example in enumerate(samples.examples):
        assert example["prompt_ids"] == list(task.tree.prompts[row])
        assert example["completion_ids"] == everything.completion_ids[4 * row + best[row]]
        assert example["completion"] == everything.texts[4 * row + best[row]]
        assert example["reward"] == samples.rewards[row].max()
    assert samples.reward_queries == task.reward.rows == 12
    assert samples.kept_reward_mean == pytest.approx(samples.rewards.max(axis=1).mean())


def test_nothing_is_tokenised_again(task):
    """Completions cut at the limit have no EOS, and get none."""
    samples = keep_best(task.policy(), task.tree.prompt_texts * 20, task.reward, n=1, max_new_tokens=3, seed=0)
    agent = SFT(task.policy(), samples.examples)
    rows = agent.examples.index[:, 0].numpy()
    trained = [agent.examples.completions.padded(np.array([row]), left=False)[0].tolist() for row in rows]
    assert trained == [example["completion_ids"] for example in samples.examples]
    assert any(ids[-1] != task.tree.eos_token_id for ids in trained)


def test_a_threshold_and_a_quantile(task):
    options = {"n": 8, "max_new_tokens": 3, "seed": 0}
    prompts = task.tree.prompt_texts * 10
    everything = keep_best(task.policy(), prompts, task.reward, **options)
    above = keep_best(task.policy(), prompts, task.reward, threshold=1.0, **options)
    assert (above.rewards == everything.rewards).all()
    assert (above.kept == (above.rewards >= 1.0)).all() and 0 < above.kept.sum() < above.kept.size
    assert sorted(example["reward"] for example in above.examples) == sorted(above.rewards[above.rewards >= 1.0])
    tenth = keep_best(task.policy(), prompts, task.reward, quantile=0.9, **options)
    assert (tenth.kept == (tenth.rewards >= np.quantile(tenth.rewards, 0.9))).all()
    assert tenth.kept_reward_mean > tenth.reward_mean


def test_batches_change_who_is_drawn_but_not_what_belongs_together(task):
    prompts = task.tree.prompt_texts * 5
    for batch_size in (2, 64):
        samples = keep_best(task.policy(), prompts, task.reward, n=3, max_new_tokens=3, seed=0, batch_size=batch_size)
        assert [example["prompt"] for example in samples.examples] == prompts
        expected = task.reward(prompts=prompts, completion_ids=[example["completion_ids"] for example in samples.examples])
        assert [example["reward"] for example in samples.examples] == expected


@pytest.mark.slow
def test_one_round_to_convergence_is_best_of_n(device):
    """The best of 4 of π_ref, in 3 · 3,000 samples, learned to convergence: what `best_of_n` computes, not π_ref."""
    tree = hard_tree(0, vocab_size=3, horizon=2)
    policy = CausalLMPolicy(tiny_lm(tree), tree.tokenizer(), device=device)
    expected, start = best_of_n(tree, policy, 4), tree.log_probs(policy)
    agent = RejectionSampling(
        policy,
        tree.prompt_texts * 3000,
        tree.reward_function(),
        learning_rate=lambda left: 1e-2 * left,
        n=4,
        max_new_tokens=2,
        n_epochs=12,
        batch_size=900,
        sampling_batch_size=3000,
        seed=0,
    )
    (found,) = agent.learn().rounds
    assert agent.reward_queries == 3 * 3000 * 4
    assert completion_distance(start, expected).min() > 0.25
    assert completion_distance(tree.log_probs(policy), expected).max() < 0.04  # seeds 0 to 3: at most 0.02, half of it sampling noise
    # Cross-entropy of the samples per token: the entropy of best-of-n over its mean length.
    entropy = -(np.exp(expected) * expected).sum() / (np.exp(expected) * tree.lengths).sum()
    assert found.nats_per_token == pytest.approx(entropy, abs=0.02)


def test_rounds_go_on_from_the_policy_as_it_is(task):
    tree, policy = task.tree, task.policy()
    before = expected_reward(tree, policy).mean()
    options = {"n": 4, "max_new_tokens": 3, "n_epochs": 2, "seed": 1}
    agent = RejectionSampling(policy, tree.prompt_texts * 40, task.reward, 3e-3, **options)
    rounds = agent.learn(2).learn(1).rounds
    means = [one.samples.reward_mean for one in rounds]
    assert means[0] == pytest.approx(before, abs=0.2)
    assert means[0] < means[1] < means[2] < expected_reward(tree, policy).mean()
    assert [one.samples.reward_queries for one in rounds] == [480] * 3
    assert agent.reward_queries == task.reward.rows == 1440


def test_prompts_come_in_random_order_without_repetition(task):
    prompts = [{"prompt": text, "number": i} for i, text in enumerate(task.tree.prompt_texts * 4)]
    seen = []

    def reward(completions, number, **_):
        seen.append(sorted(set(number)))
        return [0.0] * len(completions)

    RejectionSampling(task.policy(), prompts, reward, n=2, prompts_per_round=6, max_new_tokens=3, seed=0).learn(4)
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(12))
    assert seen[0] != list(range(6))


def test_the_same_seed_is_the_same_run(task):
    def train(seed):
        policy = task.policy()
        RejectionSampling(policy, task.tree.prompt_texts * 4, task.reward, 1e-2, max_new_tokens=3, batch_size=4, seed=seed).learn(2)
        return torch.cat([parameter.flatten() for parameter in policy.parameters()])

    assert torch.equal(train(0), train(0))
    assert not torch.equal(train(0), train(1))


def test_wrong_arguments_are_errors(task):
    prompts = task.tree.prompt_texts
    with pytest.raises(ValueError, match="not both"):
        keep_best(task.policy(), prompts, task.reward, threshold=0.0, quantile=0.5)
    with pytest.raises(ValueError, match="highest reward is"):
        keep_best(task.policy(), prompts, task.reward, threshold=100.0, max_new_tokens=3)
    with pytest.raises(ValueError, match="`quantile`"):
        keep_best(task.policy(), prompts, task.reward, quantile=1.0)
    with pytest.raises(ValueError, match="`rounds`"):
        RejectionSampling(task.policy(), prompts, task.reward).learn(0)
    with pytest.raises(TypeError, match="warmth"):
        RejectionSampling(task.policy(), prompts, task.reward, warmth=1)
