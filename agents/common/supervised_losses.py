"""Cross-entropy on tokens that are given, not sampled."""

from torch import Tensor

from textgym.agents.common.masking import Reduction, reduce_tokens, zero_outside


def cross_entropy_loss(
    log_probs: Tensor,
    completion_mask: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "token_mean",
    count: float | Tensor | None = None,
) -> Tensor:
    """Minus the log-likelihood of the completions.

        L = −1/n Σ_i w_i Σ_t log π(y_{i,t} | x_i, y_{i,<t})

    Args:
        log_probs: log π(y_t|s_t) in nats, (B, T).
        completion_mask: True at the completion's tokens (not prompt, not padding), (B, T) bool.
        weights: w_i, (B,); None for 1.
        reduction: see `masking.reduce_tokens`; n is the number of tokens (the default) or of sequences, whatever their weights.
        count: n of the whole batch when this call sees a part of it.

    Returns:
        Scalar: by default the mean over the True tokens, in nats per token.
    """
    if weights is not None:
        log_probs = zero_outside(log_probs, completion_mask) * weights.unsqueeze(1)
    return -reduce_tokens(log_probs, completion_mask, reduction=reduction, count=count)
