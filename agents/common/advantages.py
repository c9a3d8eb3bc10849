"""Returns, baselines and advantages of token sequences, as pure functions of (B, T) tensors.

Row i has `lengths[i]` tokens, each chosen by the policy; everything behind them is ignored on the way in and zero on the way out.
All results are without gradient.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from textgym.agents.common.masking import as_groups, check_same_shape, completion_mask_from_lengths


def _check_rows(rewards: Tensor, lengths: Tensor, bootstrap_values: Tensor | None, truncated: Tensor | None) -> None:
    if rewards.dim() != 2:
        raise ValueError(f"`rewards` must be (B, T), got shape {tuple(rewards.shape)}.")
    for name, tensor in {"lengths": lengths, "bootstrap_values": bootstrap_values, "truncated": truncated}.items():
        if tensor is not None and tensor.shape != rewards.shape[:1]:
            raise ValueError(f"`{name}` must have one entry per row of `rewards`, {rewards.shape[0]}, got shape {tuple(tensor.shape)}.")
    if (bootstrap_values is None) != (truncated is None):
        raise ValueError(
            "`truncated` and `bootstrap_values` belong together: give the value of the state at which each row was cut, or neither."
        )


def _values_after_end(rewards: Tensor, bootstrap_values: Tensor | None, truncated: Tensor | None) -> Tensor:
    """V(s_T) per row: that of the state at which an outer limit cut the row, 0 where the episode itself ended."""
    zeros = rewards.new_zeros(rewards.shape[0])
    if bootstrap_values is None or truncated is None:
        return zeros
    return torch.where(truncated, bootstrap_values.to(rewards.dtype), zeros)


@torch.no_grad()
def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimation, Schulman et al. 2016 (arXiv:1506.02438), eq. 16.

        δ_t = r_t + γ V(s_{t+1}) − V(s_t),    Â_t = δ_t + γ λ Â_{t+1}

    Behind the last token of a row Â = 0, and V is 0 if the episode ended there (EOS or the maximum length: the horizon is part of
    the MDP) and `bootstrap_values` if an outer limit cut it. λ = 1 gives return − value. The value target is `Â + values`.

    Args:
        rewards: r_t, (B, T).
        values: V(s_t), the state *before* token t, (B, T).
        lengths: tokens of each row, (B,) int.
        gamma: γ, discount per token.
        gae_lambda: λ in [0, 1].
        truncated: True where an outer limit cut the row, (B,) bool; by default nowhere.
        bootstrap_values: V(s_T) of the state at the cut, (B,); read only where `truncated`.

    Returns:
        Â, (B, T), zero behind the last token of each row.
    """
    _check_rows(rewards, lengths, bootstrap_values, truncated)
    check_same_shape(rewards=rewards, values=values)
    mask = completion_mask_from_lengths(lengths, rewards.shape[1])
    end_values = _values_after_end(rewards, bootstrap_values, truncated)
    last = lengths - 1
    advantages = torch.zeros_like(rewards)
    following = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else end_values
        next_values = torch.where(last == t, end_values, next_values)
        deltas = rewards[:, t] + gamma * next_values - values[:, t]
        # `following` is still zero at the last token of a row, because it is masked behind it.
        following = torch.where(mask[:, t], deltas + gamma * gae_lambda * following, torch.zeros_like(deltas))
        advantages[:, t] = following
    return advantages


@torch.no_grad()
def rewards_to_go(
    rewards: Tensor,
    lengths: Tensor,
    *,
    gamma: float = 1.0,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """The discounted return from each token on, G_t = r_t + γ G_{t+1}.

    With γ < 1 a policy gradient that weights ∇log π(a_t|s_t) by G_t leaves out the factor γ^t of the discounted objective's own
    gradient, as is usual (Sutton & Barto 2018, section 13.3, has it).

    Args:
        rewards: r_t, (B, T).
        lengths: tokens of each row, (B,) int.
        gamma: γ, discount per token.
        truncated: True where an outer limit cut the row, (B,) bool; by default nowhere.
        bootstrap_values: V(s_T) of the state at the cut, (B,); read only where `truncated`.

    Returns:
        G, (B, T), zero behind the last token of each row.
    """
    zeros = torch.zeros_like(rewards)
    return generalized_advantages(
        rewards, zeros, lengths, gamma=gamma, gae_lambda=1.0, truncated=truncated, bootstrap_values=bootstrap_values
    )


def whole_returns(rewards: Tensor, lengths: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Returns R = Σ_t γ^t r_t of each row, (B,)."""
    return rewards_to_go(rewards, lengths, gamma=gamma)[:, 0]


@torch.no_grad()
def importance_weighted_returns(rewards: Tensor, weights: Tensor, lengths: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Reward-to-go of stale samples, each reward with the weight of its own token.

        G_t = Σ_{u≥t} γ^{u−t} W_u r_u,    W_u = Π_{v≤u} π_θ(a_v|s_v) / π_old(a_v|s_v)

    Then E_old Σ_t ∇log π_θ(a_t|s_t) (G_t − W_t b_t) = ∇ E_{π_θ} Σ_t r_t exactly, for any baseline b_t that does not depend on a_t
    (per-decision importance sampling, Precup et al. 2000). Weighting G_t by W_t alone would leave the later actions to π_old.

    Args:
        rewards: r_t under the current policy (see `importance.restate_kl_rewards`), (B, T).
        weights: W_t, (B, T), see `textgym.agents.common.importance`; fresh samples have 1.
        lengths: tokens of each row, (B,) int.
        gamma: γ, discount per token.

    Returns:
        G, (B, T), zero behind the last token of each row.
    """
    check_same_shape(rewards=rewards, weights=weights)
    return rewards_to_go(weights * rewards, lengths, gamma=gamma)


@torch.no_grad()
def hold_last(values: Tensor, lengths: Tensor) -> Tensor:
    """Fills the places behind the end of each row with the row's last value: (B, T) to (B, T)."""
    positions = torch.arange(values.shape[1], device=values.device).expand_as(values)
    return values.gather(1, torch.minimum(positions, (lengths - 1).clamp(min=0).unsqueeze(1)))


@torch.no_grad()
def leave_one_out_baseline(returns: Tensor, num_generations: int, lengths: Tensor | None = None) -> Tensor:
    """The mean return of the *other* completions of the same prompt, Ahmadian et al. 2024 (arXiv:2402.14740), eq. 8.

        b_i = 1/(G−1) Σ_{j≠i} R_j,    A_i = R_i − b_i

    It does not depend on row i, so the gradient stays unbiased (with the own return in the mean it would be (1 − 1/G) ∇J). With
    G = B this is the mean of the batch as a baseline. For (B, T) returns-to-go b_{i,t} is the others' mean at token t,
    where one that has ended before t counts with the return-to-go of its last token; with one reward at the end this is
    the formula above at every token.

    Args:
        returns: whole returns (B,) or returns-to-go (B, T); rows prompt-major, the G completions of a prompt next to each other.
        num_generations: G, at least 2.
        lengths: tokens of each row, (B,) int; needed for (B, T).

    Returns:
        b, the shape of `returns`.
    """
    held = _held_returns(returns, lengths)
    groups = as_groups("returns", held, num_generations)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (num_generations - 1)
    return others.reshape(held.shape)


def _held_returns(returns: Tensor, lengths: Tensor | None) -> Tensor:
    if returns.dim() == 1:
        return returns
    if lengths is None:
        raise ValueError("`lengths` must be given with returns-to-go: a (B, T) `returns` has padding that must not enter the baseline.")
    if returns.dim() != 2 or lengths.shape != returns.shape[:1]:
        raise ValueError(
            f"`returns` must be (B,) or (B, T) with `lengths` (B,), got shapes {tuple(returns.shape)} and {tuple(lengths.shape)}."
        )
    return hold_last(returns, lengths)


AdvantageScale: TypeAlias = Literal["group", "batch", "none"]


@torch.no_grad()
def group_std(returns: Tensor, num_generations: int) -> Tensor:
    """Returns the standard deviation of each prompt's returns, G − 1 in the denominator; exactly 0 where they are all equal.

    Args:
        returns: (B,); rows prompt-major.
        num_generations: G, at least 2.

    Returns:
        (B / G,).
    """
    groups = as_groups("returns", returns, num_generations)
    return (groups - groups[:, :1]).std(dim=1)


@torch.no_grad()
def group_normalized_advantages(returns: Tensor, num_generations: int, *, scale: AdvantageScale = "group", eps: float = 1e-4) -> Tensor:
    """GRPO's advantages, Shao et al. 2024 (arXiv:2402.03300), section 4.1.2.

        A_i = (R_i − mean R) / (std R + eps)

    The mean contains the own return: without the division A is (G − 1)/G times RLOO's. A group whose returns are all equal has A = 0.

    Args:
        returns: R_i, whole returns (B,); rows prompt-major, the G completions of a prompt next to each other.
        num_generations: G, at least 2.
        scale: "group" divides by the standard deviation of the prompt's returns, "batch" by that of all (both with one less than
            their number in the denominator), "none" by 1 (Liu et al. 2025, arXiv:2503.20783).
        eps: added to the standard deviation; TRL's.

    Returns:
        A, (B,).
    """
    groups = as_groups("returns", returns, num_generations)
    # Less the first one, equal returns are exact zeros, whatever their level.
    relative = groups - groups[:, :1]
    deviations = relative - relative.mean(dim=1, keepdim=True)
    if scale == "group":
        deviations = deviations / (group_std(returns, num_generations)[:, None] + eps)
    elif scale == "batch":
        deviations = deviations / (returns.std() + eps)
    return deviations.reshape(returns.shape)


def moving_average(previous: float | None, value: float, *, decay: float) -> float:
    """Returns decay · previous + (1 − decay) · value, or `value` if there is no previous one.

    As a baseline, use the average from *before* the batch (0 for the first one): one that contains the batch's own returns is
    biased by them.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must be in [0, 1), got {decay}.")
    return value if previous is None else decay * previous + (1 - decay) * value
