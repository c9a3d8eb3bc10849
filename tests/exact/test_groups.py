"""GRPO on a tree, exactly: against every ordered group, against closed forms, and at rest."""

import itertools

import numpy as np
import pytest

from textgym.exact import (
    GroupAdvantages,
    TokenTree,
    expected_reward,
    frontier_reward,
    grpo_fixed_point,
    grpo_logit_gradient,
    grpo_token_weights,
    hard_tree,
    kl_divergence,
    soft_solution,
    total_variation,
)


@pytest.fixture
def tree():
    return TokenTree(2, 3, 1, [[0], [0, 0]], lambda i, y: float(np.sin(3 * len(y) + 2 * sum(y) + i)) + 3 * i)


def every_ordered_group(tree, log_probs, group, scale):
    """π(y) E[A | y] by summing over all C^G groups."""
    probs, found = np.exp(log_probs), np.zeros_like(log_probs)
    for prompt in range(tree.num_prompts):
        for members in itertools.product(range(tree.num_completions), repeat=group):
            rewards = tree.rewards[prompt, list(members)]
            deviations = rewards - rewards.mean()
            if scale:
                deviations = deviations / (rewards.std(ddof=1) + 1e-4)
            found[prompt, members[0]] += probs[prompt, list(members)].prod() * deviations[0]
    return found


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("group", [2, 3, 4])
def test_advantages_are_those_of_every_ordered_group(tree, group, scale):
    log_probs = tree.log_probs(tree.random_policy(1))
    found = GroupAdvantages(tree, group, scale=scale)(log_probs)
    np.testing.assert_allclose(found, every_ordered_group(tree, log_probs, group, scale), atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-12)


def test_unscaled_advantages_in_closed_form(tree):
    """The deviation from a mean that contains the own return: (1 − 1/G) (r − E r)."""
    log_probs = tree.log_probs(tree.random_policy(1))
    probs = np.exp(log_probs)
    centred = tree.rewards - (probs * tree.rewards).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(GroupAdvantages(tree, 5, scale=False)(log_probs), probs * 0.8 * centred, atol=1e-12)


def test_scaled_pairs_only_know_who_won(tree):
    log_probs = tree.log_probs(tree.random_policy(1))
    signs = np.sign(tree.rewards[:, :, None] - tree.rewards[:, None, :])
    expected = np.exp(log_probs) * (signs * np.exp(log_probs)[:, None, :]).sum(axis=2) / np.sqrt(2)
    np.testing.assert_allclose(GroupAdvantages(tree, 2, eps=0.0 + 1e-12)(log_probs), expected, atol=1e-9)


@pytest.mark.parametrize("reduction", ["sequence_sum", "sequence_mean"])
def test_gradient_is_the_sum_of_the_tokens_scores(tree, reduction):
    policy, reference = tree.random_policy(1), tree.random_policy(3)
    advantages = GroupAdvantages(tree, 3)
    weights = grpo_token_weights(advantages, policy, reference, 0.3, reduction=reduction)
    expected = np.zeros_like(policy)
    log_probs = tree.log_probs(policy)
    drawn = advantages(log_probs)
    for prompt, j in itertools.product(range(tree.num_prompts), range(tree.num_completions)):
        for t in range(tree.lengths[j]):
            state, action = tree.state_of[j, t], tree.completions[j, t]
            pull = 1 - np.exp(reference[prompt, state, action] - policy[prompt, state, action])
            weight = (drawn[prompt, j] - 0.3 * np.exp(log_probs[prompt, j]) * pull) / tree.num_prompts
            weight /= tree.lengths[j] if reduction == "sequence_mean" else 1
            assert weights[prompt, j, t] == pytest.approx(weight)
            score = -np.exp(policy[prompt, state])
            score[action] += 1
            expected[prompt, state] += weight * score
    found = grpo_logit_gradient(advantages, policy, reference, 0.3, reduction=reduction)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 0.04])
@pytest.mark.parametrize("reduction", ["sequence_sum", "sequence_mean"])
def test_at_the_fixed_point_nothing_moves_and_it_is_not_the_optimum(beta, reduction):
    tree = hard_tree(0, vocab_size=3, horizon=2)
    reference, advantages = tree.random_policy(0), GroupAdvantages(hard_tree(0, vocab_size=3, horizon=2), 4)
    policy = grpo_fixed_point(advantages, reference, beta, reduction=reduction)
    assert np.abs(grpo_logit_gradient(advantages, policy, reference, beta, reduction=reduction)).max() < 1e-6
    assert total_variation(tree, policy, reference).min() > 0.3
    optimum = soft_solution(tree, reference, beta).policy
    assert total_variation(tree, policy, optimum).max() > (0.2 if beta == 0.5 else 0.02)


def test_errors_name_the_argument(tree):
    with pytest.raises(ValueError, match="`num_generations` must be at least 2"):
        GroupAdvantages(tree, 1)
    with pytest.raises(ValueError, match="`num_generations` must be small enough"):
        GroupAdvantages(hard_tree(0), 5)
    with pytest.raises(ValueError, match="`beta` must be positive"):
        grpo_fixed_point(GroupAdvantages(tree, 2), tree.random_policy(0), 0.0)
    with pytest.raises(RuntimeError, match="did not come to rest in 3"):
        grpo_fixed_point(GroupAdvantages(tree, 2), tree.random_policy(0), 0.1, max_iterations=3)
    with pytest.raises(ValueError, match="`kl` must be"):
        frontier_reward(tree, tree.random_policy(0), -1.0)


def test_frontier_reward_goes_through_the_optima(tree):
    reference = tree.random_policy(0)
    assert frontier_reward(tree, reference, 0.0) == pytest.approx(expected_reward(tree, reference).mean(), abs=1e-4)
    for beta in (1.0, 0.2):
        optimum = soft_solution(tree, reference, beta).policy
        kl = kl_divergence(tree, optimum, reference).mean()
        assert frontier_reward(tree, reference, kl) == pytest.approx(expected_reward(tree, optimum).mean(), abs=1e-6)
    other = tree.random_policy(5)
    assert frontier_reward(tree, reference, kl_divergence(tree, other, reference).mean()) >= expected_reward(tree, other).mean()
    assert frontier_reward(tree, reference, 100.0) == pytest.approx(tree.rewards.max(axis=1).mean(), abs=1e-3)
