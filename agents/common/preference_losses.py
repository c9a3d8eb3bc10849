"""The losses of learning from preferences: pure functions of log-ratios, one number per example.

A log-ratio is h = log π(y|x) − log π_ref(y|x) of a whole completion: summed over its tokens, in nats. Losses are returned per example,
(B,), so that a data set can weigh them; `weighted_mean` reduces them.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from textgym.agents.common.masking import check_same_shape


def dpo_loss(margins: Tensor, preferences: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, Rafailov et al. 2023 (arXiv:2305.18290) eq. 7, with soft labels.

        ℓ(Δ) = −log σ(β Δ),    L = q ℓ(Δ) + (1 − q) ℓ(−Δ),    q = p (1 − ε) + (1 − p) ε

    With p = 1 and ε = 0 it is DPO; with ε > 0 its conservative form (cDPO: labels are believed with probability 1 − ε, Mitchell 2023).
    Where p is the Bradley–Terry probability σ(r*(y_w) − r*(y_l)), the minimum is at βΔ = r*(y_w) − r*(y_l): the policy is π* of r* and β.

    Args:
        margins: Δ = h_chosen − h_rejected in nats, (B,).
        preferences: p = P(chosen ≻ rejected) in [0, 1], (B,).
        beta: β, in reward per nat.
        label_smoothing: ε in [0, ½).

    Returns:
        (B,), one loss per pair.
    """
    check_same_shape(margins=margins, preferences=preferences)
    believed = preferences * (1 - label_smoothing) + (1 - preferences) * label_smoothing
    return -believed * logsigmoid(beta * margins) - (1 - believed) * logsigmoid(-beta * margins)


def robust_dpo_loss(margins: Tensor, preferences: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (rDPO), Chowdhury et al. 2024 (arXiv:2403.00409): unbiased where labels are flipped with probability ε.

        L = [(1 − ε) ℓ(Δ) − ε ℓ(−Δ)] / (1 − 2ε),    ℓ(Δ) = −log σ(β Δ)

    Its mean over flipped and unflipped labels is the DPO loss of the unflipped ones. It is not bounded from below: watch the margins.

    Args:
        margins: Δ = h_chosen − h_rejected in nats, (B,).
        preferences: p, (B,); the loss of soft labels is p L(Δ) + (1 − p) L(−Δ).
        beta: β, in reward per nat.
        label_smoothing: ε in [0, ½).

    Returns:
        (B,), one loss per pair.
    """
    check_same_shape(margins=margins, preferences=preferences)
    as_labelled, flipped = -logsigmoid(beta * margins), -logsigmoid(-beta * margins)
    forward = ((1 - label_smoothing) * as_labelled - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    backward = ((1 - label_smoothing) * flipped - label_smoothing * as_labelled) / (1 - 2 * label_smoothing)
    return preferences * forward + (1 - preferences) * backward


def ipo_loss(margins: Tensor, preferences: Tensor, *, beta: float) -> Tensor:
    """IPO, Azar et al. 2023 (arXiv:2310.12036) eq. 17: a regression of the margin, which stays finite on certain labels.

        L = (Δ − 1/(2β))²

    Args:
        margins: Δ = h_chosen − h_rejected in nats, (B,): of log-ratios *summed* over the tokens, as in the paper.
        preferences: p, (B,); the loss of soft labels is p L(Δ) + (1 − p) L(−Δ), at its minimum where Δ = (2p − 1) / (2β).
        beta: β, the paper's τ.

    Returns:
        (B,), one loss per pair, in squared nats.
    """
    check_same_shape(margins=margins, preferences=preferences)
    target = 1 / (2 * beta)
    return preferences * (margins - target).square() + (1 - preferences) * (margins + target).square()


def plackett_luce_loss(log_ratios: Tensor, present: Tensor, *, beta: float) -> Tensor:
    """DPO for rankings, Rafailov et al. 2023 (arXiv:2305.18290), appendix A.3: the Plackett–Luce likelihood of the implicit rewards.

        L = −Σ_i [ β h_i − log Σ_{j≥i} exp(β h_j) ]

    At K = 2 it is DPO.

    Args:
        log_ratios: h_i in nats, best completion first, (B, K).
        present: False behind the end of a shorter ranking, (B, K) bool; the first two are True.
        beta: β, in reward per nat.

    Returns:
        (B,), one loss per ranking: the sum over its places.
    """
    check_same_shape(log_ratios=log_ratios, present=present)
    rewards = (beta * log_ratios).masked_fill(~present, -torch.inf)
    remaining = rewards.flip(1).logcumsumexp(1).flip(1)  # log Σ_{j≥i}
    # Only present places are looked at: −inf − (−inf) of the others would be NaN, in the value and in the gradient.
    places = remaining.masked_fill(~present, 0.0) - rewards.masked_fill(~present, 0.0)
    return places.sum(1)


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    *,
    kl: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, Ethayarajh et al. 2024 (arXiv:2402.01306) eq. 8: prospect theory's value of gains and losses around a reference point.

        L = λ_y − v,    v = λ_D σ(β (h − z₀)) if y is desirable, λ_U σ(β (z₀ − h)) if not

    Args:
        log_ratios: h in nats, (B,).
        desirable: True or 1 for desirable, (B,).
        kl: z₀ in nats, an estimate of KL(π ‖ π_ref), at least 0; a constant.
        beta: β, risk aversion per nat.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    Returns:
        (B,), one loss per completion, between 0 and λ.
    """
    check_same_shape(log_ratios=log_ratios, desirable=desirable)
    desirable = desirable.bool()
    gains = desirable_weight * (1 - torch.sigmoid(beta * (log_ratios - kl)))
    losses = undesirable_weight * (1 - torch.sigmoid(beta * (kl - log_ratios)))
    return torch.where(desirable, gains, losses)


def weighted_mean(losses: Tensor, weights: Tensor, count: float | None = None) -> Tensor:
    """Returns 1/n Σ_i w_i L_i.

    Args:
        losses: L_i, (B,).
        weights: w_i, (B,), of mean 1 over the whole data set: then a random batch's gradient is that of the weighted data set on average.
        count: n, the examples of the whole batch when this call sees a part of it.
    """
    check_same_shape(losses=losses, weights=weights)
    return (losses * weights).sum() / (len(losses) if count is None else count)
