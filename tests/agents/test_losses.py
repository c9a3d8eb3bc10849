import math

import pytest
import torch

from textgym.agents.common.advantages import leave_one_out_baseline
from textgym.agents.common.losses import (
    clip_fractions,
    clipped_surrogate_loss,
    entropy_bonus,
    grpo_reduction,
    ratio_diagnostics,
    rebel_loss,
    reference_kl_loss,
    reinforce_loss,
    sequence_surrogate_loss,
    value_loss,
)

# Two rows of three and one tokens; NaN behind the second.
MASK = torch.tensor([[True, True, True], [True, False, False]])
OLD = torch.log(torch.tensor([[0.5, 0.25, 0.5], [0.4, math.nan, math.nan]]))
NEW = torch.log(torch.tensor([[0.25, 0.75, 0.55], [0.8, math.nan, math.nan]]))  # ratios .5, 3, 1.1 and 2
ADVANTAGES = torch.tensor([[1.0, 2.0, -1.0], [-3.0, math.nan, math.nan]])


def gradient(loss_of, at):
    at = at.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(at), at)
    return grad


@pytest.mark.parametrize(("reduction", "divisors"), [("sequence_sum", [2, 2]), ("token_mean", [4, 4]), ("sequence_mean", [6, 2])])
def test_reinforce_by_hand(reduction, divisors):
    rows = [math.log(0.25) + 2 * math.log(0.75) - math.log(0.55), -3 * math.log(0.8)]
    expected = -(rows[0] / divisors[0] + rows[1] / divisors[1])
    assert reinforce_loss(NEW, ADVANTAGES, MASK, reduction=reduction).item() == pytest.approx(expected)
    grad = gradient(lambda x: reinforce_loss(x, ADVANTAGES, MASK, reduction=reduction), NEW)
    expected_grad = torch.tensor([[-1.0, -2.0, 1.0], [3.0, 0.0, 0.0]]) / torch.tensor(divisors)[:, None]
    torch.testing.assert_close(grad, expected_grad)


def test_clipped_surrogate_by_hand():
    # ε = 0.2. min(ρA, clip(ρ)A): ρ=.5, A=1: min(.5, .8) = .5; ρ=3, A=2: min(6, 2.4) = 2.4; ρ=1.1, A=−1: −1.1 (inside);
    # ρ=2, A=−3: min(−6, −3.6) = −6.
    loss = clipped_surrogate_loss(NEW, OLD, ADVANTAGES, MASK, clip_range=0.2)
    assert loss.item() == pytest.approx(-(0.5 + 2.4 - 1.1 - 6) / 2)
    token_mean = clipped_surrogate_loss(NEW, OLD, ADVANTAGES, MASK, clip_range=0.2, reduction="token_mean")
    assert token_mean.item() == pytest.approx(-(0.5 + 2.4 - 1.1 - 6) / 4)


def test_clipping_from_below_by_hand():
    """ρ = 0.5 with A = −2: min(−1, −1.6) = −1.6, held by the clip; the same ratio with A > 0 is not."""
    old, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    new, advantages = torch.full((1, 2), math.log(0.5)), torch.tensor([[-2.0, 3.0]])
    assert clipped_surrogate_loss(new, old, advantages, mask, clip_range=0.2).item() == pytest.approx(1.6 - 1.5)
    grad = gradient(lambda x: clipped_surrogate_loss(x, old, advantages, mask, clip_range=0.2), new)
    torch.testing.assert_close(grad, torch.tensor([[0.0, -1.5]]))


def test_clipped_surrogate_gradient_by_hand():
    # ∂/∂log π of ρA is ρA; a clipped token (the second) has none; the pessimistic side (the first and last) keeps it.
    grad = gradient(lambda x: clipped_surrogate_loss(x, OLD, ADVANTAGES, MASK, clip_range=0.2), NEW)
    torch.testing.assert_close(grad, -torch.tensor([[0.5, 0.0, -1.1], [-6.0, 0.0, 0.0]]) / 2)


@pytest.mark.parametrize("reduction", ["sequence_sum", "token_mean", "sequence_mean"])
def test_first_step_of_ppo_is_reinforce(reduction):
    ppo = gradient(lambda x: clipped_surrogate_loss(x, NEW, ADVANTAGES, MASK, clip_range=0.2, reduction=reduction), NEW)
    reinforce = gradient(lambda x: reinforce_loss(x, ADVANTAGES, MASK, reduction=reduction), NEW)
    torch.testing.assert_close(ppo, reinforce)


def test_sequence_surrogate_by_hand():
    # Ratios .5 · 3 · 1.1 = 1.65 and 2, ε = 0.2. A = (1, −3): min(1.65, 1.2) = 1.2, held; min(−6, −3.6) = −6, not held.
    advantages = torch.tensor([1.0, -3.0])
    assert sequence_surrogate_loss(NEW, OLD, advantages, MASK).item() == pytest.approx(-(1.65 - 6) / 2)
    assert sequence_surrogate_loss(NEW, OLD, advantages, MASK, clip_range=0.2).item() == pytest.approx(-(1.2 - 6) / 2)
    grad = gradient(lambda x: sequence_surrogate_loss(x, OLD, advantages, MASK), NEW)
    torch.testing.assert_close(grad, -torch.tensor([[1.65, 1.65, 1.65], [-6.0, 0, 0]]) / 2)
    clipped = gradient(lambda x: sequence_surrogate_loss(x, OLD, advantages, MASK, clip_range=0.2), NEW)
    torch.testing.assert_close(clipped, -torch.tensor([[0.0, 0, 0], [-6, 0, 0]]) / 2)


def test_first_step_of_whole_completions_is_reinforce():
    advantages = torch.tensor([1.0, -3.0])
    for clip_range in (None, 0.2):
        grad = gradient(lambda x, c=clip_range: sequence_surrogate_loss(x, NEW, advantages, MASK, clip_range=c), NEW)
        expected = gradient(lambda x: reinforce_loss(x, advantages[:, None].expand(2, 3), MASK), NEW)
        torch.testing.assert_close(grad, expected)


def test_rebel_by_hand():
    # Log-ratios l₁ = log 1.65 and l₂ = log 2 (by the ratios above), η = 2, R = (3, 1): one pair.
    returns = torch.tensor([3.0, 1.0])
    error = (math.log(1.65) - math.log(2)) / 2 - 2
    assert rebel_loss(NEW, OLD, returns, MASK, num_generations=2, eta=2.0).item() == pytest.approx(error**2)
    grad = gradient(lambda x: rebel_loss(x, OLD, returns, MASK, num_generations=2, eta=2.0), NEW)
    torch.testing.assert_close(grad, error * torch.tensor([[1.0, 1, 1], [-1, 0, 0]]))  # 2 e / η


def test_rebel_compares_all_pairs_of_a_prompt_and_none_across():
    # Two prompts of three one-token completions at π = π_t: z = −R.
    log_probs, mask = torch.zeros(6, 1), torch.ones(6, 1, dtype=torch.bool)
    returns = torch.tensor([0.0, 1.0, 3.0, 100.0, 100.0, 104.0])
    loss = rebel_loss(log_probs, log_probs, returns, mask, num_generations=3)
    assert loss.item() == pytest.approx(((1 + 9 + 4) / 3 + (0 + 16 + 16) / 3) / 2)
    first = rebel_loss(log_probs[:3], log_probs[:3], returns[:3], mask[:3], num_generations=3, count=2)
    second = rebel_loss(log_probs[3:], log_probs[3:], returns[3:], mask[3:], num_generations=3, count=2)
    assert (first + second).item() == pytest.approx(loss.item())


def test_rebel_is_solved_by_the_tilted_policy():
    """log π = log π_t + η R + a constant per prompt: no loss, no gradient."""
    returns, old = torch.tensor([0.3, -1.0, 5.0, 7.0]), torch.tensor([[-1.0], [-2.0], [-0.5], [-3.0]])
    mask, eta = torch.ones(4, 1, dtype=torch.bool), 0.7
    new = old + eta * returns[:, None] + torch.tensor([[0.4], [0.4], [-2.0], [-2.0]])
    assert rebel_loss(new, old, returns, mask, num_generations=2, eta=eta).item() == pytest.approx(0, abs=1e-10)
    assert gradient(lambda x: rebel_loss(x, old, returns, mask, num_generations=2, eta=eta), new).abs().max() < 1e-5


@pytest.mark.parametrize("group", [2, 3, 6])
def test_first_gradient_of_rebel_is_four_over_eta_times_leave_one_out(group):
    generator = torch.Generator().manual_seed(0)
    log_probs, returns = torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
    mask = torch.arange(4) < torch.tensor([1, 4, 2, 3, 3, 1])[:, None]
    advantages = (returns - leave_one_out_baseline(returns, group))[:, None].expand(6, 4)
    rebel = gradient(lambda x: rebel_loss(x, log_probs, returns, mask, num_generations=group, eta=0.5), log_probs)
    torch.testing.assert_close(rebel, 4 / 0.5 * gradient(lambda x: reinforce_loss(x, advantages, mask), log_probs))


def test_two_clip_ranges_by_hand():
    # ε = 0.2, ε_high = 2.5: ρ=.5, A=1: .5; ρ=3, A=2: 6, inside; ρ=1.1, A=−1: −1.1; ρ=2, A=−3: −6.
    loss = clipped_surrogate_loss(NEW, OLD, ADVANTAGES, MASK, clip_range=0.2, clip_range_high=2.5)
    assert loss.item() == pytest.approx(-(0.5 + 6 - 1.1 - 6) / 2)
    one = torch.ones(1, 1, dtype=torch.bool)
    low = clipped_surrogate_loss(
        torch.full((1, 1), math.log(0.5)), torch.zeros(1, 1), -one.float(), one, clip_range=0.2, clip_range_high=0.7
    )
    assert low.item() == pytest.approx(0.8)  # the lower bound is 1 − ε, not 1 − ε_high


def test_clip_fractions_by_hand():
    # Ratios .5 (A > 0), 3 (A > 0), 1.1 (A < 0), 2 (A < 0): one of four is held from above, none from below.
    fractions = clip_fractions(NEW, OLD, ADVANTAGES, MASK, clip_range=0.2, clip_range_high=0.2)
    assert (fractions.low.item(), fractions.high.item()) == (0.0, 0.25)
    turned = clip_fractions(NEW, OLD, -ADVANTAGES, MASK, clip_range=0.2, clip_range_high=0.5)
    assert (turned.low.item(), turned.high.item()) == (0.25, 0.25)
    assert clip_fractions(NEW, OLD, ADVANTAGES, MASK, clip_range=0.2, clip_range_high=2.5).high.item() == 0.0


def test_reference_kl_by_hand():
    # π_ref/π = 2, 1/3, 1/1.1, 1/2 (the ratios above upside down): x − 1 − log x; its gradient is 1 − x.
    inverse = [2.0, 1 / 3, 1 / 1.1, 0.5]
    expected = [x - 1 - math.log(x) for x in inverse]
    assert reference_kl_loss(NEW, OLD, MASK).item() == pytest.approx(sum(expected) / 4)
    per_sequence = reference_kl_loss(NEW, OLD, MASK, reduction="sequence_mean").item()
    assert per_sequence == pytest.approx((sum(expected[:3]) / 3 + expected[3]) / 2)
    grad = gradient(lambda x: reference_kl_loss(x, OLD, MASK), NEW)
    torch.testing.assert_close(grad, torch.tensor([[-1.0, 2 / 3, 1 - 1 / 1.1], [0.5, 0, 0]]) / 4)
    assert reference_kl_loss(OLD, OLD, MASK).item() == 0


GRPO_WEIGHTS = {"grpo": [1 / 6, 1 / 2], "bnpo": [1 / 4, 1 / 4], "dr_grpo": [1 / 10, 1 / 10], "dapo": [1 / 3, 1 / 3]}


@pytest.mark.parametrize("loss_type", GRPO_WEIGHTS)
def test_reductions_of_grpo_by_hand(loss_type):
    """What one token of each row weighs: three tokens and one, at most five possible, 1.5 on average in the rollout."""
    reduction = grpo_reduction(loss_type, sequences=2, tokens=4, max_length=5, mean_length=1.5)
    grad = gradient(lambda x: reinforce_loss(x, torch.ones(2, 3), MASK, **reduction), NEW)
    torch.testing.assert_close(-grad, torch.tensor(GRPO_WEIGHTS[loss_type])[:, None] * MASK)
    parts = [reinforce_loss(NEW[[i]], torch.ones(1, 3), MASK[[i]], **reduction) for i in range(2)]
    torch.testing.assert_close(sum(parts), reinforce_loss(NEW, torch.ones(2, 3), MASK, **reduction))


def test_advantages_and_old_log_probs_are_constants():
    advantages, old = ADVANTAGES.clone().requires_grad_(), OLD.clone().requires_grad_()
    new = NEW.clone().requires_grad_()
    clipped_surrogate_loss(new, old, advantages, MASK, clip_range=0.2).backward()
    reinforce_loss(new, advantages, MASK).backward()
    sequence_surrogate_loss(new, old, advantages[:, 0], MASK).backward()
    rebel_loss(new, old, advantages[:, 0], MASK, num_generations=2).backward()
    reference_kl_loss(new, old, MASK).backward()
    assert new.grad is not None
    assert advantages.grad is None
    assert old.grad is None


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 2.0, 0.0], [4.0, math.nan, math.nan]])
    returns = torch.tensor([[2.0, 2.0, 3.0], [2.0, math.nan, math.nan]])
    assert value_loss(values, returns, MASK).item() == pytest.approx(0.5 * (1 + 0 + 9 + 4) / 4)
    assert value_loss(values, returns, MASK, reduction="sequence_sum").item() == pytest.approx(0.5 * (1 + 0 + 9 + 4) / 2)
    torch.testing.assert_close(gradient(lambda v: value_loss(v, returns, MASK), values), torch.tensor([[-1.0, 0, -3], [2, 0, 0]]) / 4)


def test_value_clipping_by_hand():
    values = torch.tensor([[1.0, 3.0, 0.0], [4.0, 0.0, 0.0]])
    old_values = torch.tensor([[0.0, 3.1, 2.0], [3.9, 0.0, 0.0]])
    returns = torch.tensor([[2.0, 2.0, 3.0], [2.0, 0.0, 0.0]])
    # ε = .5. Clipped values: 0.5, 3.0 (inside), 1.5, 4.0 (inside). Larger squared errors: max(1, 2.25), 1, max(9, 2.25), 4.
    loss = value_loss(values, returns, MASK, old_values=old_values, clip_range=0.5)
    assert loss.item() == pytest.approx(0.5 * (2.25 + 1 + 9 + 4) / 4)
    grad = gradient(lambda v: value_loss(v, returns, MASK, old_values=old_values, clip_range=0.5), values)
    # The first is held by the clip, the third follows its own (larger) error.
    torch.testing.assert_close(grad, torch.tensor([[0.0, 1.0, -3.0], [2.0, 0.0, 0.0]]) / 4)


def test_value_targets_are_constants():
    returns = torch.ones(2, 3, requires_grad=True)
    value_loss(torch.zeros(2, 3, requires_grad=True), returns, MASK).backward()
    assert returns.grad is None


def test_entropy_bonus_is_the_mean_entropy():
    entropies = torch.tensor([[1.0, 2.0, 3.0], [2.0, 50.0, 50.0]])
    assert entropy_bonus(entropies, MASK).item() == 2.0
    assert entropy_bonus(entropies, MASK, reduction="sequence_sum").item() == 4.0


def test_ratio_diagnostics_by_hand():
    diagnostics = ratio_diagnostics(NEW, OLD, MASK, clip_range=0.2)
    ratios = [0.5, 3.0, 1.1, 2.0]
    assert diagnostics.approx_kl.item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 4)
    assert diagnostics.clip_fraction.item() == 0.75
    assert diagnostics.mean_ratio.item() == pytest.approx(6.6 / 4)
    assert diagnostics.max_ratio.item() == pytest.approx(3.0)
    fresh = ratio_diagnostics(OLD, OLD, MASK, clip_range=0.2)
    assert (fresh.approx_kl.item(), fresh.clip_fraction.item(), fresh.mean_ratio.item(), fresh.max_ratio.item()) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda rows, **count: reinforce_loss(NEW[rows], ADVANTAGES[rows], MASK[rows], **count),
        lambda rows, **count: clipped_surrogate_loss(NEW[rows], OLD[rows], ADVANTAGES[rows], MASK[rows], clip_range=0.2, **count),
        lambda rows, **count: sequence_surrogate_loss(NEW[rows], OLD[rows], ADVANTAGES[rows, 0], MASK[rows], clip_range=0.2, **count),
    ],
)
def test_shuffling_and_splitting_change_no_loss(loss_of):
    whole = loss_of(slice(None))
    torch.testing.assert_close(loss_of([1, 0]), whole)
    torch.testing.assert_close(loss_of([0], count=2) + loss_of([1], count=2), whole)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="`advantages` must have the shape of `log_probs`"):
        reinforce_loss(NEW, ADVANTAGES[:, 0], MASK)
    with pytest.raises(ValueError, match="`old_log_probs` must have the shape of `log_probs`"):
        clipped_surrogate_loss(NEW, OLD[:1], ADVANTAGES, MASK, clip_range=0.2)
    with pytest.raises(ValueError, match="`advantages` must have one entry per completion"):
        sequence_surrogate_loss(NEW, OLD, ADVANTAGES, MASK)
    with pytest.raises(ValueError, match="`returns` must have one entry per completion"):
        rebel_loss(NEW, OLD, ADVANTAGES, MASK, num_generations=2)
    with pytest.raises(ValueError, match="`num_generations` must be at least 2"):
        rebel_loss(NEW, OLD, ADVANTAGES[:, 0], MASK, num_generations=1)
    with pytest.raises(ValueError, match="`old_values` must be given with `clip_range`"):
        value_loss(NEW, NEW, MASK, clip_range=0.2)
