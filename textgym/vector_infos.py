"""Infos of vector environments: one dictionary of arrays with `_key` masks, and one plain dictionary per row."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from textgym.types import BoolArray, Info

_NOTHING: Final = object()


def row_info(infos: Mapping[str, Any], row: int) -> Info:
    """Returns the info of one row of a vector environment, as its single environment would have given it.

    Numbers become Python numbers, arrays are copied. A key without a `_key` mask counts as present in every row, if it has rows.
    """
    return row_infos(infos, [row])[0]


def row_infos(infos: Mapping[str, Any], rows: Sequence[int]) -> list[Info]:
    """Returns the infos of `rows`, K of them, each as `row_info` has it: every key is looked at once for all of them."""
    result: list[Info] = [{} for _ in rows]
    if not result:  # the usual case: no row has finished
        return result
    for key, value in infos.items():
        if _is_mask(infos, key):
            continue
        places = range(len(rows))
        if (present := infos.get(f"_{key}")) is not None:
            marked = np.asarray(present).tolist()
            places = [place for place in places if marked[rows[place]]]  # type: ignore[assignment]
        for place, part in zip(places, _values_of(value, [rows[place] for place in places]), strict=True):
            if part is not _NOTHING:
                result[place][key] = part
    return result


def put(infos: Info, key: str, values: npt.NDArray[Any], rows: BoolArray) -> None:
    """Sets `infos[key]` of `rows` to `values` (one per row of the environment), zero and masked elsewhere; nothing when no row is set."""
    if rows.any():
        infos[key] = np.where(rows, values, np.zeros((), dtype=values.dtype))
        infos[f"_{key}"] = rows.copy()


def batched_infos(rows: Sequence[Mapping[str, Any]]) -> Info:
    """Returns the infos of all rows as a vector environment's.

    Numbers of one type become an array of them, dicts are nested, all else (and `final_obs`, as in Gymnasium) is an array of objects;
    `_key` says which rows have a key.
    """
    result: Info = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        present = np.array([key in row for row in rows])
        values = [row.get(key) for row in rows]
        if key != "final_obs" and all(isinstance(value, dict) for value, there in zip(values, present, strict=True) if there):
            result[key] = batched_infos([row.get(key, {}) for row in rows])
        else:
            result[key] = _column(values, present)
        result[f"_{key}"] = present
    return result


def _column(values: list[Any], present: BoolArray) -> npt.NDArray[Any]:
    """One key of all rows as an array."""
    types = {type(value) for value, there in zip(values, present, strict=True) if there}
    if len(types) == 1 and types <= {int, float, bool}:
        kind = types.pop()
        return np.array([value if there else kind() for value, there in zip(values, present, strict=True)], dtype=kind)
    column = np.full(len(values), None, dtype=object)
    for i, value in enumerate(values):
        column[i] = value
    return column


def _is_mask(infos: Mapping[str, Any], key: str) -> bool:
    """Is `key` the mask of another key?"""
    value = infos[key]
    return key.startswith("_") and key[1:] in infos and isinstance(value, np.ndarray) and value.dtype == np.bool_


def _values_of(value: Any, rows: Sequence[int]) -> Sequence[Any]:
    """What one key holds for each of `rows`, without ties to the batch; `_NOTHING` for a row beyond the end of an array."""
    if isinstance(value, Mapping):
        return row_infos(value, rows)
    if not isinstance(value, np.ndarray | list | tuple):
        return [value] * len(rows)
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype != object and len(value) > max(rows, default=-1):
        return value[list(rows)].tolist()  # type: ignore[no-any-return]
    beyond = _NOTHING if isinstance(value, np.ndarray) else value
    return [_plain(value[row]) if row < len(value) else beyond for row in rows]


def _plain(value: Any) -> Any:
    """A row's value without ties to the batch."""
    if isinstance(value, np.generic):
        return value.item()
    return value.copy() if isinstance(value, np.ndarray) else value
