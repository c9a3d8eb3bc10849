"""The losses of reward models on numbers worked out by hand, and where they must agree with each other."""

from itertools import pairwise, permutations
from math import comb, exp, log

import numpy as np
import pytest
import torch
from torch import tensor

from textgym.agents.common.reward_losses import (
    LARGEST_TIE,
    bradley_terry_loss,
    centering_penalty,
    classifier_loss,
    compared_loss,
    label_loss,
    ranking_loss,
    span_loss,
)


def log_sigmoid(x: float) -> float:
    return -log(1 + exp(-x))


def all_pairs(count: int) -> torch.Tensor:
    return torch.ones(1, count, count, dtype=torch.bool).triu(1)


def test_bradley_terry_by_hand() -> None:
    differences, preferences = tensor([2.0, 2.0, 2.0]), tensor([1.0, 0.25, 0.5])
    found = bradley_terry_loss(differences, preferences)
    wanted = [-log_sigmoid(2), -0.25 * log_sigmoid(2) - 0.75 * log_sigmoid(-2), -0.5 * (log_sigmoid(2) + log_sigmoid(-2))]
    torch.testing.assert_close(found, tensor(wanted))
    torch.testing.assert_close(found[0], tensor(0.126928))
    with_margin = bradley_terry_loss(differences, preferences, margins=tensor([3.0, 0.0, 3.0]))
    torch.testing.assert_close(with_margin, tensor([-log_sigmoid(-1), wanted[1], -0.5 * (log_sigmoid(-1) + log_sigmoid(1))]))


def test_soft_labels_have_their_minimum_at_the_log_odds_behind_the_margin() -> None:
    difference = tensor([0.3], requires_grad=True)
    preference, margin = tensor([0.8]), tensor([0.5])
    with torch.no_grad():
        difference += 0.5 + log(0.8 / 0.2) - 0.3
    bradley_terry_loss(difference, preference, margin).sum().backward()
    assert difference.grad is not None and abs(float(difference.grad)) < 1e-6


def test_the_pairs_of_one_prompt_are_averaged() -> None:
    """C(K,2) pairs of one prompt weigh as much as one pair of another: 1 in the sum over records, 1/6 for each of the six."""
    rewards = tensor([[0.5, -1.0, 2.0, 0.0]])
    ranks = tensor([2, 4, 1, 3])
    better = (ranks[:, None] < ranks[None, :]).float()[None]
    found = compared_loss(rewards, better, all_pairs(4))
    by_hand = [-log_sigmoid(float(rewards[0, i] - rewards[0, j])) for i in range(4) for j in range(4) if ranks[i] < ranks[j]]
    assert len(by_hand) == comb(4, 2)
    assert float(found) == pytest.approx(sum(by_hand) / 6, abs=1e-6)
    # Each of the answers has three pairs: a gradient of 3/6 at most, where a pair alone has one of 1.
    rewards = torch.zeros(1, 4, requires_grad=True)
    compared_loss(rewards, better, all_pairs(4)).sum().backward()
    torch.testing.assert_close(rewards.grad, tensor([[-1.0, 3.0, -3.0, 1.0]]) / 12)


def test_only_judged_pairs_count_and_ties_are_half() -> None:
    rewards = tensor([[1.0, 0.0, 3.0], [1.0, 0.0, float("nan")]])
    judged = torch.zeros(2, 3, 3, dtype=torch.bool)
    judged[:, 0, 1] = True
    judged[0, 2, 0] = True
    preferences = torch.full((2, 3, 3), float("nan"))
    preferences[:, 0, 1] = 0.5
    preferences[0, 2, 0] = 1.0
    tie = -0.5 * (log_sigmoid(1) + log_sigmoid(-1))
    torch.testing.assert_close(compared_loss(rewards, preferences, judged), tensor([(tie - log_sigmoid(2)) / 2, tie]))


def plackett_luce_by_hand(ordered: list[float]) -> float:
    return -sum(r - log(sum(exp(other) for other in ordered[place:])) for place, r in enumerate(ordered))


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    rewards = tensor([[0.3, -0.9], [0.3, -0.9], [0.3, -0.9]])
    ranks = tensor([[1, 2], [2, 1], [1, 1]])
    found = ranking_loss(rewards, ranks, torch.ones(3, 2, dtype=torch.bool))
    torch.testing.assert_close(found, bradley_terry_loss(tensor([1.2, 1.2, 1.2]), tensor([1.0, 0.0, 0.5])))
    assert float(found[2]) == pytest.approx(-0.5 * (log_sigmoid(1.2) + log_sigmoid(-1.2)), abs=1e-6)


@pytest.mark.parametrize(
    "ranks", [[1, 2, 3, 4], [2, 1, 4, 3], [2, 1, 2, 3], [1, 1, 1, 1], [1, 2, 2, 2], [1, 1, 2, 2], [3, 3, 1, 3], [7, 5, 7, 9]]
)
def test_ties_are_the_mean_over_the_orderings_that_they_allow(ranks: list[int]) -> None:
    rewards = [0.7, -1.3, 2.1, 0.2]
    allowed = [order for order in permutations(range(4)) if all(ranks[a] <= ranks[b] for a, b in pairwise(order))]
    by_hand = np.mean([plackett_luce_by_hand([rewards[place] for place in order]) for order in allowed])
    found = ranking_loss(tensor([rewards], dtype=torch.float64), tensor([ranks]), torch.ones(1, 4, dtype=torch.bool))
    assert float(found) == pytest.approx(by_hand, abs=1e-9)


def test_rankings_of_different_length_in_one_batch() -> None:
    rewards = tensor([[0.7, -1.3, 2.1], [0.7, -1.3, float("nan")], [0.5, 0.4, 9.0]], requires_grad=True)
    ranks, present = tensor([[2, 2, 1], [2, 1, 0], [1, 1, 0]]), tensor([[True] * 3, [True, True, False], [True, True, False]])
    found = ranking_loss(rewards, ranks, present)
    wanted = [
        (plackett_luce_by_hand([2.1, 0.7, -1.3]) + plackett_luce_by_hand([2.1, -1.3, 0.7])) / 2,
        -log_sigmoid(-2.0),
        -0.5 * (log_sigmoid(0.1) + log_sigmoid(-0.1)),
    ]
    torch.testing.assert_close(found, tensor(wanted))
    found.sum().backward()
    assert rewards.grad is not None
    assert torch.isfinite(rewards.grad).all() and not rewards.grad[1:, 2].any()


def test_the_largest_tie() -> None:
    rewards = torch.randn(1, LARGEST_TIE + 2, generator=torch.Generator().manual_seed(0))
    present = torch.ones(1, LARGEST_TIE + 2, dtype=torch.bool)
    ranks = tensor([[1] * LARGEST_TIE + [2, 3]])
    assert torch.isfinite(ranking_loss(rewards, ranks, present)).all()
    with pytest.raises(ValueError, match=r"at most 12 equal ones .* got 13; .*pairwise"):
        ranking_loss(rewards, tensor([[1] * (LARGEST_TIE + 1) + [2]]), present)


def test_labels_by_hand() -> None:
    found = label_loss(tensor([1.5, 1.5, -0.5]), tensor([True, False, False]))
    torch.testing.assert_close(found, tensor([-log_sigmoid(1.5), -log_sigmoid(-1.5), -log_sigmoid(0.5)]))


def test_the_classifiers_reward_is_its_positive_logit() -> None:
    """The lecture's "not hate" / "hate" example: logits 3.171875, −2.609375, P = .9969."""
    logits = tensor([[3.171875, -2.609375]] * 2)
    found = classifier_loss(logits, tensor([True, False]), positive=0)
    assert float(torch.exp(-found[0])) == pytest.approx(0.9969, abs=5e-5)
    torch.testing.assert_close(found, tensor([-log_sigmoid(5.78125), -log_sigmoid(-5.78125)]))
    torch.testing.assert_close(classifier_loss(logits, tensor([False, True]), positive=1), found)


def test_spans_have_a_loss_per_category() -> None:
    rewards = tensor([[[1.0, -2.0], [0.5, 0.0]], [[3.0, 1.0], [float("nan")] * 2]])
    clean = tensor([[[True, False], [False, True]], [[True, True], [True, True]]])
    present = tensor([[True, True], [True, False]])
    wanted = [
        [(-log_sigmoid(1.0) - log_sigmoid(-0.5)) / 2, (-log_sigmoid(2.0) - log_sigmoid(0.0)) / 2],
        [-log_sigmoid(3.0), -log_sigmoid(1.0)],
    ]
    torch.testing.assert_close(span_loss(rewards, clean, present), tensor(wanted))


def test_centering_by_hand() -> None:
    rewards = tensor([[1.0, 2.0, float("inf")], [1.0, -2.0, 3.0]])
    present = tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(centering_penalty(rewards, present), tensor([9.0, (1.0 + 16.0 + 1.0) / 3]))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="`preferences` must have the shape"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="`judged` must have the shape"):
        compared_loss(torch.zeros(1, 3), torch.zeros(1, 2, 2), all_pairs(2))
    with pytest.raises(ValueError, match="`ranks` must have the shape"):
        ranking_loss(torch.zeros(1, 3), torch.zeros(1, 2), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="`good` must have one entry per completion"):
        classifier_loss(torch.zeros(3, 2), torch.zeros(2), positive=1)
