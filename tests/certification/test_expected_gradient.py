"""The expected gradient of every estimator that the pure functions make, with nothing sampled: all batches, by their probability.

The tree has completions of one to three tokens; a batch is two prompts with two completions each, so there are 4^4 batches.
"""

import itertools

import numpy as np
import pytest
import torch

from textgym.agents.common.advantages import (
    generalized_advantages,
    importance_weighted_returns,
    leave_one_out_baseline,
    moving_average,
    rewards_to_go,
    whole_returns,
)
from textgym.agents.common.importance import cumulative_ratios, restate_kl_rewards, token_ratios, truncated_cumulative_ratios
from textgym.agents.common.losses import clipped_surrogate_loss, reinforce_loss
from textgym.agents.common.masking import masked_whiten
from textgym.exact import TokenTree, logit_gradient, policy_values

BETA = 0.5
GENERATIONS = 2
LAYOUT = (0, 0, 1, 1)  # the prompt of each row


class Batch:
    """One batch of completions, in float64, as an agent would hold it."""

    def __init__(self, case, completions):
        tree = case.tree
        rows = (np.array(LAYOUT), np.array(completions))
        self.lengths = torch.as_tensor(tree.lengths[rows[1]])
        self.mask = torch.as_tensor(tree.mask[rows[1]])
        picked = case.logits.log_softmax(-1)[rows[0][:, None], tree.state_of[rows[1]], tree.completions[rows[1]]]
        self.log_probs = torch.where(self.mask, picked, torch.full((), torch.nan).double())
        self.old_log_probs = torch.as_tensor(case.old_token_log_probs[rows])
        self.rewards = -BETA * (self.old_log_probs - torch.as_tensor(case.reference_token_log_probs[rows]))
        self.rewards[torch.arange(len(LAYOUT)), self.lengths - 1] += torch.as_tensor(tree.rewards[rows])
        self.values = torch.as_tensor(case.values[rows[0][:, None], tree.state_of[rows[1]]])
        self.exact_values = torch.as_tensor(case.exact_values[rows[0][:, None], tree.state_of[rows[1]]])


class Case:
    """A policy far from π*, a sampling policy (the same, or an older one) and the exact gradient at the first."""

    def __init__(self, *, stale):
        self.tree = TokenTree(2, 3, 1, [[0], [0, 0]], lambda i, y: float(np.sin(3 * len(y) + 2 * sum(y) + i)) + 3 * i)
        table = self.tree.random_policy(1)
        old = self.tree.random_policy(2) if stale else table
        reference = self.tree.random_policy(3, scale=1.5)
        self.logits = torch.tensor(table, requires_grad=True)
        self.old_token_log_probs = self.tree.token_log_probs(old)
        self.reference_token_log_probs = self.tree.token_log_probs(reference)
        self.old_probs = np.exp(self.tree.log_probs(old))
        self.values = np.random.default_rng(0).standard_normal((2, self.tree.num_states))
        self.exact_values = policy_values(self.tree, table, reference, BETA)[0]
        self.exact = logit_gradient(self.tree, table, reference, BETA)

    def expected_gradient(self, loss_of):
        """E[−∇L] over all batches."""
        expected = np.zeros_like(self.exact)
        for completions in itertools.product(range(self.tree.num_completions), repeat=len(LAYOUT)):
            probability = np.prod([self.old_probs[i, j] for i, j in zip(LAYOUT, completions, strict=True)])
            (gradient,) = torch.autograd.grad(loss_of(Batch(self, completions)), self.logits)
            expected -= probability * gradient.numpy()
        return expected


def reinforce(advantages_of):
    return lambda batch: reinforce_loss(batch.log_probs, advantages_of(batch), batch.mask)


def per_token(values, batch):
    return values[:, None].expand_as(batch.rewards)


def to_go(batch):
    return rewards_to_go(batch.rewards, batch.lengths)


def whole(batch):
    return whole_returns(batch.rewards, batch.lengths)


def gae(batch, values, gae_lambda):
    return generalized_advantages(batch.rewards, values, batch.lengths, gae_lambda=gae_lambda)


def ppo(advantages_of, **options):
    return lambda batch: clipped_surrogate_loss(
        batch.log_probs, batch.old_log_probs, advantages_of(batch), batch.mask, clip_range=0.2, **options
    )


def stale(weights_of, baseline_of=None, **options):
    def loss_of(batch):
        weights = weights_of(batch.log_probs, batch.old_log_probs, batch.mask, **options).detach()
        rewards = restate_kl_rewards(batch.rewards, batch.log_probs, batch.old_log_probs, batch.mask, beta=BETA)
        advantages = importance_weighted_returns(rewards, weights, batch.lengths)
        if baseline_of is not None:
            advantages = advantages - weights * baseline_of(batch)
        return reinforce_loss(batch.log_probs, advantages, batch.mask)

    return loss_of


ON_POLICY = {
    "whole return": (reinforce(lambda b: per_token(whole(b), b)), 1),
    "reward-to-go": (reinforce(to_go), 1),
    "own return in the mean": (reinforce(lambda b: per_token(whole(b) - whole(b).mean(), b)), 1 - 1 / len(LAYOUT)),
    "mean of the others": (reinforce(lambda b: per_token(whole(b) - leave_one_out_baseline(whole(b), len(LAYOUT)), b)), 1),
    "mean of the others to go": (reinforce(lambda b: to_go(b) - leave_one_out_baseline(to_go(b), len(LAYOUT), b.lengths)), 1),
    "leave-one-out": (reinforce(lambda b: per_token(whole(b) - leave_one_out_baseline(whole(b), GENERATIONS), b)), 1),
    "leave-one-out to go": (reinforce(lambda b: to_go(b) - leave_one_out_baseline(to_go(b), GENERATIONS, b.lengths)), 1),
    "moving average": (reinforce(lambda b: to_go(b) - moving_average(1.0, 2.0, decay=0.5)), 1),
    "value head": (reinforce(lambda b: to_go(b) - b.values), 1),
    "PPO, any values, λ = 1": (ppo(lambda b: gae(b, b.values, 1.0)), 1),
    "PPO, exact values, λ = 0.5": (ppo(lambda b: gae(b, b.exact_values, 0.5)), 1),
    "PPO, exact values, λ = 0": (ppo(lambda b: gae(b, b.exact_values, 0.0)), 1),
}


@pytest.mark.parametrize("name", ON_POLICY)
def test_expected_gradient_is_the_policy_gradient(name):
    loss_of, scale = ON_POLICY[name]
    case = Case(stale=False)
    np.testing.assert_allclose(case.expected_gradient(loss_of), scale * case.exact, atol=1e-12)


STALE = {
    "cumulative": stale(cumulative_ratios),
    "cumulative with values": stale(cumulative_ratios, lambda b: b.values),
    "truncated where nothing is cut": stale(truncated_cumulative_ratios, max_weight=1e6),
}


@pytest.mark.parametrize("name", STALE)
def test_cumulative_weights_make_stale_samples_unbiased(name):
    case = Case(stale=True)
    np.testing.assert_allclose(case.expected_gradient(STALE[name]), case.exact, atol=1e-12)


def cosine(a, b):
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


BIASED = {
    "token mean": (False, ppo(to_go, reduction="token_mean")),
    "sequence mean": (False, ppo(to_go, reduction="sequence_mean")),
    "whitened advantages": (False, ppo(lambda b: masked_whiten(to_go(b), b.mask))),
    "GAE with wrong values, λ = 0.5": (False, ppo(lambda b: gae(b, b.values, 0.5))),
    "stale samples taken as fresh": (True, reinforce(to_go)),
    "per-token ratios": (True, stale(token_ratios)),
    "truncated weights": (True, stale(truncated_cumulative_ratios, max_weight=1.1)),
    "rewards of the old policy": (
        True,
        lambda b: reinforce_loss(
            b.log_probs,
            importance_weighted_returns(b.rewards, cumulative_ratios(b.log_probs, b.old_log_probs, b.mask).detach(), b.lengths),
            b.mask,
        ),
    ),
}


@pytest.mark.parametrize("name", BIASED)
def test_named_approximations_point_elsewhere(name):
    """Not a wish but the reason why these are options and not defaults; it also shows that the tests above can fail."""
    is_stale, loss_of = BIASED[name]
    case = Case(stale=is_stale)
    assert cosine(case.expected_gradient(loss_of), case.exact) < 0.999


def test_gradient_of_the_weighted_objective_is_the_same_estimator():
    """Σ_u W_u r_u differentiated through W gives Σ_t ∇log π_t Σ_{u≥t} W_u r_u: each batch, not only in expectation."""
    case = Case(stale=True)
    batch = Batch(case, (0, 3, 1, 2))
    rewards = restate_kl_rewards(batch.rewards, batch.log_probs, batch.old_log_probs, batch.mask, beta=BETA)
    weighted = torch.where(batch.mask, cumulative_ratios(batch.log_probs, batch.old_log_probs, batch.mask) * rewards, 0.0).sum() / len(
        LAYOUT
    )
    (direct,) = torch.autograd.grad(-weighted, case.logits)
    (estimator,) = torch.autograd.grad(STALE["cumulative"](Batch(case, (0, 3, 1, 2))), case.logits)
    torch.testing.assert_close(direct, estimator)
