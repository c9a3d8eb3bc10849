"""Attention over whole rows of tokens at once, for scoring, and the grids in which it happens.

A trunk's tokens are one flat line. Attention needs rows; `Grid` is the way there and back, and it alone knows of padding: where much of a
grid would be padding, the line holds the real tokens only, so that matrix products spend nothing on the rest.
"""

from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

PADDING_WORTH_REMOVING = 0.15  # of a grid; below, two gathers a layer cost more than the padding


class Grid:
    """R rows of S cells, and which of them are tokens.

    Attributes:
        rows: R.
        width: S.
        places: the cell of each token, (N,) int64, row-major; None where every cell is in the line.
        cells: the token in each cell, (R * S,) int64; any token where there is none.
    """

    def __init__(self, rows: int, width: int, places: Tensor | None = None) -> None:
        self.rows, self.width, self.places = rows, width, places
        self.cells: Tensor | None = None
        if places is not None:
            self.cells = places.new_zeros(rows * width).index_copy_(0, places, torch.arange(len(places), device=places.device))

    @classmethod
    def of(cls, valid: Tensor) -> Self:
        """Returns the grid of (R, S) bool, True = token; without much padding, all of its cells are in the line."""
        rows, width = valid.shape
        places = valid.flatten().nonzero().squeeze(1)
        return cls(rows, width, places if len(places) < (1 - PADDING_WORTH_REMOVING) * valid.numel() else None)

    @property
    def size(self) -> int:
        """The tokens in the line."""
        return self.rows * self.width if self.places is None else len(self.places)

    def line(self, table: Tensor) -> Tensor:
        """(R, S) to (N,)."""
        cells = table.flatten()
        return cells if self.places is None else cells.index_select(0, self.places)

    def index(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns where in the line the tokens of these cells stand, int64."""
        cells = rows * self.width + columns
        return cells if self.cells is None else self.cells.index_select(0, cells)

    def spread(self, tokens: Tensor) -> Tensor:
        """(N, heads, d) to (R, heads, S, d)."""
        if self.cells is not None:
            tokens = tokens.index_select(0, self.cells)
        return tokens.view(self.rows, self.width, *tokens.shape[1:]).transpose(1, 2)

    def gather(self, seen: Tensor) -> Tensor:
        """(R, heads, S, d) to (N, heads * d)."""
        cells = seen.transpose(1, 2).flatten(0, 1).flatten(1)
        return cells if self.places is None else cells.index_select(0, self.places)


class RowsAttention:
    """Every row for itself.

    Args:
        grid: the rows; tokens from column 0 on.
        bias: what is added to the attention scores, (R or 1, 1, S, S); None for plain causal attention.
    """

    def __init__(self, grid: Grid, bias: Tensor | None = None) -> None:
        self.grid, self.bias = grid, bias

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention`."""
        spread = self.grid.spread
        return self.grid.gather(attention(spread(queries), spread(keys), spread(values), self.bias, causal=self.bias is None))


class BranchesAttention:
    """Prompts, and behind each of them several completions that do not see each other.

    The line holds the prompts' tokens first, then the completions'.

    Args:
        prompts: G rows, tokens from column 0 on.
        branches: B rows, tokens from column 0 on.
        parents: the prompt of each branch, (B,) int64.
        bias: what is added to the scores of branches' queries, (B, 1, T, S + T): over the prompt's cells, then the branch's own.
    """

    def __init__(self, prompts: Grid, branches: Grid, parents: Tensor, bias: Tensor) -> None:
        self.prompts, self.branches, self.parents, self.bias = prompts, branches, parents, bias

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention`."""
        sizes = (self.prompts.size, self.branches.size)
        (first, own), (first_keys, own_keys), (first_values, own_values) = (tensor.split(sizes) for tensor in (queries, keys, values))
        prompt_keys, prompt_values = self.prompts.spread(first_keys), self.prompts.spread(first_values)
        seen = attention(self.prompts.spread(first), prompt_keys, prompt_values, None, causal=True)
        all_keys = torch.cat((prompt_keys.index_select(0, self.parents), self.branches.spread(own_keys)), 2)
        all_values = torch.cat((prompt_values.index_select(0, self.parents), self.branches.spread(own_values)), 2)
        branched = attention(self.branches.spread(own), all_keys, all_values, self.bias)
        return torch.cat((self.prompts.gather(seen), self.branches.gather(branched)))


def attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, (R, heads, queries, d), over as many or fewer key-value heads."""
    grouped = queries.shape[1] != keys.shape[1]
    if not queries.dtype == keys.dtype == values.dtype:  # autocast: products are in half precision, and turning by positions is not
        queries, keys = queries.to(values.dtype), keys.to(values.dtype)
    if bias is not None and bias.dtype != values.dtype:
        bias = bias.to(values.dtype)
    return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, is_causal=causal, enable_gqa=grouped)
