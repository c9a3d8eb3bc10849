"""What dense rewards returned, checked and written down token by token."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from textgym.errors import RewardError
from textgym.rewards.calling import Float64Array, as_list, as_number, as_scores, check_count
from textgym.rewards.episodes import EpisodeBatch, describe_row

Payer: TypeAlias = Callable[[Any, str, EpisodeBatch, list[Float64Array]], None]


def pay_tokens(result: Any, name: str, batch: EpisodeBatch, rewards: list[Float64Array]) -> None:
    """Writes what a token-level function returned into `rewards`, after checking it."""
    rows = as_list(result, name, "one list of numbers per completion")
    check_count(rows, name, batch)
    for row, values in enumerate(rows):
        if values is None:
            continue
        numbers = as_list(values, name, "one list of numbers per completion")
        if len(numbers) != len(rewards[row]):
            raise RewardError(
                f"token-level reward `{name}` returned {len(numbers)} numbers for the {len(rewards[row])} tokens of "
                f"{describe_row(batch, row)}; it must return one per id of `completion_ids`, EOS included."
            )
        scores = [as_number(value, name, partial(_describe_token, batch, row, t)) for t, value in enumerate(numbers)]
        rewards[row][:] = np.nan_to_num(scores, nan=0.0)


def _describe_token(batch: EpisodeBatch, row: int, t: int) -> str:
    return f"token {t} of {describe_row(batch, row)}"


def segment_payer(rows: list[int], columns: list[int]) -> Payer:
    """Returns a function that adds the i-th score at token `columns[i]` of row `rows[i]`."""

    def pay(result: Any, name: str, batch: EpisodeBatch, rewards: list[Float64Array]) -> None:
        for row, column, score in zip(rows, columns, np.nan_to_num(as_scores(result, name, batch), nan=0.0), strict=True):
            rewards[row][column] += score

    return pay
