"""The columns of a row, one by one: whether they are there, and the number, verdict, text or list that one holds, checked.

`where` is what error messages call the row; every one says which column, the rule and the cure.
"""

import math
import numbers
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from textgym.feedback.records import Text
from textgym.prompts import Messages, check_prompt

Row: TypeAlias = Mapping[str, Any]

_SHOWN = 80
_NAMED_CLASSES = (
    "Where labels are names of classes, pass `positive=` with the one that is good to `textgym.feedback.read_feedback`, whose records "
    "every learner takes."
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?")


def has_columns(row: Row, *columns: str) -> bool:
    """Returns whether `row` has all of `columns`; None counts as absent, as in a data set whose rows have different forms."""
    return all(row.get(column) is not None for column in columns)


def wrong_columns(row: Row, where: str, wanted: str) -> ValueError:
    """Returns the error of a row that lacks columns, or a value in one of them."""
    empty = [f"`{name}`" for name, value in row.items() if value is None and re.search(rf"\b{re.escape(str(name))}\b", wanted)]
    if empty:
        return ValueError(
            f"{where} must have a value in each of the columns {wanted}, but {' and '.join(empty)} holds none (null); "
            "give it one, or leave the row out."
        )
    return ValueError(f"{where} must have the columns {wanted}, got {list(row)}; rename those that hold them.")


def number_of(row: Row, column: str, default: float, where: str, low: float, high: float) -> float:
    """Returns the finite number from `low` to `high` in `column`, or `default` where there is none."""
    value = row.get(column)
    if value is None:
        return default
    number = finite_number(number_in(value))
    if number is None or not low <= number <= high:
        bounds = "" if low == -math.inf else f" of at least {low:g}" if high == math.inf else f" from {low:g} to {high:g}"
        raise ValueError(f"`{column}` of {where} must be a finite number{bounds}, got {value!r}.")
    return number


def number_in(value: Any) -> Any:
    """Returns the number or truth value that a text says, as the cells of a CSV file do; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text in ("true", "false"):
        return text == "true"
    return float(text) if _NUMBER.fullmatch(text) else value


def finite_number(value: Any) -> float | None:
    """Returns `value` as a float if it is a finite number, None if it is anything else (a bool too)."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def verdict_of(label: Any, where: str, positive: Collection[Any] | None = None) -> bool:
    """Returns whether a label means good.

    Args:
        label: true or false, 1 or 0, 1 or −1, or a text that says one of these; with `positive` anything.
        where: what error messages call the row.
        positive: the labels that mean good.
    """
    if positive is not None:
        return label in positive
    said = number_in(label)
    number = float(said) if isinstance(said, bool | np.bool_) else finite_number(said)
    if number not in (-1, 0, 1):
        cure = f" {_NAMED_CLASSES}" if isinstance(label, str) else ""
        raise ValueError(f"`label` of {where} must be true (good) or false, 1 or 0, or 1 or -1, got {shown(label)}.{cure}")
    return number == 1


def answer_of(answer: Any, where: str, column: str) -> Text:
    """Returns a completion if it is a string or one assistant message."""
    if isinstance(answer, str):
        return answer
    messages: Messages = check_prompt(answer, f"`{column}` of {where}")  # type: ignore[assignment]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(f"`{column}` of {where} must be a string or one assistant message, got {shown(messages)}.")
    return messages


def shown(value: Any) -> str:
    """Returns `repr(value)`, cut to what an error message has room for."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def list_of(values: Any, where: str, column: str, wanted: str) -> list[Any]:
    """Returns `values` as a list; anything that is no sequence is an error, which says what is `wanted`."""
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence | np.ndarray):
        raise ValueError(f"`{column}` of {where} must be a list of {wanted}, got {shown(values)}.")
    return list(values)


def is_whole(value: Any) -> bool:
    """Returns whether `value` is a whole number."""
    number = finite_number(value)
    return number is not None and number.is_integer()


def whole_numbers(values: Any, where: str, column: str) -> list[int]:
    """Returns a list of whole numbers."""
    found = list_of(values, where, column, "whole numbers")
    if not all(map(is_whole, found)):
        raise ValueError(f"`{column}` of {where} must be a list of whole numbers, got {shown(values)}.")
    return [int(value) for value in found]
