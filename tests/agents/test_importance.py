import math

import pytest
import torch

from textgym.agents.common.importance import (
    cumulative_ratios,
    restate_kl_rewards,
    sequence_log_ratios,
    token_ratios,
    truncated_cumulative_ratios,
)

# Two rows; the second has one token, then padding that must not matter.
OLD = torch.log(torch.tensor([[0.5, 0.25, 0.5], [0.4, 1.0, 1.0]]))
NEW = torch.log(torch.tensor([[0.25, 0.75, 0.25], [0.8, 1.0, 1.0]]))
NEW[1, 1] = -math.inf
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_token_ratios_by_hand():
    torch.testing.assert_close(token_ratios(NEW, OLD, MASK), torch.tensor([[0.5, 3.0, 0.5], [2.0, 1.0, 1.0]]))


def test_sequence_log_ratios_by_hand():
    torch.testing.assert_close(sequence_log_ratios(NEW, OLD, MASK), torch.tensor([0.75, 2.0]).log())


def test_cumulative_ratios_by_hand():
    torch.testing.assert_close(cumulative_ratios(NEW, OLD, MASK), torch.tensor([[0.5, 1.5, 0.75], [2.0, 2.0, 2.0]]))


def test_truncation_cuts_only_large_weights():
    weights = truncated_cumulative_ratios(NEW, OLD, MASK, max_weight=1.25)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 1.25, 0.75], [1.25, 1.25, 1.25]]))
    with pytest.raises(ValueError, match="`max_weight` must be at least 1"):
        truncated_cumulative_ratios(NEW, OLD, MASK, max_weight=0.5)


def test_fresh_samples_have_weight_one():
    for weights in (token_ratios(OLD, OLD, MASK), cumulative_ratios(OLD, OLD, MASK)):
        assert torch.equal(weights, torch.ones(2, 3))


def test_gradient_of_a_cumulative_weight_is_the_sum_of_scores():
    log_probs = OLD.clone().requires_grad_()
    cumulative_ratios(log_probs, OLD, MASK)[0, 1].backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_kl_rewards_move_to_the_current_policy():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    moved = restate_kl_rewards(rewards, NEW.requires_grad_(), OLD, MASK, beta=0.5)
    expected = torch.tensor([[1 + 0.5 * math.log(2), 2 - 0.5 * math.log(3), 3 + 0.5 * math.log(2)], [4 - 0.5 * math.log(2), 0, 0]])
    torch.testing.assert_close(moved, expected)
    assert not moved.requires_grad


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"`old_log_probs` must have the shape of `log_probs`"):
        token_ratios(NEW, OLD[:, :2], MASK)
