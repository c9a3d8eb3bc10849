"""Running prompts, once each, before rows grow from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.trunks import Trunk
from textgym.agents.common.trunks.rows_attention import Grid, RowsAttention, attention


@dataclass(frozen=True, eq=False)
class Prefilled:
    """What is known of prompts that have been run.

    Attributes:
        states: at their ends, (B, H).
        keys: of each layer, (B, heads, P, d), a prompt's first token in column 0.
        values: the same.
        lengths: (B,) int64.
    """

    states: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor

    def put(self, table: Tensor, index: Tensor) -> None:
        """Writes keys and values into a table, (layers, 2, rows, heads, columns >= P, d), so that all rows end with the last column.

        Args:
            table: is overwritten.
            index: the prompt of each row, (rows,) int64.
        """
        width, filled = self.keys[0].shape[2], table.shape[4]
        columns = torch.arange(width, device=index.device)
        # What stands before a row's beginning is masked out, but it must be a number: so its first column stands there too.
        source = (columns - (width - self.lengths).unsqueeze(1)).clamp_(min=0)[:, None, :, None]
        as_they_are = bool((self.lengths == width).all())
        for layer, pair in zip(table, zip(self.keys, self.values, strict=True), strict=True):
            for target, prompts in zip(layer, pair, strict=True):
                shifted = prompts if as_they_are else prompts.gather(2, source.expand_as(prompts))
                target[:, :, : filled - width] = 0
                target[:, :, filled - width :] = shifted.index_select(0, index)


def prefill(backbone: Backbone, trunk: Trunk, prompt_ids: Tensor, prompt_lengths: Tensor) -> Prefilled:
    """Runs prompts.

    Args:
        backbone: the model.
        trunk: its trunk, prepared for P positions.
        prompt_ids: (B, P) int64, left-padded.
        prompt_lengths: (B,) int64.
    """
    rows, width = prompt_ids.shape
    columns = torch.arange(width, device=prompt_ids.device)
    source = (columns + (width - prompt_lengths).unsqueeze(1)).clamp_(max=width - 1)
    grid = Grid.of(columns < prompt_lengths.unsqueeze(1))
    attend = _Remembering(grid)
    with backbone.running():
        states = trunk(grid.line(prompt_ids.gather(1, source)), grid.line(columns.expand(rows, -1)), attend)
    ends = grid.index(torch.arange(rows, device=prompt_ids.device), prompt_lengths - 1)
    return Prefilled(states.index_select(0, ends), attend.keys, attend.values, prompt_lengths)


class _Remembering(RowsAttention):
    """Causal attention that keeps every layer's keys and values."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention`."""
        spread = self.grid.spread
        self.keys.append(spread(keys))
        self.values.append(spread(values))
        return self.grid.gather(attention(spread(queries), self.keys[-1], self.values[-1], None, causal=True))
