"""Key-value caches that are allocated once and written in place, in the form transformers' models take.

transformers' own growing cache copies everything it holds at each token; these do not.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values, (B, heads, capacity, head size), filled from the left; all rows stand at the same column.

    Args:
        capacity: columns to make room for.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new columns and returns views of all columns so far."""
        if not self.is_initialized:
            self.keys, self.values = _room(key_states, self.capacity), _room(value_states, self.capacity)
            self.is_initialized = True
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        """Returns the columns filled so far."""
        return self.filled

    def select(self, rows: Tensor, capacity: int) -> None:
        """Keeps `rows` (B',) int64, repeated where they repeat, with room for `capacity` columns."""
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = _room(old, capacity, rows.shape[0])
            new[:, :, : self.filled] = old[:, :, : self.filled].index_select(0, rows)
            setattr(self, name, new)
        self.capacity = capacity


class SlotLayer(DynamicLayer):
    """One layer's keys and values where every row stands at a column of its own, which the shared `cursor` names.

    Args:
        cursor: the slots to write at the next update, shared by all layers.
        capacity: columns to make room for.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, cursor: "SlotCursor", capacity: int) -> None:
        super().__init__()
        self.cursor = cursor
        self.capacity = capacity

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes one new column per row, (B, heads, 1, head size), and returns the first `cursor.width` columns."""
        cursor = self.cursor
        self.keys[cursor.rows, :, cursor.slots] = key_states[:, :, 0]
        self.values[cursor.rows, :, cursor.slots] = value_states[:, :, 0]
        return self.keys[:, :, : cursor.width], self.values[:, :, : cursor.width]

    def load(self, rows: Tensor, keys: Tensor, values: Tensor, batch_size: int) -> None:
        """Overwrites the first columns of `rows` with prefilled ones, (B', heads, S, head size)."""
        if not self.is_initialized:
            self.keys, self.values = _room(keys, self.capacity, batch_size), _room(values, self.capacity, batch_size)
            self.is_initialized = True
        self.keys[rows, :, : keys.shape[2]] = keys
        self.values[rows, :, : values.shape[2]] = values

    def get_seq_length(self) -> int:
        """Returns the columns that the last update showed, less the one that it wrote."""
        return max(self.cursor.width - 1, 0)


class SlotCursor:
    """Where the rows of a `SlotLayer` stand.

    Attributes:
        rows: 0..B-1, (B,) int64.
        slots: the column each row writes next, (B,) int64.
        width: how many columns attention has to look at.
    """

    def __init__(self) -> None:
        self.rows = torch.empty(0, dtype=torch.int64)
        self.slots = torch.empty(0, dtype=torch.int64)
        self.width = 0


def preallocated_cache(layers: int, capacity: int) -> Cache:
    """Returns a cache of `PreallocatedLayer`s."""
    return Cache(layers=[PreallocatedLayer(capacity) for _ in range(layers)])


def slot_cache(layers: int, cursor: SlotCursor, capacity: int) -> Cache:
    """Returns a cache of `SlotLayer`s on one cursor."""
    return Cache(layers=[SlotLayer(cursor, capacity) for _ in range(layers)])


def _room(like: Tensor, capacity: int, rows: int | None = None) -> Tensor:
    """Zeros, not uninitialised memory: a NaN left in a column that is masked out would still come through as 0 * NaN."""
    batch, heads, _, size = like.shape
    return like.new_zeros((batch if rows is None else rows, heads, capacity, size))
