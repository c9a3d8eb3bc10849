"""Infos of a vector environment, built column by column: equal to what Gymnasium's `VectorEnv._add_info` makes row by row, but fast."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from textgym.envs.core import Outcome
from textgym.types import Info, IntArray


class InfoBuilder:
    """Collects the info dictionary of one call.

    Args:
        num_envs: N.

    Attributes:
        infos: every key holds an (N,) array, or a dict of such, and `_key` the (N,) bool mask of the rows that have it.
    """

    def __init__(self, num_envs: int) -> None:
        self._num_envs = num_envs
        self.infos: Info = {}

    def add_numbers(self, key: str, rows: IntArray, values: npt.NDArray[Any]) -> None:
        """Adds a number per row, (K,), of the type of `values`."""
        array = self.infos.get(key)
        if array is None:
            array = self.infos[key] = np.zeros(self._num_envs, dtype=values.dtype)
        array[rows] = values
        self._mark(key, rows)

    def add_objects(self, key: str, rows: IntArray, values: Sequence[Any]) -> None:
        """Adds an object per row, K of them."""
        array = self.infos.get(key)
        if array is None:
            array = self.infos[key] = np.full(self._num_envs, None, dtype=object)
        for row, value in zip(rows.tolist(), values, strict=True):
            array[row] = value
        self._mark(key, rows)

    def add_named_numbers(self, key: str, rows: IntArray, parts: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Adds a dict of numbers per row; a row lacks the names that are NaN in it."""
        inner = InfoBuilder(self._num_envs)
        inner.infos = self.infos.get(key, {})
        for name, values in parts.items():
            real = ~np.isnan(values)
            if real.any():
                inner.add_numbers(name, rows[real], values[real])
        self.infos[key] = inner.infos
        self._mark(key, rows)

    def add_outcome(self, rows: IntArray, outcome: Outcome) -> None:
        """Adds the final infos of the episodes of `rows`."""
        for key, values in outcome.texts().items():
            self.add_objects(key, rows, values)
        self.add_named_numbers("rewards", rows, outcome.parts)

    def nest(self, key: str, rows: IntArray, infos: Info) -> None:
        """Adds the infos of another builder as the dict `key`, which `rows` have."""
        self.infos[key] = infos
        self._mark(key, rows)

    def _mark(self, key: str, rows: IntArray) -> None:
        mask = self.infos.get(f"_{key}")
        if mask is None:
            mask = self.infos[f"_{key}"] = np.zeros(self._num_envs, dtype=np.bool_)
        mask[rows] = True
