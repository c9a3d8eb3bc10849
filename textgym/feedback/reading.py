"""Feedback from files, lists and data sets: every row checked, every bad one named with its line, the good ones kept."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from textgym.errors import FeedbackError
from textgym.feedback.columns import has_columns, number_in, shown
from textgym.feedback.records import Comment, Record
from textgym.feedback.rows import FORMS, form_of, is_record, recognise_form, row_to_record
from textgym.rows import FILES, FileRow, iterate_file, read_rows

SOURCES = f"a list of records or dicts, the path of {FILES}, a list of such paths, a `datasets.Dataset` or a pandas DataFrame"
_SHOWN_ROWS = 5  # rows that one fault is shown with, and faults that are shown


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read.

    Attributes:
        file: the file; None for a row of a list or of a data set.
        line: of a file of lines (JSON lines, CSV) its line, counted from 1; else the row, counted from 0.
        reason: the row, the rule that it breaks, what stood there, and the cure, in a sentence.
        unit: what `line` counts, "line" or "row".
    """

    file: str | None
    line: int
    reason: str
    unit: str = "line"


@dataclass(frozen=True)
class Feedback:
    """What was read.

    Attributes:
        records: the good rows, in order.
        bad_rows: the others.
    """

    records: list[Record]
    bad_rows: list[BadRow]

    @property
    def num_comments(self) -> int:
        """How many of the records are comments, from which nothing is learned before a judge has read them."""
        return sum(isinstance(record, Comment) for record in self.records)

    def __len__(self) -> int:
        """How many records there are."""
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


@dataclass(frozen=True)
class _Place:
    """A row as it stands in its source; `problem` says why there is none."""

    file: str | None
    line: int
    row: Any
    problem: str | None = None
    unit: str = "row"

    @property
    def name(self) -> str:
        return _place_name(self.file, [self.line], self.unit)


def read_feedback(
    source: Any,
    form: str | None = None,
    *,
    on_bad_row: Literal["raise", "keep_good"] = "raise",
    rename: Mapping[str, str] | None = None,
    positive: str | int | Collection[Any] | None = None,
) -> Feedback:
    """Reads feedback in any of its forms; `textgym.feedback.rows` lists their columns.

    Args:
        source: a list of records or dicts, the path of a file (.jsonl, .json, .csv, .parquet), a list of such paths, a
            `datasets.Dataset`, a pandas DataFrame, or a `Feedback`. Blank lines are passed over.
        form: what all rows are, one of "comparison", "ranking", "judgements", "label", "segment_pair", "marking", "comment"; None
            recognises it row by row from the columns. Comments, which `textgym label` writes between comparisons, stay comments.
        on_bad_row: "raise" an error that names the bad rows once all are read, or "keep_good" rows and list the others in `bad_rows`.
        rename: columns that are called otherwise, `{their name: our name}`; the rows that have them get ours.
        positive: where `label` is the name of a class, the one (or a collection of those) that means good; every other means bad. A string
            stands for the number that is written so, too.

    Returns:
        The records and the bad rows.

    Raises:
        FeedbackError: there are bad rows (with "keep_good": only bad rows); its `feedback` holds all that was read.
        ValueError: an argument breaks one of the rules above, or the source holds nothing.
    """
    _check_arguments(form, on_bad_row)
    places = _with_names(list(_places(source)), dict(rename or {}))
    good = _positive_classes(places, positive)
    records: list[Record] = []
    bad_rows: list[BadRow] = []
    for place in places:
        try:
            records.append(_record(place, form, good))
        except ValueError as error:
            bad_rows.append(BadRow(place.file, place.line, str(error), place.unit))
    feedback = Feedback(records, bad_rows)
    if bad_rows and (on_bad_row == "raise" or not records):
        raise FeedbackError(_message(feedback), feedback)
    return feedback


def _record(place: _Place, form: str | None, positive: Collection[Any] | None) -> Record:
    if place.problem is not None:
        raise ValueError(place.problem)
    if is_record(place.row):
        record: Record = place.row
        if form is not None and form_of(record) not in (form, "comment"):
            raise ValueError(f"{place.name} must be a {form}, as `form` says, got a {form_of(record)}; convert it.")
        return record
    if not isinstance(place.row, Mapping):
        raise ValueError(f"{place.name} must be a record or a dict of columns, got {shown(place.row)}.")
    # A ranking may have a column of that name; of any other form the columns that make a comment of a row are too few.
    if form not in (None, "ranking") and recognise_form(place.row) == "comment":
        form = "comment"
    return row_to_record(place.row, place.name, form, positive)


def _places(source: Any) -> Iterator[_Place]:
    if isinstance(source, Feedback):
        source = source.records
    paths = [source] if isinstance(source, str | PathLike) else source
    if isinstance(paths, Sequence) and paths and all(isinstance(one, str | PathLike) for one in paths):
        found = False
        for path in map(Path, paths):
            for one in _file_rows(path):
                found = True
                yield _Place(str(path), one.number, one.row, one.problem, one.unit)
        if not found:
            raise ValueError(f"`feedback` must hold at least one row, got none in {', '.join(map(repr, map(str, paths)))}.")
    else:
        yield from (_Place(None, number, row) for number, row in enumerate(read_rows(source, "feedback", forms=SOURCES)))


def _file_rows(path: Path) -> Iterator[FileRow]:
    """Yields the rows of a file, or of the folder of a data set."""
    if path.is_dir():
        rows = read_rows(path, "feedback", forms=SOURCES)
        return (FileRow("row", number, row) for number, row in enumerate(rows))
    return iterate_file(path, "feedback")


def _with_names(places: list[_Place], rename: dict[str, str]) -> list[_Place]:
    """Gives columns their new names; a row in which that name is taken becomes a bad one."""
    rows = [place.row for place in places if isinstance(place.row, Mapping)]
    for name in rename:
        if not any(name in row for row in rows):
            columns = list(dict.fromkeys(column for row in rows for column in row))
            raise ValueError(f"`rename` must name columns of the rows, got {name!r}, which none has; they have {columns}.")
    return [_renamed(place, rename) if isinstance(place.row, Mapping) else place for place in places]


def _renamed(place: _Place, rename: dict[str, str]) -> _Place:
    kept = {name: value for name, value in place.row.items() if name not in rename}
    new = {rename[name]: value for name, value in place.row.items() if name in rename}
    taken = [name for name in new if has_columns(kept, name)]
    problem = f"{place.name} has a column {taken[0]!r} already; rename that one too." if taken else place.problem
    return replace(place, row={**kept, **new}, problem=problem)


def _positive_classes(places: list[_Place], positive: str | int | Collection[Any] | None) -> Collection[Any] | None:
    """Returns the labels that mean good, after checking that they, and one way of writing labels, occur."""
    labels = [place.row["label"] for place in places if isinstance(place.row, Mapping) and has_columns(place.row, "label")]
    if positive is None:
        said = [number_in(label) for label in labels]
        if -1 in said and any(label == 0 and not isinstance(label, bool) for label in said):
            raise ValueError(
                "`label` must be 1 or 0, or 1 or -1, but these rows have both 0 and -1: 0 may mean neither. Pass `positive=1` to take all "
                "others as bad, or leave out the rows with 0."
            )
        return None
    wanted: list[Any] = [positive] if isinstance(positive, str | int) else list(positive)
    wanted += [label for one in wanted if isinstance(one, str) and one not in labels for label in labels if _written(label) == one]
    for one in wanted:
        if one not in labels and not (isinstance(one, str) and one in map(_written, labels)):
            found = list(dict.fromkeys(map(repr, labels)))[:20]
            raise ValueError(f"`positive` must be among the labels of the rows, got {one!r}; the labels are {', '.join(found) or 'none'}.")
    return wanted


def _written(label: Any) -> str:
    """Returns a number or truth value as it is written; "" for anything else."""
    return json.dumps(label) if isinstance(label, bool | int | float) else ""


def _check_arguments(form: str | None, on_bad_row: str) -> None:
    if form is not None and form not in FORMS:
        raise ValueError(f"`form` must be one of {', '.join(map(repr, FORMS))}, or None to recognise it, got {form!r}.")
    if on_bad_row not in ("raise", "keep_good"):
        raise ValueError(f"`on_bad_row` must be 'raise' or 'keep_good', got {on_bad_row!r}.")


def _message(feedback: Feedback) -> str:
    """Says each fault once, in a line with the rows that have it."""
    faults: dict[str, list[BadRow]] = {}
    for row in feedback.bad_rows:
        faults.setdefault(_fault(row), []).append(row)
    shown = [f"  {_fault_line(rows)}" for rows in list(faults.values())[:_SHOWN_ROWS]]
    if len(faults) > _SHOWN_ROWS:
        shown.append(f"  and {sum(map(len, list(faults.values())[_SHOWN_ROWS:])):,} more, with other faults")
    cure = (
        "Mend them, or pass `on_bad_row='keep_good'` to leave them out." if feedback.records else "None is left; see `rename=` and `form=`."
    )
    bad, count = len(feedback.bad_rows), len(feedback.bad_rows) + len(feedback.records)
    return "\n".join([f"`feedback` must have good rows only, got {bad:,} bad of {count:,}:", *shown, cure])


def _fault(row: BadRow) -> str:
    """Returns what tells the fault of a row from others: its reason without the row and without the value that stood there."""
    return row.reason.replace(_place_name(row.file, [row.line], row.unit), str(row.file)).partition(", got ")[0]


def _fault_line(rows: Sequence[BadRow]) -> str:
    """Returns the reason of the first row, said of all of them."""
    first = rows[0]
    one, all_of_them = ([first.line], [row.line for row in rows])
    return first.reason.replace(_place_name(first.file, one, first.unit), _place_name(first.file, all_of_them, first.unit))


def _place_name(file: str | None, numbers: Iterable[int], unit: str) -> str:
    """Returns what error messages call rows of a source: "line 3 of 'a.jsonl'", "rows 1, 2 and 5 more of `feedback`"."""
    source = "`feedback`" if file is None else repr(file)
    all_numbers = list(numbers)
    shown = ", ".join(map(str, all_numbers[:_SHOWN_ROWS]))
    more = f" and {len(all_numbers) - _SHOWN_ROWS:,} more" if len(all_numbers) > _SHOWN_ROWS else ""
    return f"{unit}{'s' if len(all_numbers) > 1 else ''} {shown}{more} of {source}"
