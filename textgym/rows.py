"""Rows of data, from lists, files (JSON lines, JSON, CSV, Parquet), data sets and data frames, with plain Python values."""

import csv
import gzip
import importlib.util
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FILES = "a .jsonl, .json, .csv or .parquet file (the first three may be gzipped, .gz)"
_FOLDER_FILES = ("state.json", "dataset_dict.json")  # what `save_to_disk` of `datasets` leaves
_AS_THEY_ARE = frozenset({str, int, float, bool, type(None), bytes})


class FileRow(NamedTuple):
    """A row of a file.

    Attributes:
        unit: what `number` counts: "line" (from 1) or "row" (from 0).
        number: its place.
        row: what it holds; None if it cannot be read.
        problem: why it cannot be read, in a sentence that names it; None if it can.
    """

    unit: str
    number: int
    row: Any
    problem: str | None = None


def read_rows(source: Any, argument: str, *, forms: str, required: str | None = None) -> list[Any]:
    """Reads the rows of a list, of a file, of a `datasets.Dataset` or of a pandas DataFrame; none at all is an error.

    Values of columns are plain Python ones: numbers and arrays of numpy and torch become numbers and lists, missing values of a data
    frame None.

    Args:
        source: where the rows are.
        argument: what error messages call `source`.
        forms: what error messages say that `source` can be.
        required: a column that a data set must have.

    Raises:
        ValueError: `source` is none of these, a row cannot be read, or there is none; which is said.
    """
    name = argument.removesuffix("s")
    if isinstance(source, str | os.PathLike):
        rows = _read_path(Path(source), argument, required)
        if not rows:
            raise ValueError(f"`{argument}` must hold at least one {name}, got none in {str(source)!r}.")
        return rows
    if _is_dataset(source):
        rows = _read_dataset(source, argument, required)
    elif _is_data_frame(source):
        rows = _read_data_frame(source, argument, required)
    elif isinstance(source, Sequence):
        rows = [python_value(row) for row in source]
    else:
        raise ValueError(f"`{argument}` must be {forms}, got {type(source).__name__}.")
    if not rows:
        raise ValueError(f"`{argument}` must hold at least one {name}, got none; pass {forms}.")
    return rows


def row_name(source: Any, argument: str) -> str:
    """Returns how error messages name a row of `source`, with `{}` for its place, counted from 0."""
    if not isinstance(source, str | os.PathLike):
        return f"row {{}} of `{argument}`"
    shown = repr(str(source)).replace("{", "{{").replace("}", "}}")
    return f"row {{}} of {shown}"


# -- values -------------------------------------------------------------------------------------------------------------------------------


def python_value(value: Any) -> Any:
    """Returns a value with every number and array of numpy or torch in it as plain Python numbers and lists; other objects as they are."""
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) or _is_tensor(value):
        return python_value(value.tolist())
    if kind is dict:
        return {name: python_value(one) for name, one in value.items()}
    if kind is list:
        return [python_value(one) for one in value]
    if kind is tuple:
        return tuple(python_value(one) for one in value)
    return value


def _is_tensor(value: Any) -> bool:
    """Returns whether `value` is an array of torch, or of another library with its methods, without importing one."""
    return callable(getattr(value, "tolist", None)) and hasattr(value, "dtype") and hasattr(value, "shape")


# -- files --------------------------------------------------------------------------------------------------------------------------------


def iterate_file(path: Path, argument: str) -> Iterator[FileRow]:
    """Reads a file row by row; blank lines are passed over, and a line that is broken hides no other.

    Args:
        path: the file; its name says what it is, see `FILES`.
        argument: what error messages call it.

    Raises:
        ValueError: the path ends otherwise, there is no file, or it cannot be read as a whole.
    """
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    read = _READERS.get(kind)
    if read is None or (kind == "parquet" and path.suffix == ".gz"):
        raise ValueError(
            f"`{argument}` given as a path must end in {', '.join(f'.{one}' for one in _READERS)} (all but the last also in .gz), got "
            f"{str(path)!r}; pass one {argument.removesuffix('s')} as a list, `[...]`."
        )
    if not path.is_file():
        raise ValueError(f"`{argument}` given as a path must be a file, and there is none at {str(path)!r}.")
    return read(path, argument)


def _lines(path: Path, argument: str) -> Iterator[tuple[int, bytes | FileRow]]:
    """Yields the lines of a file, with their numbers from 1; a last one that says so where the rest is broken."""
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            place = f"`{argument}`: line {number + 1} of {str(path)!r}"
            yield number + 1, FileRow("line", number + 1, None, f"{place} and what follows is broken gzip ({error}).")


def _json_lines(path: Path, argument: str) -> Iterator[FileRow]:
    for number, line in _lines(path, argument):
        if isinstance(line, FileRow):
            yield line
        elif line.strip():
            yield _json_line(number, line, f"`{argument}`: line {number} of {str(path)!r}")


def _json_line(number: int, line: bytes, where: str) -> FileRow:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return FileRow("line", number, None, f"{where} is not UTF-8 ({error.reason}): {line.strip()[:80]!r}.")
    try:
        return FileRow("line", number, json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        return FileRow("line", number, None, f"{where} is not JSON ({reason}): {text.strip()[:80]!r}.")


def _whole_text(path: Path, argument: str) -> str:
    """Returns the text of a file; one that is broken is a `ValueError`."""
    parts = []
    for _, line in _lines(path, argument):
        if isinstance(line, FileRow):
            raise ValueError(line.problem)
        parts.append(line)
    try:
        return b"".join(parts).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{argument}`: {str(path)!r} is not UTF-8 ({error.reason}).") from error


def _json(path: Path, argument: str) -> Iterator[FileRow]:
    """An array of rows, or one row per line."""
    text = _whole_text(path, argument)
    if not text.lstrip().startswith("["):
        yield from _json_lines(path, argument)
        return
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        place = f"line {error.lineno} of " if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise ValueError(f"`{argument}`: {place}{str(path)!r} is not JSON ({reason}).") from error
    yield from (FileRow("row", number, row) for number, row in enumerate(rows))


def _csv(path: Path, argument: str) -> Iterator[FileRow]:
    """A header and rows; values are texts, an empty one is None."""
    csv.field_size_limit(2**31 - 1)  # the usual limit is shorter than some prompts
    rows = csv.reader(io.StringIO(_whole_text(path, argument), newline=""))
    header = next(rows, [])
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield FileRow("line", rows.line_num, None, f"`{argument}`: line {rows.line_num} of {str(path)!r} is not CSV ({error}).")
            return
        if row is None:
            return
        number = rows.line_num
        if row and len(row) != len(header):
            problem = f"`{argument}`: line {number} of {str(path)!r} has {len(row)} values, but the header names {len(header)} columns."
            yield FileRow("line", number, None, problem)
        elif row:
            yield FileRow("line", number, {name: value or None for name, value in zip(header, row, strict=True)})


def _parquet(path: Path, argument: str) -> Iterator[FileRow]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"`{argument}`: to read the Parquet file {str(path)!r} pyarrow is needed, which comes with the extra `datasets`: "
            '`pip install "textgym[datasets]"`.'
        )
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"`{argument}`: {str(path)!r} is no Parquet file that can be read ({str(error).splitlines()[0]}).") from error
    yield from (FileRow("row", number, row) for number, row in enumerate(rows))


_READERS: dict[str, Callable[[Path, str], Iterator[FileRow]]] = {"jsonl": _json_lines, "json": _json, "csv": _csv, "parquet": _parquet}


def _read_path(path: Path, argument: str, required: str | None) -> list[Any]:
    if path.is_dir() and any((path / name).is_file() for name in _FOLDER_FILES):
        return _read_dataset(_load_folder(path, argument), argument, required)
    rows = []
    for one in iterate_file(path, argument):
        if one.problem is not None:
            raise ValueError(one.problem)
        rows.append(one.row)
    return rows


def _load_folder(path: Path, argument: str) -> Any:
    """Returns the data set that `save_to_disk` wrote."""
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f'`{argument}`: to read the data set in the folder {str(path)!r} `datasets` is needed: `pip install "textgym[datasets]"`.'
        )
    from datasets import load_from_disk

    return load_from_disk(str(path))


# -- data sets and data frames ------------------------------------------------------------------------------------------------------------


def _is_dataset(source: Any) -> bool:
    return hasattr(source, "column_names") and hasattr(source, "__getitem__")


def _is_data_frame(source: Any) -> bool:
    """Returns whether `source` is a pandas DataFrame, without importing pandas."""
    return type(source).__name__ == "DataFrame" and hasattr(source, "columns") and hasattr(source, "notna")


def _check_column(required: str | None, names: Sequence[Any], argument: str, cure: str) -> None:
    if required is not None and required not in names:
        raise ValueError(f'`{argument}` must have a "{required}" column, got the columns {list(names)}; use `{cure}`.')


def _read_dataset(dataset: Any, argument: str, required: str | None) -> list[Any]:
    names = dataset.column_names
    if not isinstance(names, list) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"`{argument}` must be one split of a map-style `datasets.Dataset`, got {type(dataset).__name__}; "
            'choose a split (`dataset["train"]`) or make a list of an iterable data set.'
        )
    _check_column(required, names, argument, f'dataset.rename_column(..., "{required}")')
    columns = _without_format(dataset)[:]
    return [dict(zip(columns, map(python_value, values), strict=True)) for values in zip(*columns.values(), strict=True)]


def _without_format(dataset: Any) -> Any:
    """Returns a data set that hands out Python values; one with a transform of the user's as it is."""
    form = getattr(dataset, "format", None)
    if not isinstance(form, Mapping) or form.get("type") in (None, "custom"):
        return dataset
    return dataset.with_format(None, columns=form.get("columns"), output_all_columns=form.get("output_all_columns", False))


def _read_data_frame(frame: Any, argument: str, required: str | None) -> list[Any]:
    _check_column(required, list(frame.columns), argument, f'frame.rename(columns={{...: "{required}"}})')
    columns = {str(name): [None if missing else python_value(one) for one, missing in _cells(frame[name])] for name in frame.columns}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _cells(column: Any) -> Iterator[tuple[Any, bool]]:
    return zip(column.tolist(), column.isna().tolist(), strict=True)
