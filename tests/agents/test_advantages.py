import math

import pytest
import torch

from textgym.agents.common.advantages import (
    generalized_advantages,
    group_normalized_advantages,
    group_std,
    hold_last,
    importance_weighted_returns,
    leave_one_out_baseline,
    moving_average,
    rewards_to_go,
    whole_returns,
)

# Row 0 has three tokens, row 1 two, row 2 one; what stands behind them must not matter.
LENGTHS = torch.tensor([3, 2, 1])
JUNK = math.nan
REWARDS = torch.tensor([[1.0, 0.0, 2.0], [0.5, -1.0, JUNK], [4.0, JUNK, JUNK]])
VALUES = torch.tensor([[0.5, 1.0, 1.5], [0.25, 0.5, JUNK], [2.0, JUNK, JUNK]])


def test_gae_by_hand():
    # γ = 0.5, λ = 0.5. Row 0: δ = (1 + .5·1 − .5, 0 + .5·1.5 − 1, 2 − 1.5) = (1, −.25, .5); Â_2 = .5,
    # Â_1 = −.25 + .25·.5 = −.125, Â_0 = 1 + .25·(−.125) = .96875.
    # Row 1: δ = (.5 + .5·.5 − .25, −1 − .5) = (.5, −1.5); Â_0 = .5 − .375 = .125. Row 2: 4 − 2 = 2.
    expected = torch.tensor([[0.96875, -0.125, 0.5], [0.125, -1.5, 0.0], [2.0, 0.0, 0.0]])
    torch.testing.assert_close(generalized_advantages(REWARDS, VALUES, LENGTHS, gamma=0.5, gae_lambda=0.5), expected)


def test_only_truncated_rows_bootstrap():
    truncated = torch.tensor([False, True, True])
    bootstrap_values = torch.tensor([100.0, 8.0, -2.0])  # row 0 ended: its 100 must not count
    advantages = generalized_advantages(
        REWARDS, VALUES, LENGTHS, gamma=0.5, gae_lambda=0.5, truncated=truncated, bootstrap_values=bootstrap_values
    )
    # Row 1: δ_1 = −1 + .5·8 − .5 = 2.5, Â_0 = .5 + .25·2.5 = 1.125. Row 2: 4 + .5·(−2) − 2 = 1.
    torch.testing.assert_close(advantages, torch.tensor([[0.96875, -0.125, 0.5], [1.125, 2.5, 0.0], [1.0, 0.0, 0.0]]))


def test_lambda_one_is_return_minus_value_and_lambda_zero_the_td_error():
    truncated, bootstrap = torch.tensor([True, False, False]), torch.tensor([3.0, 0.0, 0.0])
    ends = {"truncated": truncated, "bootstrap_values": bootstrap}
    mask = torch.arange(3) < LENGTHS[:, None]
    returns = rewards_to_go(REWARDS, LENGTHS, gamma=0.9, **ends)
    monte_carlo = torch.where(mask, returns - VALUES, torch.zeros(()))
    torch.testing.assert_close(generalized_advantages(REWARDS, VALUES, LENGTHS, gamma=0.9, gae_lambda=1.0, **ends), monte_carlo)
    td = generalized_advantages(REWARDS, VALUES, LENGTHS, gamma=0.9, gae_lambda=0.0, **ends)
    torch.testing.assert_close(td[0], torch.tensor([1 + 0.9 - 0.5, 0.9 * 1.5 - 1, 2 + 0.9 * 3 - 1.5]))
    torch.testing.assert_close(td[1, :2], torch.tensor([0.5 + 0.9 * 0.5 - 0.25, -1 - 0.5]))


def test_gae_of_the_true_values_has_no_advantage():
    """On a deterministic chain V = return-to-go, so every δ is zero at any λ."""
    values = rewards_to_go(REWARDS, LENGTHS, gamma=0.7)
    assert generalized_advantages(REWARDS, values, LENGTHS, gamma=0.7, gae_lambda=0.3).abs().max() < 1e-6


def test_padding_changes_no_advantage():
    wide = torch.full((3, 2), 55.0)
    wider = generalized_advantages(torch.cat([REWARDS, wide], 1), torch.cat([VALUES, wide], 1), LENGTHS)
    assert torch.equal(wider[:, :3], generalized_advantages(REWARDS, VALUES, LENGTHS))
    assert wider[:, 3:].abs().max() == 0


def test_returns_by_hand():
    torch.testing.assert_close(rewards_to_go(REWARDS, LENGTHS), torch.tensor([[3.0, 2.0, 2.0], [-0.5, -1.0, 0.0], [4.0, 0.0, 0.0]]))
    torch.testing.assert_close(
        rewards_to_go(REWARDS, LENGTHS, gamma=0.5), torch.tensor([[1.5, 1.0, 2.0], [0.0, -1.0, 0.0], [4.0, 0.0, 0.0]])
    )
    torch.testing.assert_close(whole_returns(REWARDS, LENGTHS, gamma=0.5), torch.tensor([1.5, 0.0, 4.0]))


def test_importance_weights_belong_to_the_token_of_the_reward():
    weights = torch.tensor([[2.0, 0.5, 3.0], [1.0, 4.0, JUNK], [0.5, JUNK, JUNK]])
    expected = torch.tensor([[2 + 0.5 * 0 + 0.25 * 6, 0.0 + 0.5 * 6, 6.0], [0.5 - 2.0, -4.0, 0.0], [2.0, 0.0, 0.0]])
    torch.testing.assert_close(importance_weighted_returns(REWARDS, weights, LENGTHS, gamma=0.5), expected)
    ones = torch.ones(3, 3)
    torch.testing.assert_close(importance_weighted_returns(REWARDS, ones, LENGTHS), rewards_to_go(REWARDS, LENGTHS))


def test_hold_last():
    assert hold_last(REWARDS, LENGTHS).tolist() == [[1.0, 0.0, 2.0], [0.5, -1.0, -1.0], [4.0, 4.0, 4.0]]


def test_leave_one_out_by_hand():
    returns = torch.tensor([1.0, 3.0, 10.0, 20.0])
    assert leave_one_out_baseline(returns, 2).tolist() == [3.0, 1.0, 20.0, 10.0]  # the partner of the same prompt
    assert leave_one_out_baseline(returns, 4).tolist() == pytest.approx([11.0, 31 / 3, 8.0, 14 / 3])


def test_leave_one_out_of_returns_to_go():
    to_go = torch.tensor([[3.0, 2.0, 2.0], [-0.5, -1.0, JUNK], [4.0, JUNK, JUNK], [5.0, 6.0, JUNK]])
    lengths = torch.tensor([3, 2, 1, 2])
    baseline = leave_one_out_baseline(to_go, 2, lengths)
    torch.testing.assert_close(baseline[0], torch.tensor([-0.5, -1.0, -1.0]))
    torch.testing.assert_close(baseline[1, :2], torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(baseline[2, :1], torch.tensor([5.0]))
    torch.testing.assert_close(baseline[3, :2], torch.tensor([4.0, 4.0]))


def test_one_reward_at_the_end_makes_both_forms_of_leave_one_out_agree():
    rewards = torch.zeros(6, 4)
    lengths = torch.tensor([1, 4, 2, 3, 3, 1])
    rewards[torch.arange(6), lengths - 1] = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 7.0])
    whole = leave_one_out_baseline(whole_returns(rewards, lengths), 3)
    to_go = leave_one_out_baseline(rewards_to_go(rewards, lengths), 3, lengths)
    torch.testing.assert_close(to_go, whole[:, None].expand(6, 4))


def test_leave_one_out_is_the_scaled_deviation_from_the_group_mean():
    returns = torch.randn(12, generator=torch.Generator().manual_seed(0))
    groups = returns.view(3, 4)
    scaled = 4 / 3 * (groups - groups.mean(dim=1, keepdim=True))
    torch.testing.assert_close(returns - leave_one_out_baseline(returns, 4), scaled.flatten())


def test_group_normalised_by_hand():
    # Pairs (1, 3) and (10, 20): deviations 1 and 5, standard deviations √2 and 5 √2 with n − 1. All four: mean 8.5, Σ² 221.
    returns = torch.tensor([1.0, 3.0, 10.0, 20.0])
    torch.testing.assert_close(group_std(returns, 2), torch.tensor([2**0.5, 5 * 2**0.5]))
    none = group_normalized_advantages(returns, 2, scale="none")
    assert none.tolist() == [-1.0, 1.0, -5.0, 5.0]
    group = group_normalized_advantages(returns, 2, eps=0.1)
    torch.testing.assert_close(group, none / torch.tensor([2**0.5 + 0.1] * 2 + [5 * 2**0.5 + 0.1] * 2))
    batch = group_normalized_advantages(returns, 2, scale="batch", eps=0.1)
    torch.testing.assert_close(batch, none / ((221 / 3) ** 0.5 + 0.1))
    torch.testing.assert_close(group_normalized_advantages(returns, 4), (returns - 8.5) / ((221 / 3) ** 0.5 + 1e-4))


def test_a_group_of_equal_returns_has_no_advantage():
    """Their mean rounds: without care that error, divided by 1e-4, would be learned from."""
    returns = torch.tensor([0.7] * 7 + [1e4 + 0.7] * 7)
    assert group_std(returns, 7).tolist() == [0.0, 0.0]
    assert group_normalized_advantages(returns, 7).tolist() == [0.0] * 14


def test_centred_advantages_are_scaled_leave_one_out():
    returns = torch.randn(12, generator=torch.Generator().manual_seed(0))
    expected = 3 / 4 * (returns - leave_one_out_baseline(returns, 4))
    torch.testing.assert_close(group_normalized_advantages(returns, 4, scale="none"), expected)


def test_moving_average():
    assert moving_average(None, 4.0, decay=0.9) == 4.0
    assert moving_average(2.0, 4.0, decay=0.75) == 2.5
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\), got 1"):
        moving_average(2.0, 4.0, decay=1.0)


def test_advantages_carry_no_gradient():
    values = VALUES.clone().requires_grad_()
    assert not generalized_advantages(REWARDS, values, LENGTHS).requires_grad
    assert not leave_one_out_baseline(values, 3, LENGTHS).requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: generalized_advantages(REWARDS, VALUES[:, :2], LENGTHS),
            r"`values` must have the shape of `rewards`, \(3, 3\), got \(3, 2\)",
        ),
        (lambda: generalized_advantages(REWARDS[0], VALUES[0], LENGTHS), r"`rewards` must be \(B, T\)"),
        (lambda: rewards_to_go(REWARDS, LENGTHS[:2]), "`lengths` must have one entry per row"),
        (lambda: rewards_to_go(REWARDS, LENGTHS, truncated=LENGTHS > 1), "`truncated` and `bootstrap_values` belong together"),
        (lambda: leave_one_out_baseline(REWARDS, 1, LENGTHS), "`num_generations` must be at least 2"),
        (lambda: leave_one_out_baseline(REWARDS, 2, LENGTHS), "multiple of `num_generations` = 2 rows .* got 3"),
        (lambda: group_normalized_advantages(REWARDS[:, 0], 2), "multiple of `num_generations` = 2 rows .* got 3"),
        (lambda: leave_one_out_baseline(REWARDS, 3), "`lengths` must be given"),
        (lambda: leave_one_out_baseline(REWARDS, 3, LENGTHS[:2]), r"`returns` must be \(B,\) or \(B, T\)"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
