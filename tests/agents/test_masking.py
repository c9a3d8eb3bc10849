import math

import pytest
import torch

from textgym.agents.common.masking import (
    completion_mask_from_lengths,
    masked_mean,
    masked_sum,
    masked_whiten,
    reduce_tokens,
    zero_outside,
)

VALUES = torch.tensor([[1.0, 2.0, 3.0], [5.0, math.nan, math.inf]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_mask_comes_from_lengths():
    assert completion_mask_from_lengths(torch.tensor([3, 1, 0]), 3).tolist() == [[True, True, True], [True, False, False], [False] * 3]


def test_sum_and_mean_see_only_true_places():
    assert masked_sum(VALUES, MASK).item() == 11.0
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [6.0, 5.0]
    assert masked_mean(VALUES, MASK).item() == 2.75
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [2.0, 5.0]
    assert masked_mean(VALUES, torch.zeros_like(MASK)).item() == 0.0


def test_whitening_by_hand():
    # mean 11/4, population variance ((1.75)^2 + (.75)^2 + (.25)^2 + (2.25)^2) / 4 = 2.1875
    std = math.sqrt(2.1875)
    expected = torch.tensor([[-1.75, -0.75, 0.25], [2.25, 0.0, 0.0]]) / std
    torch.testing.assert_close(masked_whiten(VALUES, MASK), expected)
    kept_mean = torch.where(MASK, expected + 2.75, torch.zeros(()))
    torch.testing.assert_close(masked_whiten(VALUES, MASK, shift_mean=False), kept_mean)


def test_whitening_eps_is_added_to_the_variance():
    values = torch.tensor([[0.0, 2.0]])  # variance 1
    whitened = masked_whiten(values, torch.ones(1, 2, dtype=torch.bool), eps=3.0)
    torch.testing.assert_close(whitened, torch.tensor([[-0.5, 0.5]]))  # 1 / sqrt(1 + 3)


def test_whitening_equal_values_gives_zeros():
    assert masked_whiten(torch.full((2, 2), 7.0), torch.ones(2, 2, dtype=torch.bool)).abs().max() == 0


def test_whitening_ignores_padding():
    wider = torch.cat([VALUES, torch.full((2, 4), -100.0)], dim=1)
    wider_mask = torch.cat([MASK, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(masked_whiten(wider, wider_mask)[:, :3], masked_whiten(VALUES, MASK))


@pytest.mark.parametrize(("reduction", "expected"), [("sequence_sum", 11 / 2), ("token_mean", 11 / 4), ("sequence_mean", (2 + 5) / 2)])
def test_reductions_by_hand(reduction, expected):
    assert reduce_tokens(VALUES, MASK, reduction=reduction).item() == pytest.approx(expected)


@pytest.mark.parametrize(("reduction", "count"), [("sequence_sum", 2), ("token_mean", 4), ("sequence_mean", 2)])
def test_micro_batches_add_up(reduction, count):
    whole = reduce_tokens(VALUES, MASK, reduction=reduction)
    parts = [reduce_tokens(VALUES[i : i + 1], MASK[i : i + 1], reduction=reduction, count=count) for i in range(2)]
    assert sum(parts).item() == pytest.approx(whole.item())


def test_no_gradient_from_the_padding():
    values = VALUES.clone().requires_grad_()
    (masked_whiten(values, MASK).square().sum() + zero_outside(values, MASK).square().sum()).backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert values.grad[1, 1:].tolist() == [0.0, 0.0]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `values`, \(2, 3\), got \(2, 2\)"):
        masked_mean(VALUES, MASK[:, :2])
    with pytest.raises(ValueError, match=r"`reduction` must be .* got 'mean'"):
        reduce_tokens(VALUES, MASK, reduction="mean")
    with pytest.raises(ValueError, match=r"`values` must be a \(B, T\) table"):
        reduce_tokens(VALUES[0], MASK[0], reduction="token_mean")
