import math

import numpy as np
import pytest

from textgym.exact import (
    HARD_TREE_BETA,
    TokenTree,
    completion_kl,
    expected_reward,
    frontier,
    hard_solution,
    hard_tree,
    kl_divergence,
    logit_gradient,
    objective,
    policy_values,
    restrict,
    soft_solution,
    total_variation,
)


@pytest.fixture
def tree():
    return hard_tree(0)


@pytest.fixture
def reference(tree):
    return tree.random_policy(1, scale=1.5)


def normalised(logits):
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def test_one_step_by_hand():
    """Two completions with π_ref = (1/4, 3/4), r = (0, β ln 3): Z = 1/4 + 9/4, π* = (1/10, 9/10)."""
    beta = 0.5
    tree = TokenTree(2, 1, 1, [[0]], lambda i, y: beta * math.log(3) * y[0])
    reference = np.log([[[0.25, 0.75]]])
    solution = soft_solution(tree, reference, beta)
    np.testing.assert_allclose(np.exp(solution.log_probs), [[0.1, 0.9]])
    np.testing.assert_allclose(solution.log_z, [math.log(2.5)])
    np.testing.assert_allclose(solution.objective, [beta * math.log(2.5)])
    np.testing.assert_allclose(total_variation(tree, solution.policy, reference), [0.15])
    np.testing.assert_allclose(kl_divergence(tree, solution.policy, reference), [0.1 * math.log(0.4) + 0.9 * math.log(1.2)])
    np.testing.assert_allclose(expected_reward(tree, reference), [0.75 * beta * math.log(3)])


def test_optimum_maximises_the_objective(tree, reference):
    """No policy near or far does better, and the optimum attains β log Z."""
    solution = soft_solution(tree, reference, HARD_TREE_BETA)
    best = objective(tree, solution.policy, reference, HARD_TREE_BETA)
    np.testing.assert_allclose(best, solution.objective)
    rng = np.random.default_rng(0)
    for scale in (0.01, 0.1, 1.0, 5.0):
        other = normalised(solution.policy + scale * rng.standard_normal(solution.policy.shape))
        assert (objective(tree, other, reference, HARD_TREE_BETA) < best).all()


@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
def test_optimum_with_a_discount(tree, reference, gamma):
    """E[γ^(T−1) r − β Σ_t γ^t log(π/π_ref)(a_t|s_t)], summed over all completions, is V*(s_0) at π*, and less elsewhere."""
    solution = soft_solution(tree, reference, HARD_TREE_BETA, gamma)

    def discounted(policy):
        ratios = (tree.token_log_probs(policy) - tree.token_log_probs(reference)) * gamma ** np.arange(tree.horizon)
        returns = tree.rewards * gamma ** (tree.lengths - 1) - HARD_TREE_BETA * ratios.sum(axis=-1)
        return (np.exp(tree.log_probs(policy)) * returns).sum(axis=-1)

    np.testing.assert_allclose(discounted(solution.policy), solution.state_values[:, 0])
    np.testing.assert_allclose(discounted(solution.policy), solution.objective)
    np.testing.assert_allclose(HARD_TREE_BETA * solution.log_z, solution.objective)
    np.testing.assert_allclose(tree.log_probs(solution.policy), solution.log_probs, atol=1e-12)
    rng = np.random.default_rng(0)
    for scale in (0.01, 0.1, 1.0, 5.0):
        other = normalised(solution.policy + scale * rng.standard_normal(solution.policy.shape))
        assert (discounted(other) < solution.objective).all()


def test_distance_to_the_optimum_in_reward_is_a_kl(tree, reference):
    """J(π*) − J(π) = β KL(π ‖ π*) for every π: an identity that ties J, KL and π* together."""
    policy = tree.random_policy(7)
    solution = soft_solution(tree, reference, HARD_TREE_BETA)
    gap = solution.objective - objective(tree, policy, reference, HARD_TREE_BETA)
    np.testing.assert_allclose(gap, HARD_TREE_BETA * kl_divergence(tree, policy, solution.policy))


def test_soft_values_agree_with_the_closed_form(tree, reference):
    solution = soft_solution(tree, reference, HARD_TREE_BETA)
    np.testing.assert_allclose(solution.state_values[:, 0], HARD_TREE_BETA * solution.log_z)
    np.testing.assert_allclose(tree.log_probs(solution.policy), solution.log_probs, atol=1e-12)
    np.testing.assert_allclose(np.exp(solution.policy).sum(axis=-1), 1.0)


def test_shift_of_the_reward_changes_no_optimum(tree, reference):
    shifted = TokenTree(5, 3, 4, tree.prompts, tree.rewards + np.array([[10.0], [-20.0], [0.5]]))
    np.testing.assert_allclose(soft_solution(shifted, reference, 0.5).log_probs, soft_solution(tree, reference, 0.5).log_probs)


def test_small_beta_tends_to_the_hard_optimum(tree, reference):
    soft, hard = soft_solution(tree, reference, 1e-3), hard_solution(tree)
    assert soft.log_probs.argmax(axis=-1).tolist() == hard.completions.tolist() == tree.rewards.argmax(axis=-1).tolist()
    np.testing.assert_allclose(soft.state_values, hard.state_values, atol=0.01)


def test_hard_values_with_discount(tree):
    gamma = 0.5
    solution = hard_solution(tree, gamma)
    brute = [max(tree.rewards[i, j] * gamma ** (tree.lengths[j] - 1) for j in range(85)) for i in range(3)]
    np.testing.assert_allclose(solution.state_values[:, 0], brute)
    np.testing.assert_allclose(solution.action_values.max(axis=-1), solution.state_values)
    assert (solution.greedy.sum(axis=-1) == 1).all()


def test_policy_values_add_up_to_the_objective(tree, reference):
    policy = tree.random_policy(2)
    state_values, action_values = policy_values(tree, policy, reference, 0.5)
    np.testing.assert_allclose(state_values[:, 0], objective(tree, policy, reference, 0.5))
    np.testing.assert_allclose((np.exp(policy) * action_values).sum(axis=-1), state_values)
    np.testing.assert_allclose(policy_values(tree, policy)[0][:, 0], expected_reward(tree, policy))


def test_logit_gradient_by_finite_differences(tree, reference):
    logits = tree.random_policy(3)
    gradient = logit_gradient(tree, logits, reference, HARD_TREE_BETA)

    def mean_objective(at):
        return objective(tree, normalised(at), reference, HARD_TREE_BETA).mean()

    for index in [(0, 0, 0), (0, 0, 4), (1, 0, 2), (2, 1, 3), (1, 6, 4), (2, 20, 0)]:
        step = np.zeros_like(logits)
        step[index] = 1e-5
        numeric = (mean_objective(logits + step) - mean_objective(logits - step)) / 2e-5
        assert gradient[index] == pytest.approx(numeric, abs=1e-9)


def test_gradient_vanishes_at_the_optimum(tree, reference):
    optimum = soft_solution(tree, reference, HARD_TREE_BETA).policy
    assert np.abs(logit_gradient(tree, optimum, reference, HARD_TREE_BETA)).max() < 1e-12
    assert np.abs(logit_gradient(tree, reference, reference, HARD_TREE_BETA)).max() > 0.01


def test_kl_by_sampling(tree, reference):
    policy = tree.random_policy(4)
    log_probs, other = tree.log_probs(policy), tree.log_probs(reference)
    rows = np.random.default_rng(0).choice(85, size=200_000, p=np.exp(log_probs[1]))
    samples = log_probs[1, rows] - other[1, rows]
    error = samples.std() / math.sqrt(len(samples))
    assert abs(samples.mean() - kl_divergence(tree, policy, reference)[1]) < 4 * error


def test_kl_of_a_deterministic_policy():
    one = np.array([[0.0, -np.inf]])
    assert completion_kl(one, np.log([[0.25, 0.75]])).tolist() == pytest.approx([math.log(4)])
    assert completion_kl(one, one).tolist() == [0.0]
    assert completion_kl(np.log([[0.5, 0.5]]), one).tolist() == [math.inf]


def test_frontier_is_monotone_and_unbeaten(tree, reference):
    points = frontier(tree, reference, [4.0, 1.0, 0.5, 0.1])
    assert [p.kl for p in points] == sorted(p.kl for p in points)
    assert [p.reward for p in points] == sorted(p.reward for p in points)
    # Any policy lies below the tangent of slope β at the point of β.
    for seed in range(20):
        policy = normalised(reference + tree.random_policy(seed))
        reward, kl = expected_reward(tree, policy).mean(), kl_divergence(tree, policy, reference).mean()
        assert all(reward <= point.reward + point.beta * (kl - point.kl) + 1e-9 for point in points)


def test_reference_of_hard_tree_is_far_from_uniform_and_optimum():
    for seed in range(5):
        tree = hard_tree(seed)
        reference = tree.random_policy(seed + 100)
        assert total_variation(tree, reference, tree.uniform_policy()).min() > 0.25
        assert total_variation(tree, reference, soft_solution(tree, reference, HARD_TREE_BETA).policy).min() > 0.4


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_must_be_positive(tree, reference, beta):
    with pytest.raises(ValueError, match="`beta` must be positive"):
        soft_solution(tree, reference, beta)


def test_restricted_policies_and_their_optimum(tree):
    """By hand in one state; then no policy inside the mask has more of the restricted objective than the restricted optimum."""
    uniform = restrict(tree.uniform_policy(), np.tile([True, False, True, False, True], (tree.num_states, 1)))
    np.testing.assert_allclose(np.exp(uniform[0, 0]), [1 / 3, 0, 1 / 3, 0, 1 / 3])
    kept = np.random.default_rng(1).random((tree.num_prompts, tree.num_states, tree.vocab_size)) < 0.5
    kept[..., tree.eos_token_id] = True
    reference = restrict(tree.random_policy(0), kept)
    best = soft_solution(tree, reference, 0.5)
    assert (np.exp(tree.log_probs(best.policy)).sum(axis=-1)).tolist() == pytest.approx([1.0] * 3)
    np.testing.assert_allclose(objective(tree, best.policy, reference, 0.5), best.objective)
    for seed in range(1, 20):
        other = restrict(tree.random_policy(seed), kept)
        assert (objective(tree, other, reference, 0.5) < best.objective).all()
    with pytest.raises(ValueError, match="at least one action"):
        restrict(tree.uniform_policy(), np.zeros((tree.num_states, tree.vocab_size), dtype=bool))
