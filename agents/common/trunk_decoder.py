"""Rows that grow by one token per model step, run by this package's own trunk on a preallocated key-value cache.

All rows write the same column at a step, whatever their lengths: a row stands with its end at that column and with padding before its
beginning. So a step writes one contiguous slice per layer, and rows that begin later, in the place of finished ones, fit in.

Where steps can be captured (`captured_step`), all that a step reads and writes stays in place from one change of the rows to the next: the
column is a tensor, and attention looks at the whole table under a mask. Elsewhere it looks at the columns in use.
"""

import torch
from torch import Tensor

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.captured_step import CAPTURES, RepeatedStep
from textgym.agents.common.trunks import Trunk, additive
from textgym.agents.common.trunks.rows_attention import Grid, RowsAttention, attention


class TrunkDecoder:
    """A `Decoder` for the architectures that have a `Trunk`.

    Args:
        backbone: the model.
        trunk: its trunk.
        prompt_ids: (B, P) int64, left-padded, without a column that is padding in every row.
        prompt_lengths: (B,) int64.
        index: the prompt of each row, (rows,) int64.
        max_new_tokens: how many tokens may be appended to a row.

    Attributes:
        logits: of the next token, (rows, V), in the model's dtype.
    """

    def __init__(
        self, backbone: Backbone, trunk: Trunk, prompt_ids: Tensor, prompt_lengths: Tensor, index: Tensor, max_new_tokens: int
    ) -> None:
        self._backbone, self._trunk, self._max_new_tokens = backbone, trunk.for_decoding(), max_new_tokens
        states, keys, values = self._prefill(prompt_ids, prompt_lengths)
        lengths = prompt_lengths.index_select(0, index)
        self.logits = backbone.logits(states.index_select(0, index))
        self._next_position = lengths.clone()
        self._positions = prompt_ids.shape[1] + max_new_tokens
        self._of_one_age = True
        self._cache = _Cache.empty(keys, values, len(index), prompt_ids.shape[1], max_new_tokens)
        self._cache.put(0, keys, values, prompt_lengths, index)
        self._settle()

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`; where steps are captured, the logits stand where those before them stood."""
        if self._repeated is None:
            self.logits = self._run(tokens)
        else:
            self._tokens.copy_(tokens)
            self._repeated()
        self._cache.filled += 1
        return self.logits

    def _run(self, tokens: Tensor) -> Tensor:
        self._cache.begin_step()
        with self._backbone.running():
            states = self._trunk(tokens, self._next_position, self._cache)
        self._next_position += 1
        if not self._of_one_age:
            # A row that has ended may stay until younger ones have, beyond the last position that there is.
            self._next_position.clamp_(max=self._positions - 1)
        return self._backbone.logits(states)

    def _run_in_place(self) -> None:
        self.logits.copy_(self._run(self._tokens))

    def _settle(self) -> None:
        """The rows are what they will be for a while: fixes the places of what steps read and write, if steps are captured here."""
        self._repeated: RepeatedStep | None = None
        if self._cache.captured:
            self.logits = self.logits.clone()
            self._tokens = torch.zeros_like(self._next_position)
            self._repeated = RepeatedStep(self._run_in_place, self.logits.device)

    def select(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self._cache = self._cache.select(rows)
        self._next_position = self._next_position.index_select(0, rows)
        self.logits = self.logits.index_select(0, rows)
        self._settle()

    def admit(self, prompt_ids: Tensor, prompt_lengths: Tensor, index: Tensor) -> None:
        """Puts fresh rows behind the present ones; arguments as in `make_decoder`."""
        states, keys, values = self._prefill(prompt_ids, prompt_lengths)
        self._of_one_age, self._positions = False, max(self._positions, prompt_ids.shape[1] + self._max_new_tokens)
        present = len(self.logits)
        lengths = prompt_lengths.index_select(0, index)
        self._cache = self._cache.with_room(len(index), prompt_ids.shape[1], self._max_new_tokens)
        self._cache.put(present, keys, values, prompt_lengths, index)
        self._next_position = torch.cat((self._next_position, lengths))
        self.logits = torch.cat((self.logits, self._backbone.logits(states.index_select(0, index))))
        self._settle()

    def _prefill(self, prompt_ids: Tensor, prompt_lengths: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Runs prompts (B, P); returns the states at their ends, (B, H), and per layer keys and values, (B, heads, P, d), from column 0."""
        rows, width = prompt_ids.shape
        columns = torch.arange(width, device=prompt_ids.device)
        source = (columns + (width - prompt_lengths).unsqueeze(1)).clamp_(max=width - 1)
        grid = Grid.of(columns < prompt_lengths.unsqueeze(1))
        attend = _Remembering(grid)
        self._trunk.prepare(width + self._max_new_tokens)
        with self._backbone.running():
            states = self._trunk(grid.line(prompt_ids.gather(1, source)), grid.line(columns.expand(rows, -1)), attend)
        ends = grid.index(torch.arange(rows, device=prompt_ids.device), prompt_lengths - 1)
        return states.index_select(0, ends), attend.keys, attend.values


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


class _Cache:
    """Keys and values of all layers, and the attention of one new token per row to them.

    Args:
        table: (layers, 2, rows, heads, columns, d).
        starts: the column in which each row begins, (rows,) int64.
        filled: columns in use.
    """

    def __init__(self, table: Tensor, starts: Tensor, filled: int) -> None:
        self.table, self.starts, self.filled = table, starts, filled
        # Views that a step only has to cut to the columns in use.
        self._keys, self._values = ([layer[half] for layer in table] for half in (0, 1))
        self._keys_of_heads = [keys.flatten(0, 1).transpose(1, 2) for keys in self._keys]
        self._values_of_heads = [values.flatten(0, 1) for values in self._values]
        self._two_products = table.device.type == "cpu" and table.dtype in (torch.float32, torch.float64)
        self._nothing = table.new_zeros(())
        self.captured = table.device.type in CAPTURES
        if self.captured:
            # What is behind the columns in use is looked at under the mask, so it must be numbers.
            table[..., filled:, :] = 0
            self._column = torch.full((1,), filled, dtype=torch.int64, device=table.device)
        self._look()

    @classmethod
    def empty(cls, keys: list[Tensor], values: list[Tensor], rows: int, width: int, max_new_tokens: int) -> "_Cache":
        """Makes room for `rows` rows of prompts up to `width` tokens."""
        heads, size = keys[0].shape[1], keys[0].shape[3]
        table = values[0].new_empty((len(keys), 2, rows, heads, width + max_new_tokens, size))
        return cls(table, torch.zeros(rows, dtype=torch.int64, device=table.device), width)

    def put(self, first: int, keys: list[Tensor], values: list[Tensor], lengths: Tensor, index: Tensor) -> None:
        """Writes prompts, from column 0 in `keys` and `values`, into the rows from `first` on, so that they end at the present column."""
        width = keys[0].shape[2]
        columns = torch.arange(width, device=index.device)
        # What stands before a row's beginning is masked out, but it must be a number: so its first column stands there too.
        source = (columns - (width - lengths).unsqueeze(1)).clamp_(min=0)[:, None, :, None]
        as_they_are = bool((lengths == width).all())
        for layer, pair in enumerate(zip(keys, values, strict=True)):
            for half, prompts in enumerate(pair):
                shifted = prompts if as_they_are else prompts.gather(2, source.expand_as(prompts))
                target = self.table[layer, half, first:, :, : self.filled]
                target[:, :, : self.filled - width] = 0
                target[:, :, self.filled - width :] = shifted.index_select(0, index)
        self.starts = torch.cat((self.starts[:first], self.filled - lengths.index_select(0, index)))
        self._look()

    def select(self, rows: Tensor) -> "_Cache":
        """Returns these rows alone."""
        table = self.table.new_empty((*self.table.shape[:2], len(rows), *self.table.shape[3:]))
        for layer, old in zip(table, self.table, strict=True):
            for half, source in zip(layer, old, strict=True):
                half[:, :, : self.filled] = source[:, :, : self.filled].index_select(0, rows)
        return _Cache(table, self.starts.index_select(0, rows), self.filled)

    def with_room(self, rows: int, width: int, max_new_tokens: int) -> "_Cache":
        """Returns these rows with room for more of them behind, without the columns that have become padding in every row."""
        first = int(self.starts.min())
        filled = max(self.filled - first, width)
        shift = filled - self.filled
        layers, _, present, heads, _, size = self.table.shape
        table = self.table.new_empty((layers, 2, present + rows, heads, filled + max_new_tokens, size))
        table[:, :, :present, :, : first + shift] = 0
        table[:, :, :present, :, first + shift : filled] = self.table[:, :, :, :, first : self.filled]
        return _Cache(table, self.starts + shift, filled)

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention`: writes the present column and looks at all of them up to it."""
        end = self.filled + 1
        all_keys, all_values = self._keys[layer], self._values[layer]
        if self.captured:
            all_keys.index_copy_(2, self._column, keys.unsqueeze(2).to(all_keys.dtype))
            all_values.index_copy_(2, self._column, values.unsqueeze(2).to(all_values.dtype))
            if layer == len(self._keys) - 1:
                self._column += 1
            return attention(queries.unsqueeze(2), all_keys, all_values, self._bias).flatten(1)
        all_keys[:, :, self.filled] = keys
        all_values[:, :, self.filled] = values
        if not self._two_products:
            bias = None if self._bias is None else self._bias[..., :end]
            return attention(queries.unsqueeze(2), all_keys[:, :, :end], all_values[:, :, :end], bias).flatten(1)
        # On a CPU the fused kernel cuts queries into blocks, of which a single one fills almost nothing: two products are faster.
        _, heads, _, size = all_keys.shape
        rows = queries.shape[0]
        grouped = queries.reshape(rows * heads, -1, size)  # heads that share keys stand together
        shared = self._nothing if self._bias is None else self._bias[..., :end].expand(-1, heads, -1, -1).flatten(0, 1)
        beta = 0 if self._bias is None else 1
        scores = torch.baddbmm(shared, grouped, self._keys_of_heads[layer][:, :, :end], beta=beta, alpha=size**-0.5)
        return torch.bmm(scores.softmax(-1), self._values_of_heads[layer][:, :end]).view(rows, -1)

    def begin_step(self) -> None:
        """The present column becomes visible."""
        if self.captured:
            assert self._bias is not None, "there is always one where steps are captured"
            self._bias.index_fill_(3, self._column, 0)

    def _look(self) -> None:
        """Works out the mask; without capturing there is none while every row begins at column 0."""
        self._bias: Tensor | None = None
        if self.captured or bool((self.starts > 0).any()):
            columns = torch.arange(self.table.shape[4], device=self.table.device)
            visible = columns >= self.starts.unsqueeze(1)
            if self.captured:
                visible &= columns < self.filled
            self._bias = additive(visible, self.table.dtype)[:, None, None, :]
