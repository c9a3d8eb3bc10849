"""Exact gradients of torch policies, and what holds of the KL estimators, with nothing sampled."""

import numpy as np
import pytest
import torch

from textgym.exact import (
    HARD_TREE_BETA,
    completion_distance,
    completion_kl,
    hard_tree,
    logit_gradient,
    soft_solution,
    total_variation,
)
from textgym.exact.gradients import completion_log_probs, exact_gradient, exact_objective, model_score
from textgym.exact.models import tiny_lm


@pytest.fixture
def tree():
    return hard_tree(0)


@pytest.fixture
def reference(tree):
    return tree.random_policy(1, scale=1.5)


class Tabular:
    """A softmax policy in torch, differentiable by its logits."""

    def __init__(self, tree, table):
        self.tree = tree
        self.logits = torch.tensor(table, dtype=torch.float64, requires_grad=True)

    def token_log_probs(self):
        table = self.logits.log_softmax(-1)
        picked = table[:, torch.as_tensor(self.tree.state_of), torch.as_tensor(self.tree.completions)]
        return torch.where(torch.as_tensor(self.tree.mask), picked, torch.zeros(()).double())  # (N, C, H)


def test_autograd_agrees_with_the_policy_gradient_theorem(tree, reference):
    policy = Tabular(tree, tree.random_policy(3))
    exact_objective(tree, policy.token_log_probs().sum(-1), reference, HARD_TREE_BETA).backward()
    assert policy.logits.grad is not None
    np.testing.assert_allclose(
        policy.logits.grad.numpy(), logit_gradient(tree, tree.random_policy(3), reference, HARD_TREE_BETA), atol=1e-12
    )


def test_model_score_is_a_distribution_over_completions(tree):
    model = tiny_lm(tree, seed=3)
    log_probs = completion_log_probs(tree, model_score(model))
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(3))


def test_model_score_equals_unpadded_passes(tree):
    model = tiny_lm(tree, seed=3)
    log_probs = completion_log_probs(tree, model_score(model))
    for i, j in [(0, 0), (1, 84), (2, 40), (0, 20)]:
        ids = torch.tensor([[*tree.prompts[i], *tree.ids(j)]])
        logits = model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(tree.prompts[i])
        expected = sum(logits[start + t - 1, token] for t, token in enumerate(tree.ids(j)))
        torch.testing.assert_close(log_probs[i, j], expected, atol=1e-5, rtol=0)


def test_tiny_lm_is_seeded_far_from_uniform_and_from_the_optimum():
    state = torch.random.get_rng_state()
    for seed in range(5):
        tree = hard_tree(seed)
        reference = tree.tabular(completion_log_probs(tree, model_score(tiny_lm(tree, seed=seed))).detach().double().numpy())
        assert total_variation(tree, reference, tree.uniform_policy()).min() > 0.25
        assert total_variation(tree, reference, soft_solution(tree, reference, HARD_TREE_BETA).policy).min() > 0.4
    assert torch.equal(state, torch.random.get_rng_state())


def test_exact_gradient_is_flat_and_zero_for_unused_parameters(tree, reference):
    model = tiny_lm(tree, seed=0)
    unused = torch.nn.Parameter(torch.ones(3))
    parameters = [*model.parameters(), unused]
    gradient = exact_gradient(tree, model_score(model), parameters, reference, HARD_TREE_BETA)
    assert gradient.shape == (sum(p.numel() for p in parameters),)
    assert gradient[-3:].tolist() == [0, 0, 0]
    # Against a directional difference of J.
    direction = gradient[:-3] / gradient.norm()
    values = []
    for sign in (1, -1):
        moved = tiny_lm(tree, seed=0)
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(moved.parameters()) + sign * 1e-2 * direction, moved.parameters()
        )
        values.append(exact_objective(tree, completion_log_probs(tree, model_score(moved)).double(), reference, HARD_TREE_BETA).item())
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(gradient.norm().item(), rel=1e-2)


def test_score_of_the_wrong_shape_is_named(tree):
    with pytest.raises(ValueError, match=r"`score` must return the log-probs of all tokens, shape \(255, 3\), got \(255,\)"):
        completion_log_probs(tree, lambda prompt_ids, prompt_lengths, ids, lengths: ids[:, 0].float())


# --- KL estimators, exactly ----------------------------------------------------------------------------------------------------


def log_ratios(policy, tree, reference):
    """d_t of every token, (N, C, H)."""
    return policy.token_log_probs() - torch.as_tensor(tree.token_log_probs(reference))


ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: (-d).exp() - 1 + d,
}


def surrogate(tree, policy, reference, beta, estimator):
    """E_{y~π} of the REINFORCE term with the penalty *in the reward*, detached: its gradient is the expected policy gradient."""
    token_log_probs = policy.token_log_probs()
    penalty = ESTIMATORS[estimator](log_ratios(policy, tree, reference)).sum(-1).detach()
    log_probs = token_log_probs.sum(-1)
    weights = log_probs.detach().exp() * (torch.as_tensor(tree.rewards) - beta * penalty)
    return (weights * log_probs).sum(-1).mean()


def gradient(value, policy):
    (result,) = torch.autograd.grad(value, policy.logits)
    return result


def test_detached_k1_in_the_reward_is_unbiased_and_single_samples_are_not_exact(tree, reference):
    policy = Tabular(tree, tree.random_policy(3))
    expected = gradient(surrogate(tree, policy, reference, HARD_TREE_BETA, "k1"), policy)
    exact = torch.as_tensor(logit_gradient(tree, tree.random_policy(3), reference, HARD_TREE_BETA))
    torch.testing.assert_close(expected, exact, atol=1e-12, rtol=0)
    # One completion alone: with the log-ratio differentiated too, ∇[log π · sg(r_new)] − β ∇ log π, another vector of the same mean.
    single = policy.token_log_probs().sum(-1)[0, 10]
    r_new = (torch.as_tensor(tree.rewards)[0, 10] - HARD_TREE_BETA * log_ratios(policy, tree, reference).sum(-1)[0, 10]).detach()
    detached = gradient(single * r_new, policy)
    differentiated = gradient(policy.token_log_probs().sum(-1)[0, 10] * (r_new - HARD_TREE_BETA), policy)
    assert (detached - differentiated).abs().max() > 0.1
    assert (detached - exact).abs().max() > 0.1


def test_k1_in_the_loss_has_no_expected_gradient(tree, reference):
    policy = Tabular(tree, tree.random_policy(3))
    k1 = log_ratios(policy, tree, reference).sum(-1)
    weights = policy.token_log_probs().sum(-1).detach().exp()
    assert gradient((weights * k1).sum(), policy).abs().max() < 1e-12


def test_k3_in_the_loss_follows_the_reverse_kl(tree, reference):
    policy = Tabular(tree, tree.random_policy(3))
    d = log_ratios(policy, tree, reference).sum(-1)
    weights = policy.token_log_probs().sum(-1).detach().exp()
    k3_in_loss = gradient((weights * ESTIMATORS["k3"](d)).sum(), policy)
    reference_probs = torch.as_tensor(np.exp(tree.log_probs(reference)))
    reverse = gradient(-(reference_probs * policy.token_log_probs().sum(-1)).sum(), policy)
    torch.testing.assert_close(k3_in_loss, reverse, atol=1e-12, rtol=0)


def ascend(tree, reference, beta, estimator, steps=800, learning_rate=0.2):
    policy = Tabular(tree, reference)
    optimizer = torch.optim.Adam([policy.logits], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        policy.logits.grad = -gradient(surrogate(tree, policy, reference, beta, estimator), policy)
        optimizer.step()
        schedule.step()
    return policy.token_log_probs().sum(-1).detach().numpy()


def test_only_k1_in_the_reward_has_the_right_optimum():
    tree = hard_tree(0, vocab_size=3, horizon=2)
    reference = tree.random_policy(1, scale=1.5)
    optimum = soft_solution(tree, reference, HARD_TREE_BETA)
    found = {name: ascend(tree, reference, HARD_TREE_BETA, name) for name in ESTIMATORS}
    distance = {name: completion_distance(found[name], optimum.log_probs).max() for name in ESTIMATORS}
    assert distance["k1"] < 1e-3
    assert distance["k2"] > 0.3
    assert distance["k3"] > 0.3
    kl = {name: completion_kl(found[name], tree.log_probs(reference)).mean() for name in ESTIMATORS}
    assert kl["k1"] == pytest.approx(completion_kl(optimum.log_probs, tree.log_probs(reference)).mean(), abs=1e-3)
    assert min(kl["k2"], kl["k3"]) > 1.5 * kl["k1"]
