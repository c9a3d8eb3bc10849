"""From the rows that are to be scored to the line of tokens that a trunk runs, each prompt once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from textgym.agents.common.layout import Rows
from textgym.agents.common.trunks.base import Attention, Trunk
from textgym.agents.common.trunks.rows_attention import BranchesAttention, Grid, RowsAttention


@dataclass(frozen=True, eq=False)
class Plan:
    """What a trunk is called with.

    Attributes:
        ids: (N,) int64.
        positions: (N,) int64.
        attend: who sees whom.
        predictors: which of the N tokens predicts each completion token, (M,) int64.
    """

    ids: Tensor
    positions: Tensor
    attend: Attention
    predictors: Tensor


def run_trunk(trunk: Trunk, layout: Rows) -> Tensor:
    """Returns the last hidden states at the positions that predict completion tokens, (M, H)."""
    plan = make_plan(layout, trunk.dtype)
    trunk.prepare(layout.input_ids.shape[1])  # no position is beyond its row's width
    return trunk(plan.ids, plan.positions, plan.attend).index_select(0, plan.predictors)


def make_plan(layout: Rows, dtype: torch.dtype) -> Plan:
    """Returns the plan for rows; prompts that several of them have are run once.

    Args:
        layout: from `lay_out` or `pack`.
        dtype: of the model.
    """
    if layout.visible is not None:
        return _packed(layout, dtype)
    parents = None if layout.prompt_lengths is None else _shared_prompts(layout.input_ids, layout.prompt_lengths)
    if parents is None or bool((layout.mask.sum(1) < 2).all()):
        return _plain(layout)
    return _branched(layout, parents, dtype)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns a boolean mask, True = visible, into what is added to attention scores; a boolean one would be turned in every layer."""
    return torch.where(visible, torch.zeros((), dtype=dtype, device=visible.device), torch.finfo(dtype).min)


def _packed(layout: Rows, dtype: torch.dtype) -> Plan:
    assert layout.visible is not None and layout.position_ids is not None, "packing gives both"
    grid = Grid(*layout.input_ids.shape)
    return Plan(
        ids=layout.input_ids.flatten(),
        positions=layout.position_ids.flatten(),
        attend=RowsAttention(grid, additive(layout.visible, dtype)),
        predictors=grid.index(layout.rows, layout.columns),
    )


def _plain(layout: Rows) -> Plan:
    rows, width = layout.input_ids.shape
    columns = torch.arange(width, device=layout.input_ids.device).expand(rows, width)
    grid = Grid(rows, width) if layout.lengths is None else Grid.of(columns < layout.lengths.unsqueeze(1))
    return Plan(
        ids=grid.line(layout.input_ids),
        positions=grid.line(columns),
        attend=RowsAttention(grid),
        predictors=grid.index(layout.rows, layout.columns),
    )


def _branched(layout: Rows, parents: "_Parents", dtype: torch.dtype) -> Plan:
    assert layout.prompt_lengths is not None and layout.lengths is not None, "known where prompts are"
    device = layout.input_ids.device
    prompt_lengths, own = layout.prompt_lengths, layout.lengths - layout.prompt_lengths  # (B,), (B,)
    first = prompt_lengths[parents.representatives]
    width, steps = int(first.max()), int(own.max())
    prompt_columns, columns = torch.arange(width, device=device), torch.arange(steps, device=device)
    prompts = Grid.of(prompt_columns < first.unsqueeze(1))
    valid = columns < own.unsqueeze(1)  # (B, T)
    branches = Grid.of(valid)
    places = prompt_lengths.unsqueeze(1) + columns
    tokens = layout.input_ids.gather(1, places.clamp(max=layout.input_ids.shape[1] - 1))
    past = torch.ones((steps, steps), dtype=torch.bool, device=device).tril()
    sees_prompt = (prompt_columns < prompt_lengths.unsqueeze(1))[:, None, None, :].expand(-1, 1, steps, -1)
    visible = torch.cat((sees_prompt, past.expand(len(own), 1, -1, -1)), -1)
    behind = layout.columns - prompt_lengths[layout.rows]  # -1: the prompt's last token predicts it
    from_prompt = prompts.index(parents.index[layout.rows], prompt_lengths[layout.rows] - 1)
    from_branch = prompts.size + branches.index(layout.rows, behind.clamp(min=0))
    return Plan(
        ids=torch.cat((prompts.line(layout.input_ids[parents.representatives, :width]), branches.line(tokens))),
        positions=torch.cat((prompts.line(prompt_columns.expand(len(first), -1)), branches.line(places))),
        attend=BranchesAttention(prompts, branches, parents.index, additive(visible, dtype)),
        predictors=torch.where(behind < 0, from_prompt, from_branch),
    )


@dataclass(frozen=True, eq=False)
class _Parents:
    """The different prompts of rows: where each stands for the first time, (G,) int64, and which one each row has, (B,) int64."""

    representatives: Tensor
    index: Tensor


def _shared_prompts(input_ids: Tensor, prompt_lengths: Tensor) -> _Parents | None:
    """Finds the prompts that several rows have; None where sharing them saves less than a twentieth of the tokens."""
    ids, lengths = input_ids.cpu().numpy(), prompt_lengths.tolist()
    seen: dict[bytes, int] = {}
    representatives: list[int] = []
    index = []
    for row, length in enumerate(lengths):
        place = seen.setdefault(ids[row, :length].tobytes(), len(seen))
        if place == len(representatives):
            representatives.append(row)
        index.append(place)
    saved = sum(lengths) - sum(lengths[row] for row in representatives)
    if 20 * saved < ids.size or len(representatives) == len(lengths):
        return None
    device = input_ids.device
    return _Parents(torch.tensor(representatives, device=device), torch.tensor(index, device=device))
