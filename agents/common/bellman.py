"""Targets and losses of value-based agents: pure functions of tensors, each with its paper and its reduction.

Every table is (B, T): one row per completion, one column per token; column t of a state's value is that of s_t, the state *before*
token t. EOS and the horizon end an episode, and the value behind them is 0; only a row that an outer limit cut goes on.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from textgym.agents.common.masking import Reduction, check_same_shape, completion_mask_from_lengths, reduce_tokens, zero_outside


def n_step_returns(
    rewards: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    n_steps: int | None = 1,
    gamma: float = 1.0,
    truncated: Tensor | None = None,
    end_values: Tensor | None = None,
) -> Tensor:
    """The rewards of the next n tokens and the value of the state after them, Sutton & Barto 2018, eq. 7.1.

        G_t = Σ_{k<m} γ^k r_{t+k} + γ^m V(s_{t+m}),    m = min(n, tokens left)

    V behind the end of an episode is 0. Gradients flow through all that is given; detach what is a target.

    Args:
        rewards: r_t, (B, T).
        values: V(s_t), the state *before* token t, (B, T).
        lengths: tokens of each row, (B,) int.
        n_steps: n; None takes every path to the end of its row.
        gamma: γ, discount per token.
        truncated: True where an outer limit cut the row, (B,) bool; by default nowhere.
        end_values: V(s_T) of the state at the cut, (B,); read only where `truncated`.

    Returns:
        G, (B, T), zero behind the last token of each row.
    """
    if rewards.dim() != 2:
        raise ValueError(f"`rewards` must be (B, T), got shape {tuple(rewards.shape)}.")
    check_same_shape(rewards=rewards, values=values)
    if (truncated is None) != (end_values is None):
        raise ValueError("`truncated` and `end_values` belong together: give the value of the state at which each row was cut, or neither.")
    width = rewards.shape[1]
    steps = width if n_steps is None else min(n_steps, width)
    mask = completion_mask_from_lengths(lengths, width)
    rewards = pad(zero_outside(rewards, mask), (0, steps))
    total = torch.zeros_like(values)
    for k in range(steps):
        total = total + gamma**k * rewards[:, k : k + width]
    states = pad(zero_outside(values, mask), (0, 1))  # (B, T + 1): V(s_0) .. V(s_T)
    if truncated is not None and end_values is not None:
        at_end = torch.arange(width + 1, device=lengths.device) == lengths[:, None]
        states = torch.where(at_end & truncated[:, None], end_values[:, None], states)
    tokens = torch.arange(width, device=lengths.device).expand_as(mask)
    after = torch.minimum(tokens + steps, lengths[:, None]).clamp(min=0)
    discounts = torch.as_tensor(gamma, dtype=values.dtype, device=values.device) ** (after - tokens).clamp(min=0)
    return zero_outside(total + discounts * states.gather(1, after), mask)


def soft_action_values(values: Tensor, log_probs: Tensor, reference_log_probs: Tensor, *, beta: float) -> Tensor:
    """Q(s_t,a_t) = V(s_t) + β log π(a_t|s_t)/π_ref(a_t|s_t), Schulman et al. 2017 (arXiv:1704.06440); any shape.

    With Q so written, π(a|s) = π_ref(a|s) exp((Q(s,a) − V(s))/β) and V(s) = β log Σ_a π_ref(a|s) exp(Q(s,a)/β) hold whatever the model
    says: the language model is the policy of this Q.

    Args:
        values: V(s_t).
        log_probs: log π(a_t|s_t).
        reference_log_probs: log π_ref(a_t|s_t); taken as constants.
        beta: β, in reward per nat.
    """
    check_same_shape(values=values, log_probs=log_probs, reference_log_probs=reference_log_probs)
    return values + beta * (log_probs - reference_log_probs.detach())


def path_consistency_loss(
    values: Tensor,
    log_probs: Tensor,
    reference_log_probs: Tensor,
    rewards: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    gamma: float = 1.0,
    n_steps: int | None = None,
    truncated: Tensor | None = None,
    end_values: Tensor | None = None,
    reduction: Reduction = "sequence_sum",
    count: float | Tensor | None = None,
) -> Tensor:
    """Path consistency learning, Nachum et al. 2017 (arXiv:1702.08892), section 5; with a reference as in Trust-PCL (arXiv:1707.01891).

        L = ½ E Σ_t C_t²,    C_t = −V(s_t) + Σ_{k<m} γ^k (r_{t+k} − β log π(a_{t+k}|s_{t+k})/π_ref(a_{t+k}|s_{t+k})) + γ^m V(s_{t+m})

    At (π*, V*) every C_t of every path is 0, so samples of any policy that reaches all tokens serve, without importance weights.
    The gradient is that of the whole residual: V at both ends of the path and log π along it (nothing is a target here).

    Args:
        values: V(s_t), (B, T).
        log_probs: log π(a_t|s_t) of the policy being trained, (B, T).
        reference_log_probs: log π_ref(a_t|s_t), (B, T); taken as constants.
        rewards: r_t without the KL term, (B, T).
        lengths: tokens of each row, (B,) int.
        beta: β, in reward per nat.
        gamma: γ, discount per token.
        n_steps: tokens a path spans; None: from each token to the end of its completion.
        truncated: True where an outer limit cut the row, (B,) bool; by default nowhere.
        end_values: V(s_T) of the state at the cut, (B,); read only where `truncated`.
        reduction: see `masking.reduce_tokens`.
        count: the sequences (or tokens) of the whole batch when this call sees a part of it.

    Returns:
        Scalar: by default the sum over the paths of a completion, one from each token, mean over completions.
    """
    check_same_shape(rewards=rewards, values=values, log_probs=log_probs, reference_log_probs=reference_log_probs)
    mask = completion_mask_from_lengths(lengths, rewards.shape[1])
    # Before the difference, so that no infinity of the padding enters a gradient.
    log_ratios = zero_outside(log_probs, mask) - zero_outside(reference_log_probs.detach(), mask)
    returns = n_step_returns(
        rewards.detach() - beta * log_ratios, values, lengths, n_steps=n_steps, gamma=gamma, truncated=truncated, end_values=end_values
    )
    residuals = returns - zero_outside(values, mask)
    return reduce_tokens(0.5 * residuals.square(), mask, reduction=reduction, count=count)
