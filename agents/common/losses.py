"""The losses of the policy-gradient family: pure functions of tensors, each with its paper and its reduction.

Every table is (B, T): one row per completion, one column per token, `completion_mask` True where the policy chose the token.
Losses are minimised, so an objective to be maximised enters with a minus.
"""

from typing import Literal, NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor

from textgym.agents.common.importance import masked_log_ratios, sequence_log_ratios
from textgym.agents.common.masking import (
    Reduction,
    as_groups,
    check_one_per_row,
    check_same_shape,
    masked_mean,
    reduce_tokens,
    zero_outside,
)


def reinforce_loss(
    log_probs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    reduction: Reduction = "sequence_sum",
    count: float | Tensor | None = None,
) -> Tensor:
    """The REINFORCE surrogate, Williams 1992: its gradient is minus the policy gradient.

        L = −1/B Σ_i Σ_t A_{i,t} log π(a_t|s_t),    −∇L = 1/B Σ_i Σ_t A_{i,t} ∇log π(a_t|s_t)

    With A_t = return (or return-to-go) − baseline(s_t) and samples of π itself, E[−∇L] = ∇J. For samples of an older policy see
    `advantages.importance_weighted_returns`.

    Args:
        log_probs: log π(a_t|s_t) under the policy being trained, (B, T).
        advantages: A_t, (B, T); taken as constants.
        completion_mask: True where the policy chose the token (not prompt, not padding), (B, T) bool.
        reduction: see `masking.reduce_tokens`; only "sequence_sum" estimates ∇J when lengths vary.
        count: the sequences (or tokens) of the whole batch when this call sees a part of it.

    Returns:
        Scalar: by default the sum over tokens, mean over sequences.
    """
    check_same_shape(log_probs=log_probs, advantages=advantages, completion_mask=completion_mask)
    log_probs = zero_outside(log_probs, completion_mask)
    return -reduce_tokens(log_probs * advantages.detach(), completion_mask, reduction=reduction, count=count)


def clipped_surrogate_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    reduction: Reduction = "sequence_sum",
    count: float | Tensor | None = None,
) -> Tensor:
    """PPO's clipped surrogate loss, Schulman et al. 2017 (arXiv:1707.06347), eq. 7; two bounds: Yu et al. 2025 (arXiv:2503.14476).

        L = −E[ min(ρ_t A_t, clip(ρ_t, 1−ε, 1+ε_high) A_t) ],    ρ_t = π(a_t|s_t) / π_old(a_t|s_t)

    Where π = π_old the gradient is that of `reinforce_loss` with the same reduction.

    Args:
        log_probs: log π(a_t|s_t) under the policy being trained, (B, T).
        old_log_probs: the same under the policy that sampled, (B, T); taken as constants.
        advantages: A_t, (B, T); taken as constants.
        completion_mask: True where the policy chose the token (not prompt, not padding), (B, T) bool.
        clip_range: ε, dimensionless.
        clip_range_high: ε_high; None for ε.
        reduction: see `masking.reduce_tokens`; "token_mean" is the usual form in implementations of PPO, which changes the
            objective when lengths vary.
        count: the sequences (or tokens) of the whole batch when this call sees a part of it.

    Returns:
        Scalar: by default the sum over tokens, mean over sequences.
    """
    check_same_shape(log_probs=log_probs, advantages=advantages)
    advantages = advantages.detach()
    ratios = masked_log_ratios(log_probs, old_log_probs.detach(), completion_mask).exp()
    clipped_ratios = ratios.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
    surrogate = torch.min(ratios * advantages, clipped_ratios * advantages)
    return -reduce_tokens(surrogate, completion_mask, reduction=reduction, count=count)


def sequence_surrogate_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_range: float | None = None,
    count: float | Tensor | None = None,
) -> Tensor:
    """The surrogate of whole completions, each one action: RLOO's, Ahmadian et al. 2024 (arXiv:2402.14740), eq. 7 and 8.

        L = −1/B Σ_i ρ_i A_i    or    L = −1/B Σ_i min(ρ_i A_i, clip(ρ_i, 1−ε, 1+ε) A_i),    ρ_i = π(y_i|x_i) / π_old(y_i|x_i)

    The first form is unbiased: E_old[ρ A ∇log π(y|x)] = E_π[A ∇log π(y|x)]. Where π = π_old both have the gradient of `reinforce_loss`
    with A_i at every token. The second is PPO's clipping (Schulman et al. 2017, eq. 7) of the sequence's ratio, as TRL has it.

    Args:
        log_probs: log π(a_t|s_t) under the policy being trained, (B, T).
        old_log_probs: the same under the policy that sampled, (B, T); taken as constants.
        advantages: A_i, (B,); taken as constants.
        completion_mask: True where the policy chose the token (not prompt, not padding), (B, T) bool.
        clip_range: ε, dimensionless; None for no clipping.
        count: the sequences of the whole batch when this call sees a part of it.

    Returns:
        Scalar: the sum over tokens is in log π(y|x); mean over sequences.
    """
    check_one_per_row(log_probs, advantages=advantages)
    advantages = advantages.detach()
    ratios = sequence_log_ratios(log_probs, old_log_probs.detach(), completion_mask).exp()
    surrogate = ratios * advantages
    if clip_range is not None:
        surrogate = torch.min(surrogate, ratios.clamp(1 - clip_range, 1 + clip_range) * advantages)
    return -surrogate.sum() / (len(surrogate) if count is None else count)


def rebel_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    returns: Tensor,
    completion_mask: Tensor,
    *,
    num_generations: int,
    eta: float = 1.0,
    count: float | Tensor | None = None,
) -> Tensor:
    """REBEL's squared error, Gao et al. 2024 (arXiv:2404.16767), eq. 1: relative returns regressed onto relative log-ratios.

        L = mean over pairs i < j of a prompt, mean over prompts, of (z_i − z_j)²,    z_i = 1/η log π(y_i|x)/π_t(y_i|x) − R_i

    Where π = π_t the gradient is 4/η times that of `reinforce_loss` with the leave-one-out advantages at every token.

    Args:
        log_probs: log π(a_t|s_t) under the policy being trained, (B, T).
        old_log_probs: the same under π_t that sampled, (B, T); taken as constants.
        returns: R_i, (B,), the KL term that of π_t; taken as constants.
        completion_mask: True where the policy chose the token (not prompt, not padding), (B, T) bool.
        num_generations: G, at least 2; rows prompt-major, the G completions of a prompt next to each other.
        eta: η, in nats per reward.
        count: the prompts of the whole batch when this call sees a part of it.

    Returns:
        Scalar: log-ratios are sums over tokens; mean over the G (G − 1)/2 pairs of a prompt, mean over prompts.
    """
    check_one_per_row(log_probs, returns=returns)
    residuals = sequence_log_ratios(log_probs, old_log_probs.detach(), completion_mask) / eta - returns.detach()
    groups = as_groups("log_probs", residuals, num_generations)
    differences = groups[:, :, None] - groups[:, None, :]  # (P, G, G): every pair twice, and the zeros of the diagonal
    per_prompt = differences.square().sum(dim=(1, 2)) / (num_generations * (num_generations - 1))
    return per_prompt.sum() / (len(groups) if count is None else count)


GRPOLoss: TypeAlias = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


class TokenReduction(TypedDict):
    """The keywords `reduction` and `count` of the losses, see `masking.reduce_tokens`."""

    reduction: Reduction
    count: float


def grpo_reduction(loss_type: GRPOLoss, *, sequences: int, tokens: int, max_length: int, mean_length: float) -> TokenReduction:
    """How GRPO's variants reduce a minibatch; all numbers are those of the whole minibatch, so micro-batches add up.

    =========  ==================================================================================================================
    "grpo"     mean over the tokens of a completion, mean over completions (Shao et al. 2024, arXiv:2402.03300, eq. 3)
    "bnpo"     mean over the tokens of the minibatch
    "dr_grpo"  sum over tokens / (completions · longest possible completion) (Liu et al. 2025, arXiv:2503.20783, section 3.2)
    "dapo"     sum over tokens / (completions · mean length in the rollout): over all minibatches of a rollout the mean over
               its tokens (Yu et al. 2025, arXiv:2503.14476, eq. 8, with the batch in the place of the group, as TRL has it)
    =========  ==================================================================================================================

    Args:
        loss_type: one of the four.
        sequences: completions of the minibatch.
        tokens: of the minibatch.
        max_length: the most tokens a completion can have.
        mean_length: tokens per completion of the whole rollout.
    """
    if loss_type == "grpo":
        return {"reduction": "sequence_mean", "count": sequences}
    if loss_type == "bnpo":
        return {"reduction": "token_mean", "count": tokens}
    return {"reduction": "sequence_sum", "count": sequences * (max_length if loss_type == "dr_grpo" else mean_length)}


def reference_kl_loss(
    log_probs: Tensor,
    reference_log_probs: Tensor,
    completion_mask: Tensor,
    *,
    reduction: Reduction = "token_mean",
    count: float | Tensor | None = None,
) -> Tensor:
    """The k3 estimate of the KL to the reference as a term of the loss, Shao et al. 2024 (arXiv:2402.03300), eq. 4.

        L = π_ref/π − 1 − log π_ref/π,    ∇L = (1 − π_ref/π) ∇log π,    E_π[∇L] = ∇KL(π_ref ‖ π) at each visited state

    Its value estimates KL(π‖π_ref), its gradient is that of the other KL: what it pulls towards is not π_ref exp(r/β)/Z.

    Args:
        log_probs: log π(a_t|s_t) under the policy being trained, (B, T).
        reference_log_probs: log π_ref(a_t|s_t), (B, T); taken as constants.
        completion_mask: True where the policy chose the token, (B, T) bool.
        reduction: see `masking.reduce_tokens`.
        count: the tokens (or sequences) of the whole batch when this call sees a part of it.

    Returns:
        Scalar, at least 0: by default the mean over the True tokens, in nats per token.
    """
    to_reference = -masked_log_ratios(log_probs, reference_log_probs.detach(), completion_mask)
    # expm1 keeps the digits that exp(x) - 1 loses for small x.
    return reduce_tokens(torch.expm1(to_reference) - to_reference, completion_mask, reduction=reduction, count=count)


def value_loss(
    values: Tensor,
    returns: Tensor,
    completion_mask: Tensor,
    *,
    old_values: Tensor | None = None,
    clip_range: float | None = None,
    reduction: Reduction = "token_mean",
    count: float | Tensor | None = None,
) -> Tensor:
    """Half the squared error of the value function, clipped around the old values on request.

        L = ½ (V − R̂)²    or    L = ½ max((V − R̂)², (V_old + clip(V − V_old, −ε, ε) − R̂)²)

    The second form is detail 9 of Huang et al. 2022 ("The 37 Implementation Details of PPO").

    Args:
        values: V(s_t) of the value function being trained, (B, T).
        returns: R̂_t, the targets, (B, T); taken as constants.
        completion_mask: True where the policy chose the token, (B, T) bool.
        old_values: V_old(s_t) of the rollout, (B, T); needed for clipping.
        clip_range: ε in units of reward; `None` for no clipping.
        reduction: see `masking.reduce_tokens`.
        count: the tokens (or sequences) of the whole batch when this call sees a part of it.

    Returns:
        Scalar: by default the mean over the True tokens.
    """
    check_same_shape(values=values, returns=returns, completion_mask=completion_mask, old_values=old_values)
    values, returns = zero_outside(values, completion_mask), zero_outside(returns.detach(), completion_mask)
    errors = (values - returns).square()
    if clip_range is not None:
        if old_values is None:
            raise ValueError("`old_values` must be given with `clip_range`: the values are clipped around them.")
        old_values = zero_outside(old_values.detach(), completion_mask)
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        errors = torch.max(errors, (clipped - returns).square())
    return reduce_tokens(0.5 * errors, completion_mask, reduction=reduction, count=count)


def entropy_bonus(
    entropies: Tensor, completion_mask: Tensor, *, reduction: Reduction = "token_mean", count: float | Tensor | None = None
) -> Tensor:
    """The mean entropy of the policy at the visited states, to be *subtracted* from a loss (Schulman et al. 2017, eq. 9).

    Args:
        entropies: H(π(·|s_t)) in nats, (B, T).
        completion_mask: True where the policy chose the token, (B, T) bool.
        reduction: see `masking.reduce_tokens`.
        count: the tokens (or sequences) of the whole batch when this call sees a part of it.

    Returns:
        Scalar, at least 0: by default the mean over the True tokens, in nats per token.
    """
    return reduce_tokens(entropies, completion_mask, reduction=reduction, count=count)


class RatioDiagnostics(NamedTuple):
    """What the ratios of one minibatch look like; scalar tensors without gradient, all over the True tokens.

    Attributes:
        approx_kl: mean of (ρ − 1) − log ρ, the k3 estimate of KL(π_old ‖ π) in nats per token (Schulman 2020).
        clip_fraction: share of the tokens with |ρ − 1| > ε.
        mean_ratio: mean of ρ; 1 before the first step.
        max_ratio: the largest ρ; 1 before the first step.
    """

    approx_kl: Tensor
    clip_fraction: Tensor
    mean_ratio: Tensor
    max_ratio: Tensor


@torch.no_grad()
def ratio_diagnostics(log_probs: Tensor, old_log_probs: Tensor, completion_mask: Tensor, *, clip_range: float) -> RatioDiagnostics:
    """Returns the diagnostics of ρ_t = π(a_t|s_t) / π_old(a_t|s_t), for logs and for stopping at a target KL.

    Args:
        log_probs: log π(a_t|s_t) under the policy being trained, (B, T).
        old_log_probs: the same under the policy that sampled, (B, T).
        completion_mask: True where the policy chose the token, (B, T) bool.
        clip_range: ε of the clipped surrogate.
    """
    log_ratios = masked_log_ratios(log_probs, old_log_probs, completion_mask)
    ratios = log_ratios.exp()
    return RatioDiagnostics(
        approx_kl=masked_mean(ratios - 1 - log_ratios, completion_mask),
        clip_fraction=masked_mean(((ratios - 1).abs() > clip_range).to(ratios.dtype), completion_mask),
        mean_ratio=masked_mean(ratios, completion_mask),
        max_ratio=zero_outside(ratios, completion_mask).max(),
    )


class ClipFractions(NamedTuple):
    """Shares of the tokens whose gradient the clipping has taken away; scalar tensors without gradient.

    Attributes:
        low: ρ < 1 − ε and A < 0.
        high: ρ > 1 + ε_high and A > 0.
    """

    low: Tensor
    high: Tensor


@torch.no_grad()
def clip_fractions(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, completion_mask: Tensor, *, clip_range: float, clip_range_high: float
) -> ClipFractions:
    """Returns how much of a minibatch `clipped_surrogate_loss` holds; its arguments, TRL's `clip_ratio/low_mean` and `high_mean`.

    Args:
        log_probs: log π(a_t|s_t) under the policy being trained, (B, T).
        old_log_probs: the same under the policy that sampled, (B, T).
        advantages: A_t, (B, T).
        completion_mask: True where the policy chose the token, (B, T) bool.
        clip_range: ε.
        clip_range_high: ε_high.
    """
    ratios = masked_log_ratios(log_probs, old_log_probs, completion_mask).exp()
    low, high = (ratios < 1 - clip_range) & (advantages < 0), (ratios > 1 + clip_range_high) & (advantages > 0)
    return ClipFractions(*(masked_mean(held.to(ratios.dtype), completion_mask) for held in (low, high)))
