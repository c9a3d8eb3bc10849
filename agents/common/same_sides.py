"""Comparisons whose answers are the same tokens: nothing can be learned from them, which is said."""

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_SHOWN_ROWS = 5


def check_sides(same: npt.NDArray[np.bool_], names: Sequence[str], argument: str) -> None:
    """Warns of comparisons whose answers are the same tokens.

    Args:
        same: which they are, (N,); False for rows that compare nothing.
        names: what error messages call each row, N.
        argument: what they call all of them.

    Raises:
        ValueError: all are like that.
    """
    rows = np.flatnonzero(same)
    if not len(rows):
        return
    more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
    shown = ", ".join(names[row] for row in rows[:_SHOWN_ROWS]) + more
    cause = "they are the same texts, or differ only in words that the tokenizer does not know or behind an end token"
    if len(rows) == len(same):
        raise ValueError(
            f"`{argument}` must have answers that differ, but the answers of every row are the same tokens ({shown}), so that nothing can "
            f"be learned: {cause}. Give other answers, or a model whose tokenizer tells them apart."
        )
    warnings.warn(
        f"{len(rows)} of {len(same)} rows of `{argument}` have answers that are the same tokens, from which nothing is learned: {cause} "
        f"({shown}).",
        stacklevel=2,
    )
