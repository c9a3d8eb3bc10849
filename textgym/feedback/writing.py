"""Feedback to JSON lines, in the columns that `read_feedback` reads: what is written and read again is equal."""

import gzip
import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from textgym.feedback.records import Record
from textgym.feedback.rows import record_to_row


def write_feedback(path: str | PathLike[str], records: Iterable[Record], *, append: bool = False) -> None:
    """Writes records, one JSON object a line; nothing is written unless all can be.

    Args:
        path: a .jsonl or .jsonl.gz file.
        records: of any forms, also mixed.
        append: write behind what the file holds, instead of replacing it.

    Raises:
        ValueError: the path ends otherwise, or a record holds what JSON cannot say.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"`path` must end in .jsonl or .jsonl.gz, got {str(path)!r}.")
    text = "".join(_line(number, record) for number, record in enumerate(records)).encode()
    with gzip.open(path, "ab" if append else "wb") if path.suffix == ".gz" else path.open("ab" if append else "wb") as file:
        file.write(text)


def _line(number: int, record: Record) -> str:
    try:
        return json.dumps(record_to_row(record), ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"record {number} of `records` cannot be written: {error}") from error
