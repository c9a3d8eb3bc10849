"""Sums, means and whitening over the tokens that count.

Masks come from lengths, never from comparing ids with a pad id. Whatever stands in the masked-out places (NaN and infinities
included) reaches neither a value nor a gradient.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Reduction: TypeAlias = Literal["sequence_sum", "token_mean", "sequence_mean"]


def completion_mask_from_lengths(lengths: Tensor, max_length: int) -> Tensor:
    """Returns the (B, `max_length`) bool mask that is True at the first `lengths[i]` tokens of row i."""
    return torch.arange(max_length, device=lengths.device) < lengths.unsqueeze(-1)


def check_same_shape(**tensors: Tensor | None) -> None:
    """Raises a `ValueError` that names the first tensor whose shape differs from the first one given; `None`s are skipped."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = given[0]
    for name, tensor in given[1:]:
        if tensor.shape != first.shape:
            raise ValueError(f"`{name}` must have the shape of `{first_name}`, {tuple(first.shape)}, got {tuple(tensor.shape)}.")


def check_one_per_row(table: Tensor, **vectors: Tensor) -> None:
    """Raises a `ValueError` that names the first vector that does not have one entry per row of the (B, T) `table`."""
    for name, vector in vectors.items():
        if vector.shape != table.shape[:1]:
            raise ValueError(f"`{name}` must have one entry per completion, {tuple(table.shape[:1])}, got shape {tuple(vector.shape)}.")


def as_groups(name: str, values: Tensor, num_generations: int) -> Tensor:
    """Returns the (B, ...) `values` as (P, G, ...), the G completions of a prompt, which are neighbours, in one row.

    Raises:
        ValueError: `num_generations` is below 2, or does not divide the rows of `values`, which the message calls `name`.
    """
    if num_generations < 2:
        raise ValueError(
            f"`num_generations` must be at least 2: the completions of a prompt are compared with each other, got {num_generations}."
        )
    if values.shape[0] % num_generations:
        raise ValueError(
            f"`{name}` must have a multiple of `num_generations` = {num_generations} rows (the completions of a prompt next to "
            f"each other), got {values.shape[0]}."
        )
    return values.view(-1, num_generations, *values.shape[1:])  # (B, ...) -> (P, G, ...)


def zero_outside(values: Tensor, mask: Tensor) -> Tensor:
    """Returns `values` with zeros where `mask` is False; no gradient passes there."""
    # Not a product with the mask: 0 * inf is NaN.
    return torch.where(mask, values, torch.zeros_like(values))


def masked_sum(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Returns the sum of `values` where `mask` is True, over all elements or over `dim`."""
    check_same_shape(values=values, mask=mask)
    kept = zero_outside(values, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Returns the mean of `values` where `mask` is True, over all elements or over `dim`; 0 where nothing is True."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scales the True values to variance 1, and to mean 0 unless the mean is kept.

        w = (x - mean) * rsqrt(var + eps) [+ mean]

    with the population variance (divided by the count, not by the count less one), as in Huang et al. 2024
    (arXiv:2403.17031, detail "whitening"). Mean and variance are taken over the True tokens only.

    Args:
        values: x, any shape.
        mask: True where the value counts, the shape of `values`.
        shift_mean: whether the mean is removed (advantages) or put back (rewards).
        eps: added to the variance, so values that are all equal give zeros.

    Returns:
        The whitened values, zero where `mask` is False.
    """
    check_same_shape(values=values, mask=mask)
    values = zero_outside(values, mask)
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    whitened = (values - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return zero_outside(whitened, mask)


def reduce_tokens(values: Tensor, completion_mask: Tensor, *, reduction: Reduction, count: float | Tensor | None = None) -> Tensor:
    """Reduces a (B, T) table of per-token terms to a scalar. In text RL the choice is part of the algorithm.

    ===============  ==================================================================================================
    `sequence_sum`   sum over the tokens of each sequence, mean over sequences. The only one under which a policy-gradient
                     term is an estimate of ∇J when lengths vary, because log π(y|x) is a *sum* over tokens.
    `token_mean`     mean over all True tokens of the batch: `sequence_sum` divided by the mean length, which is another
                     factor in every batch.
    `sequence_mean`  mean over the tokens of each sequence, mean over sequences: a token of a long completion weighs less.
    ===============  ==================================================================================================

    Args:
        values: per-token terms, (B, T).
        completion_mask: True where the policy chose the token, (B, T) bool.
        reduction: one of the three above.
        count: what the sum is divided by: the sequences (`sequence_sum`, `sequence_mean`) or the tokens (`token_mean`) of the
            whole batch. Needed when the call sees one micro-batch of it, whose losses then add up to that of the whole;
            by default those of `completion_mask` itself.

    Returns:
        Scalar.
    """
    check_same_shape(values=values, completion_mask=completion_mask)
    if values.dim() != 2:
        raise ValueError(f"`values` must be a (B, T) table of sequences and their tokens, got shape {tuple(values.shape)}.")
    if reduction == "token_mean":
        return masked_sum(values, completion_mask) / (completion_mask.sum().clamp(min=1) if count is None else count)
    sequences = values.shape[0] if count is None else count
    if reduction == "sequence_sum":
        return masked_sum(values, completion_mask) / sequences
    if reduction == "sequence_mean":
        return masked_mean(values, completion_mask, dim=1).sum() / sequences
    raise ValueError(f"`reduction` must be 'sequence_sum', 'token_mean' or 'sequence_mean', got {reduction!r}.")
