"""Importance weights for completions that an older policy sampled.

With ρ_t = π_θ(a_t|s_t) / π_old(a_t|s_t) the state s_t itself is reached with probability Π_{u<t} ρ_u times that under π_old, so the
unbiased weight of token t is the whole product up to it. PPO's per-token ratio leaves out the product before t, and a truncated
product cuts its tail: both are biased, and both keep the variance bounded.

All weights are functions of the log-probs with their gradient; detach them where the formula wants a constant.
"""

from torch import Tensor

from textgym.agents.common.masking import check_same_shape, zero_outside


def masked_log_ratios(log_probs: Tensor, old_log_probs: Tensor, completion_mask: Tensor) -> Tensor:
    """Returns log π_θ(a_t|s_t) − log π_old(a_t|s_t), (B, T), zero where `completion_mask` is False."""
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, completion_mask=completion_mask)
    # Before `exp`, so that no infinity of the padding enters its gradient.
    return zero_outside(log_probs - old_log_probs, completion_mask)


def sequence_log_ratios(log_probs: Tensor, old_log_probs: Tensor, completion_mask: Tensor) -> Tensor:
    """Returns log π_θ(y|x) − log π_old(y|x) of whole completions, the sum over the True tokens: (B, T) to (B,)."""
    return masked_log_ratios(log_probs, old_log_probs, completion_mask).sum(dim=1)


def token_ratios(log_probs: Tensor, old_log_probs: Tensor, completion_mask: Tensor) -> Tensor:
    """The per-token ratio ρ_t of PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 6): biased on stale samples, of low variance.

    Args:
        log_probs: log π_θ(a_t|s_t), (B, T).
        old_log_probs: log π_old(a_t|s_t) of the policy that sampled, (B, T).
        completion_mask: True where the policy chose the token, (B, T) bool.

    Returns:
        (B, T), one where `completion_mask` is False.
    """
    return masked_log_ratios(log_probs, old_log_probs, completion_mask).exp()


def cumulative_ratios(log_probs: Tensor, old_log_probs: Tensor, completion_mask: Tensor) -> Tensor:
    """The unbiased weight W_t = Π_{u≤t} ρ_u of token t (Precup et al. 2000, per-decision importance sampling).

    E_old[W_t f(x, y_≤t)] = E_π[f(x, y_≤t)] for every f; its variance grows exponentially with t.

    Args:
        log_probs: log π_θ(a_t|s_t), (B, T).
        old_log_probs: log π_old(a_t|s_t) of the policy that sampled, (B, T).
        completion_mask: True where the policy chose the token, (B, T) bool.

    Returns:
        (B, T); behind the last token of a row the product no longer changes.
    """
    return masked_log_ratios(log_probs, old_log_probs, completion_mask).cumsum(dim=1).exp()


def truncated_cumulative_ratios(log_probs: Tensor, old_log_probs: Tensor, completion_mask: Tensor, *, max_weight: float) -> Tensor:
    """The truncated weight min(W_t, c) (Ionides 2008): biased towards π_old, with bounded variance.

    Args:
        log_probs: log π_θ(a_t|s_t), (B, T).
        old_log_probs: log π_old(a_t|s_t) of the policy that sampled, (B, T).
        completion_mask: True where the policy chose the token, (B, T) bool.
        max_weight: c, at least 1 (so that fresh samples, W_t = 1, are left alone).

    Returns:
        (B, T).
    """
    if not max_weight >= 1:
        raise ValueError(f"`max_weight` must be at least 1, so that samples of the current policy keep weight 1, got {max_weight}.")
    return cumulative_ratios(log_probs, old_log_probs, completion_mask).clamp(max=max_weight)


def restate_kl_rewards(rewards: Tensor, log_probs: Tensor, old_log_probs: Tensor, completion_mask: Tensor, *, beta: float) -> Tensor:
    """Moves KL-shaped rewards of stale samples from the policy that sampled to the current one.

    KL shaping put r'_t = r_t − β (log π_old − log π_ref) on the tokens when they were sampled. The J of the current policy has
    log π_θ in the place of log π_old (detached, as ever):

        r'_t(θ) = r'_t − β (log π_θ(a_t|s_t) − log π_old(a_t|s_t))

    Without it the importance-weighted policy gradient is unbiased for the wrong reward.

    Args:
        rewards: r'_t as the environment gave them, (B, T).
        log_probs: log π_θ(a_t|s_t), (B, T).
        old_log_probs: log π_old(a_t|s_t) of the policy that sampled, (B, T).
        completion_mask: True where the policy chose the token, (B, T) bool.
        beta: β of the shaping, in reward per nat.

    Returns:
        (B, T), no gradient.
    """
    check_same_shape(rewards=rewards, log_probs=log_probs)
    return rewards - beta * masked_log_ratios(log_probs, old_log_probs, completion_mask).detach()
