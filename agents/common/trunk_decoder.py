"""Rows that grow by one token per model step, run by this package's own trunk on a preallocated key-value cache.

All rows write the same column at a step, whatever their lengths: a row stands with its end at that column and with padding before its
beginning. So a step writes one contiguous slice per layer, and rows that begin later, in the place of finished ones, fit in. Attention
looks at the columns in use. Where steps can be captured, `CapturedDecoder` takes the place of this one.
"""

import torch
from torch import Tensor

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.prefill import Prefilled, prefill
from textgym.agents.common.trunks import Trunk, additive
from textgym.agents.common.trunks.rows_attention import attention


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
        prompts = self._prefill(prompt_ids, prompt_lengths)
        self.logits = backbone.logits(prompts.states.index_select(0, index))
        self._next_position = prompt_lengths.index_select(0, index)
        self._positions = prompt_ids.shape[1] + max_new_tokens
        self._of_one_age = True
        self._cache = _Cache.empty(prompts, len(index), max_new_tokens)
        self._cache.put(0, prompts, index)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        with self._backbone.running():
            states = self._trunk(tokens, self._next_position, self._cache)
        self._cache.filled += 1
        self._next_position += 1
        if not self._of_one_age:
            # A row that has ended may stay until younger ones have, beyond the last position that there is.
            self._next_position.clamp_(max=self._positions - 1)
        self.logits = self._backbone.logits(states)
        return self.logits

    def select(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self._cache = self._cache.select(rows)
        self._next_position = self._next_position.index_select(0, rows)
        self.logits = self.logits.index_select(0, rows)

    def admit(self, prompt_ids: Tensor, prompt_lengths: Tensor, index: Tensor) -> None:
        """Puts fresh rows behind the present ones; arguments as in `make_decoder`."""
        prompts = self._prefill(prompt_ids, prompt_lengths)
        self._of_one_age, self._positions = False, max(self._positions, prompt_ids.shape[1] + self._max_new_tokens)
        present = len(self.logits)
        self._cache = self._cache.with_room(len(index), prompt_ids.shape[1], self._max_new_tokens)
        self._cache.put(present, prompts, index)
        self._next_position = torch.cat((self._next_position, prompt_lengths.index_select(0, index)))
        self.logits = torch.cat((self.logits, self._backbone.logits(prompts.states.index_select(0, index))))

    def _prefill(self, prompt_ids: Tensor, prompt_lengths: Tensor) -> Prefilled:
        self._trunk.prepare(prompt_ids.shape[1] + self._max_new_tokens)
        return prefill(self._backbone, self._trunk, prompt_ids, prompt_lengths)


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
        self._look()

    @classmethod
    def empty(cls, prompts: Prefilled, rows: int, max_new_tokens: int) -> "_Cache":
        """Makes room for `rows` rows of these prompts."""
        _, heads, width, size = prompts.keys[0].shape
        table = prompts.values[0].new_empty((len(prompts.keys), 2, rows, heads, width + max_new_tokens, size))
        return cls(table, torch.zeros(rows, dtype=torch.int64, device=table.device), width)

    def put(self, first: int, prompts: Prefilled, index: Tensor) -> None:
        """Writes prompts into the rows from `first` on, so that they end at the present column."""
        prompts.put(self.table[:, :, first:, :, : self.filled], index)
        self.starts = torch.cat((self.starts[:first], self.filled - prompts.lengths.index_select(0, index)))
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

    def _look(self) -> None:
        """Works out the mask; there is none while every row begins at column 0."""
        self._bias: Tensor | None = None
        if bool((self.starts > 0).any()):
            visible = torch.arange(self.table.shape[4], device=self.table.device) >= self.starts.unsqueeze(1)
            self._bias = additive(visible, self.table.dtype)[:, None, None, :]
