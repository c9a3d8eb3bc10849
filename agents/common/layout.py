"""Prompts and completions as the rows that a model reads."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Prompts and completions put end to end, from column 0: plain causal attention is right for them, padding comes after.

    `packing.pack` makes rows that hold several prompts with their completions; those bring positions and a mask of their own.

    Attributes:
        input_ids: (B, S) int64; 0 past the end.
        rows: row of each completion token, (N,) int64, N the number of completion tokens; row-major order.
        columns: column of `input_ids` whose features predict that token, (N,) int64.
        targets: the token, (N,) int64.
        mask: the completion tokens' places, (B, T) bool.
        lengths: the tokens of each row that are put in, prompt included, (B,) int64; None where a row is not one prompt and completion.
        prompt_lengths: (B,) int64; None where a row is not one prompt and completion.
        position_ids: (B, S) int64 where they are not the columns, else None.
        visible: (B, 1, S, S) bool, which keys each query sees, where that is not the whole past, else None.
    """

    input_ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    mask: Tensor
    lengths: Tensor | None = None
    prompt_lengths: Tensor | None = None
    position_ids: Tensor | None = None
    visible: Tensor | None = None


def lay_out(prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, lengths: Tensor) -> Rows:
    """Puts left-padded prompts (B, P) and completions (B, T) end to end. Ids outside the given lengths are never looked at."""
    width, steps = prompt_ids.shape[1], completion_ids.shape[1]
    device = prompt_ids.device
    mask = torch.arange(steps, device=device) < lengths.unsqueeze(1)
    # The last token of a completion predicts nothing that is scored, so it is no input.
    inputs = prompt_lengths + (lengths - 1).clamp(min=0)
    columns = torch.arange(int(inputs.max()), device=device)
    source = (columns + (width - prompt_lengths).unsqueeze(1)).clamp_(max=width + steps - 1)
    ids = torch.cat((prompt_ids, completion_ids), 1).gather(1, source)
    rows, offsets = mask.nonzero(as_tuple=True)
    return Rows(
        input_ids=ids.masked_fill(columns >= inputs.unsqueeze(1), 0),
        rows=rows,
        columns=prompt_lengths[rows] - 1 + offsets,
        targets=completion_ids[rows, offsets],
        mask=mask,
        lengths=inputs,
        prompt_lengths=prompt_lengths,
    )
