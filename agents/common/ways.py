"""Which ways of running a model agree with plain passes over single rows: what a trial finds, and everything that runs a model asks."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from textgym.agents.common.positions import Turn

Batching = Literal["together", "by length", "alone"]
Decoding = Literal["ready-made masks", "padding", "by length", "no cache"]


@dataclass(frozen=True)
class Ways:
    """How a model may be run by transformers' forward.

    Attributes:
        batching: which rows may be run in one call: any, with padding behind the shorter ones; those of one length; or none.
        decoding: how rows grow token by token: left-padded with a preallocated cache and masks of this package; left-padded with
            transformers' cache and masks; those of one length at a time with transformers' cache; or without a cache.
        dense_mask: attention masks can be handed over ready-made, (B, 1, queries, keys), with positions of our own.
        max_positions: the longest sequence that a table of positions allows; None where there is no table.
    """

    batching: Batching = "together"
    decoding: Decoding = "ready-made masks"
    dense_mask: bool = True
    max_positions: int | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """Rows that are run in one call, and what is wanted of them.

    Attributes:
        members: the rows, (R,) int64.
        width: how many of their tokens are run.
        rows: among `members`, of each state that is wanted, (M',) int64.
        columns: of each state, (M',) int64.
        places: which of all M states they are, (M',) int64.
    """

    members: Tensor
    width: int
    rows: Tensor
    columns: Tensor
    places: Tensor


def plan_calls(lengths: Tensor, rows: Tensor, columns: Tensor, batching: Batching, turn: Turn | None) -> list[Call]:
    """Divides rows into calls such that every state is read as if its row, up to it, were alone.

    Args:
        lengths: tokens of each row, (B,) int64.
        rows: of each state that is wanted, (M,) int64.
        columns: where it stands in its row, (M,) int64.
        batching: which rows may be run together.
        turn: at which length the model's rotary frequencies change.
    """
    reach = lengths[rows]
    if turn is not None and int(lengths.max()) > turn.length:
        reach = turn.reach(columns + 1, reach)
        batching = "by length" if batching == "together" else batching
    if batching == "together":
        everything = torch.arange(len(lengths), device=lengths.device)
        return [Call(everything, int(lengths.max()), rows, columns, torch.arange(len(rows), device=rows.device))]
    kinds = reach if batching == "by length" else reach * len(lengths) + rows
    calls = []
    for kind in kinds.unique().tolist():
        places = (kinds == kind).nonzero().squeeze(1)
        members, index = rows[places].unique(return_inverse=True)
        calls.append(Call(members, int(reach[places[0]]), index, columns[places], places))
    return calls
