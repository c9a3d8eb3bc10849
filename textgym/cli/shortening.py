"""Long texts in tables: how they begin and how they end, in as many columns of the terminal as there is room for."""

import re

from rich.cells import cell_len, chop_cells

PROMPT_LINES = 3  # of a column of a table
_FRAME = 7  # columns of the terminal that a table of two columns takes for itself
_GAP = " … "


def shortened(text: str, cells: int) -> str:
    """Returns a text that takes `cells` columns at most: itself, or its beginning and its end, each in one line.

    Wide characters take two columns, as terminals show them. White space before and behind it stays: what follows a prompt begins there.
    """
    if cell_len(text) <= cells and "\n" not in text:
        return text
    line = re.sub(r"\s*\n\s*", " / ", text.strip("\n"))
    if cell_len(line) <= cells:
        return line
    room = max(2, cells - cell_len(_GAP))
    return _first(line, room // 2) + _GAP + _last(line, room - room // 2)


def _first(text: str, cells: int) -> str:
    return (chop_cells(text, cells) or [""])[0]


def _last(text: str, cells: int) -> str:
    """Returns the longest end of a text that takes `cells` columns at most."""
    start, width = len(text), 0
    while start and (width := width + cell_len(text[start - 1])) <= cells:
        start -= 1
    return text[start:]


def prompt_cells(width: int) -> int:
    """Returns how much of a prompt a table of two columns shows on a terminal `width` columns wide."""
    return PROMPT_LINES * max(8, (width - _FRAME) // 2)
