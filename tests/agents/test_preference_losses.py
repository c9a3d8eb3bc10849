"""The losses of offline learning, by hand."""

import itertools
import math

import pytest
import torch

from textgym.agents.common.preference_losses import dpo_loss, ipo_loss, kto_loss, plackett_luce_loss, robust_dpo_loss, weighted_mean
from textgym.agents.common.supervised_losses import cross_entropy_loss


def nll(x: float) -> float:
    return math.log(1 + math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


MARGINS = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
CERTAIN = torch.ones(3)
SOFT = torch.tensor([1.0, 0.25, 0.5])


def test_dpo_by_hand() -> None:
    torch.testing.assert_close(dpo_loss(MARGINS, CERTAIN, beta=0.5), torch.tensor([nll(1.0), nll(-0.5), nll(0.25)]))
    (gradient,) = torch.autograd.grad(dpo_loss(MARGINS, CERTAIN, beta=0.5).sum(), MARGINS)
    # -β σ(-βΔ): a pair that is ordered wrongly pulls more
    torch.testing.assert_close(gradient, torch.tensor([-0.5 * sigmoid(-1.0), -0.5 * sigmoid(0.5), -0.5 * sigmoid(-0.25)]))


def test_conservative_dpo_by_hand() -> None:
    found = dpo_loss(MARGINS, CERTAIN, beta=0.5, label_smoothing=0.1)
    torch.testing.assert_close(found, torch.tensor([0.9 * nll(x) + 0.1 * nll(-x) for x in (1.0, -0.5, 0.25)]))


def test_soft_labels_by_hand() -> None:
    found = dpo_loss(MARGINS, SOFT, beta=0.5)
    torch.testing.assert_close(found, torch.tensor([nll(1.0), 0.25 * nll(-0.5) + 0.75 * nll(0.5), 0.5 * nll(0.25) + 0.5 * nll(-0.25)]))
    believed = 0.25 * 0.9 + 0.75 * 0.1
    smoothed = dpo_loss(MARGINS, SOFT, beta=0.5, label_smoothing=0.1)[1]
    torch.testing.assert_close(smoothed, torch.tensor(believed * nll(-0.5) + (1 - believed) * nll(0.5)))


def test_soft_labels_are_matched_at_the_minimum() -> None:
    margin = torch.tensor([math.log(0.25 / 0.75) / 0.5], requires_grad=True)  # σ(βΔ) = p
    (gradient,) = torch.autograd.grad(dpo_loss(margin, torch.tensor([0.25]), beta=0.5).sum(), margin)
    assert float(gradient) == pytest.approx(0, abs=1e-6)


def test_robust_dpo_by_hand_and_unbiased_under_flips() -> None:
    found = robust_dpo_loss(MARGINS, CERTAIN, beta=0.5, label_smoothing=0.2)
    torch.testing.assert_close(found, torch.tensor([(0.8 * nll(x) - 0.2 * nll(-x)) / 0.6 for x in (1.0, -0.5, 0.25)]))
    flipped = robust_dpo_loss(-MARGINS, CERTAIN, beta=0.5, label_smoothing=0.2)
    torch.testing.assert_close(0.8 * found + 0.2 * flipped, dpo_loss(MARGINS, CERTAIN, beta=0.5))
    soft = robust_dpo_loss(MARGINS, SOFT, beta=0.5, label_smoothing=0.2)
    torch.testing.assert_close(soft, SOFT * found + (1 - SOFT) * flipped)


def test_ipo_by_hand() -> None:
    torch.testing.assert_close(ipo_loss(MARGINS, CERTAIN, beta=0.5), torch.tensor([1.0, 4.0, 0.25]))  # (Δ - 1)²
    torch.testing.assert_close(ipo_loss(MARGINS, CERTAIN, beta=0.1), torch.tensor([9.0, 36.0, 20.25]))  # (Δ - 5)²
    torch.testing.assert_close(ipo_loss(MARGINS, SOFT, beta=0.5)[1], torch.tensor(0.25 * 4.0 + 0.75 * 0.0))


def test_plackett_luce_by_hand() -> None:
    log_ratios = torch.tensor([[1.0, 0.0, -2.0], [0.0, 3.0, 100.0]], requires_grad=True)
    present = torch.tensor([[True, True, True], [True, True, False]])
    e = [math.exp(0.5 * x) for x in (1.0, 0.0, -2.0)]
    wanted = torch.tensor([-math.log(e[0] / sum(e)) - math.log(e[1] / (e[1] + e[2])), nll(-1.5)])
    found = plackett_luce_loss(log_ratios, present, beta=0.5)
    torch.testing.assert_close(found, wanted)
    (gradient,) = torch.autograd.grad(found.sum(), log_ratios)
    assert gradient.isfinite().all() and gradient[1, 2] == 0
    torch.testing.assert_close(gradient[0, 0], torch.tensor(0.5 * (e[0] / sum(e) - 1)))


def test_plackett_luce_of_two_is_dpo() -> None:
    log_ratios = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    found = plackett_luce_loss(log_ratios, torch.ones(7, 2, dtype=torch.bool), beta=0.3)
    torch.testing.assert_close(found, dpo_loss(log_ratios[:, 0] - log_ratios[:, 1], torch.ones(7), beta=0.3))


def test_plackett_luce_is_a_distribution_over_rankings() -> None:
    ratios = torch.tensor([0.3, -1.0, 2.0, 0.7])
    rankings = torch.stack([ratios[list(order)] for order in itertools.permutations(range(4))])
    assert float((-plackett_luce_loss(rankings, torch.ones(24, 4, dtype=torch.bool), beta=0.8)).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_kto_by_hand() -> None:
    log_ratios = torch.tensor([1.0, 1.0, -2.0], requires_grad=True)
    desirable = torch.tensor([1.0, 0.0, 0.0])
    found = kto_loss(log_ratios, desirable, kl=0.4, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    wanted = [2 * (1 - sigmoid(0.5 * 0.6)), 3 * (1 - sigmoid(-0.5 * 0.6)), 3 * (1 - sigmoid(0.5 * 2.4))]
    torch.testing.assert_close(found, torch.tensor(wanted))
    (gradient,) = torch.autograd.grad(found.sum(), log_ratios)
    s = [sigmoid(0.3), sigmoid(-0.3), sigmoid(1.2)]
    torch.testing.assert_close(
        gradient, torch.tensor([-2 * 0.5 * s[0] * (1 - s[0]), 3 * 0.5 * s[1] * (1 - s[1]), 3 * 0.5 * s[2] * (1 - s[2])])
    )


def test_weighted_mean_divides_by_the_examples() -> None:
    losses, weights = torch.tensor([1.0, 4.0]), torch.tensor([0.5, 2.5])
    assert float(weighted_mean(losses, weights)) == 5.25
    assert float(weighted_mean(losses, weights, count=4)) == 2.625


def test_cross_entropy_by_hand() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, float("nan")], [-4.0, float("nan"), float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert float(cross_entropy_loss(log_probs, mask).detach()) == pytest.approx(7 / 3)
    assert float(cross_entropy_loss(log_probs, mask, reduction="sequence_sum").detach()) == 3.5
    assert float(cross_entropy_loss(log_probs, mask, reduction="sequence_mean").detach()) == 2.75
    assert float(cross_entropy_loss(log_probs, mask, weights=torch.tensor([2.0, 0.5])).detach()) == pytest.approx((2 * 3 + 0.5 * 4) / 3)
    assert float(cross_entropy_loss(log_probs, mask, count=14).detach()) == 0.5
    (gradient,) = torch.autograd.grad(cross_entropy_loss(log_probs, mask, weights=torch.tensor([2.0, 0.5])), log_probs)
    torch.testing.assert_close(gradient, torch.tensor([[-2.0, -2.0, 0.0], [-0.5, 0.0, 0.0]]) / 3)


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_shapes_are_checked(loss) -> None:
    with pytest.raises(ValueError, match="`preferences` must have the shape of `margins`"):
        loss(MARGINS, torch.ones(2), beta=0.1)
