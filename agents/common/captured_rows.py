"""Rows of a decode loop in buffers that stay where they are, and the steps that were captured on them."""

from functools import partial

import torch
from torch import Tensor

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.buckets import bucket
from textgym.agents.common.captured_step import RepeatedStep, Step, same_numbers
from textgym.agents.common.prefill import Prefilled
from textgym.agents.common.trunks import Trunk, additive
from textgym.agents.common.trunks.rows_attention import attention


class CapturedRows:
    """All that a captured step reads and writes, besides the model's parameters.

    A step takes the first rows of the buffers, as many as the bucket has that the rows in use fit into: there is one captured step for
    each such number, and when rows leave, the others move up in the same buffers. The rows that fill a bucket up run along: each sees the
    present column at least, so they stay finite, and nobody reads them. The column is a tensor, and attention looks at the whole table
    under a mask.

    Args:
        trunk: prepared for as many positions as the model has or as there are columns.
        prompts: of the model; how many layers, heads and dimensions it has is read from them.
        logits: of the model, (..., V); the same.
        rows: R, how many there is room for.
        columns: C, prompts and completions.
        last_position: rows that have ended stay at this one.

    Attributes:
        rows: R.
        columns: C.
        count: rows in use, the first ones.
        filled: columns in use.
    """

    def __init__(self, trunk: Trunk, prompts: Prefilled, logits: Tensor, rows: int, columns: int, last_position: int) -> None:
        self.rows, self.columns, self.count, self.filled = rows, columns, 0, 0
        self._last_position = last_position
        self._steps: dict[int, RepeatedStep] = {}
        _, heads, _, size = prompts.keys[0].shape
        # A later call that uses them may not be in inference mode.
        with torch.inference_mode(False), torch.no_grad(), torch.device(logits.device):
            self._trunk = trunk.with_own_tables(columns)
            self._table = torch.zeros((len(prompts.keys), 2, rows, heads, columns, size), dtype=prompts.values[0].dtype)
            self._bias = torch.zeros((rows, 1, 1, columns), dtype=self._table.dtype)
            self._logits = torch.zeros((rows, logits.shape[-1]), dtype=logits.dtype)
            self._starts, self._tokens, self._positions = (torch.zeros(rows, dtype=torch.int64) for _ in range(3))
            self._column = torch.zeros(1, dtype=torch.int64)

    @property
    def logits(self) -> Tensor:
        """Of the next token of the rows in use, (count, V); each step writes them anew."""
        return self._logits[: self.count]

    @property
    def num_bytes(self) -> int:
        """The memory that the buffers take."""
        return sum(buffer.nbytes for buffer in (self._table, self._bias, self._logits))

    def size_for(self, count: int) -> int:
        """Returns how many rows a step runs of which `count` are in use."""
        return min(bucket(count, 2), self.rows)

    def clear(self, filled: int) -> None:
        """Begins anew without rows, behind the column `filled`."""
        # What was there before may not be finite, and a mask does not help against that.
        for buffer in (self._table, self._tokens, self._positions):
            buffer.zero_()
        self.count = 0
        self._starts.fill_(filled)
        self._go_to(filled)

    def add(self, prompts: Prefilled, logits: Tensor, index: Tensor) -> None:
        """Puts rows behind those in use.

        Args:
            prompts: what they begin with.
            logits: of the next token of each row, (rows, V).
            index: the prompt of each row, (rows,) int64.
        """
        new = slice(self.count, self.count + len(index))
        self.count = new.stop
        lengths = prompts.lengths.index_select(0, index)
        prompts.put(self._table[:, :, new, :, : self.filled], index)
        self._starts[new] = self.filled - lengths
        self._positions[new] = lengths
        self._logits[new] = logits
        self._look()

    def keep(self, rows: Tensor) -> None:
        """Goes on with `rows` only, (rows',) int64 indices into those in use."""
        self.count = len(rows)
        for layer in self._table:
            for half in layer:
                half[: self.count, :, : self.filled] = half[:, :, : self.filled].index_select(0, rows)
        for line in (self._starts, self._positions, self._logits):
            line[: self.count] = line.index_select(0, rows)
        self._look()

    def take_over(self, other: "CapturedRows", first: int, filled: int) -> None:
        """Takes the rows of another, or of this one, without the columns before `first`, so that the present column is `filled`."""
        count, shift = other.count, filled - other.filled
        for target, source in zip(self._table.flatten(0, 1), other._table.flatten(0, 1), strict=True):
            target[:count, :, first + shift : filled] = source[:count, :, first : other.filled].clone()
        self._starts[:count] = other._starts[:count] + shift
        self._positions[:count] = other._positions[:count]
        self._logits[:count] = other._logits[:count]
        self.count = count
        self._go_to(filled)

    def first_column(self) -> int:
        """Returns the first column that is no padding in some row."""
        return int(self._starts[: self.count].min())

    def step(self, backbone: Backbone, tokens: Tensor) -> None:
        """Appends `tokens`, (count,) int64, to the rows in use."""
        self._tokens[: self.count] = tokens
        size = self.size_for(self.count)
        step = partial(self._run, backbone, size)
        if backbone.kept_rows.failed:
            step()
        else:
            repeated = self._steps.setdefault(size, RepeatedStep(tokens.device))
            repeated(step, partial(self._agree, size))
            backbone.kept_rows.failed = repeated.failed
        self.filled += 1

    def _agree(self, size: int, replay: Step, step: Step) -> bool:
        """Takes a step both ways from where the rows stand; see `RepeatedStep`."""
        column = self.filled
        read = (self._positions, self._column, self._bias[..., column])
        written = (self._logits[:size], self._table[:, :, :size, :, column], self._positions, self._column)
        before = [tensor.clone() for tensor in read]
        step()
        expected = [tensor.clone() for tensor in written]
        # The replay must write all of it anew: what the step has left would hide that it does not.
        for tensor in written:
            tensor.zero_()
        for tensor, value in zip(read, before, strict=True):
            tensor.copy_(value)
        replay()
        return all(same_numbers(tensor, value) for tensor, value in zip(written, expected, strict=True))

    def _run(self, backbone: Backbone, size: int) -> None:
        """What is captured: nothing of the host's may change from one step to the next."""
        positions = self._positions[:size]
        self._bias[:size].index_fill_(3, self._column, 0)
        with backbone.running():
            states = self._trunk(self._tokens[:size], positions, partial(self._attend, size))
        self._logits[:size] = backbone.logits(states)
        # A row that has ended may stay until younger ones have, beyond the last position that there is.
        positions.add_(1).clamp_(max=self._last_position)
        self._column += 1

    def _attend(self, size: int, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention`: writes the present column and looks at all of the table."""
        all_keys, all_values = self._table[layer, :, :size]
        all_keys.index_copy_(2, self._column, keys.unsqueeze(2).to(all_keys.dtype))
        all_values.index_copy_(2, self._column, values.unsqueeze(2).to(all_values.dtype))
        return attention(queries.unsqueeze(2), all_keys, all_values, self._bias[:size]).flatten(1)

    def _go_to(self, filled: int) -> None:
        self.filled = filled
        self._column.fill_(filled)
        self._look()

    def _look(self) -> None:
        """Works out the mask."""
        columns = torch.arange(self.columns, device=self._bias.device)
        visible = (columns >= self._starts.unsqueeze(1)) & (columns < self.filled)
        self._bias[:, 0, 0] = additive(visible, self._bias.dtype)
