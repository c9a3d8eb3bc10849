"""Rows from every source, with the same plain Python values."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents.common.offline_rows import preference_row, read_examples
from textgym.feedback import Label, read_feedback
from textgym.prompts import PromptSet, read_prompts, split_row
from textgym.rows import python_value, read_rows, row_name

ROWS = [{"prompt": "a", "answer": 5, "scores": [0.5, 1.0]}, {"prompt": "b, c\n", "answer": 7, "scores": [2.0]}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(source: Any, argument: str = "prompts") -> list[Any]:
    return read_rows(source, argument, forms="rows")


def types(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: types(one) for name, one in value.items()}
    return [types(one) for one in value] if isinstance(value, list) else type(value)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.jsonl", LINES),
        ("r.jsonl.gz", "\n" + LINES),
        ("r.json", json.dumps(ROWS)),
        ("r.json", "\ufeff" + json.dumps(ROWS, indent=1)),
        ("r.json.gz", json.dumps(ROWS)),
        ("r.json", LINES),
        ("R.JSON", LINES),
    ],
)
def test_files_of_json(tmp_path: Path, name: str, text: str) -> None:
    path = written(tmp_path, name, text)
    for source in (path, str(path)):
        assert read(source) == ROWS and types(read(source)) == types(ROWS)
    assert read_prompts(path) == (["a", "b, c\n"], {"answer": [5, 7], "scores": [[0.5, 1.0], [2.0]]})


@pytest.mark.parametrize("name", ["r.csv", "r.csv.gz"])
def test_files_of_comma_separated_values(tmp_path: Path, name: str) -> None:
    long = "x" * 200_000  # more than the csv module takes by itself
    text = 'prompt,label,note\n"a, ""b""\nc",1,\n' + f"{long},0,é\n\n"
    assert read(written(tmp_path, name, text)) == [
        {"prompt": 'a, "b"\nc', "label": "1", "note": None},
        {"prompt": long, "label": "0", "note": "é"},
    ]
    assert csv.field_size_limit() >= 200_000


def test_labels_and_numbers_of_csv_are_understood(tmp_path: Path) -> None:
    path = written(tmp_path, "l.csv", "prompt,completion,label,weight\nx,y,1,2.5\nx,z,False,\nx,w,-1,1\n")
    assert read_feedback(path).records == [Label("x", "y", True, 2.5), Label("x", "z", False), Label("x", "w", False)]
    path = written(tmp_path, "p.csv", "prompt,chosen,rejected,preference\nx,y,z,0.75\n")
    (example,), where = read_examples(path, "preferences", preference_row)
    assert example.label == 0.75 and where == f"row {{}} of {str(path)!r}"


def test_parquet_data_sets_and_data_frames(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(str(tmp_path / "r.parquet"))
    data.save_to_disk(str(tmp_path / "folder"))
    frame = pandas.DataFrame(ROWS)
    formats = [data.with_format(form) for form in (None, "numpy", "torch", "pandas", "arrow")]
    for source in (tmp_path / "r.parquet", tmp_path / "folder", frame, *formats):
        assert read(source) == ROWS and types(read(source)) == types(ROWS)
    some = data.with_format("numpy", columns=["prompt", "answer"])
    assert read(some) == [{name: row[name] for name in ("prompt", "answer")} for row in ROWS]
    changed = data.with_transform(
        lambda batch: {"prompt": [text.upper() for text in batch["prompt"]], "x": [np.int64(1)] * len(batch["prompt"])}
    )
    assert read(changed) == [{"prompt": "A", "x": 1}, {"prompt": "B, C\n", "x": 1}]
    holes = pandas.DataFrame({"prompt": ["a", None], "answer": [1.5, float("nan")], "when": [pandas.NaT, pandas.Timestamp(0)]})
    assert read(holes)[0] == {"prompt": "a", "answer": 1.5, "when": None} and read(holes)[1]["prompt"] is read(holes)[1]["answer"] is None
    assert read_feedback(pandas.DataFrame([{"prompt": "x", "completion": "y", "label": True}])).records == [Label("x", "y", True)]
    datasets.Dataset.from_list([{"text": "x", "label": 1}]).save_to_disk(str(tmp_path / "labels"))
    assert read_feedback(tmp_path / "labels").records == [Label("", "x", True)]


def test_values_are_plain() -> None:
    row = {
        "a": np.int64(1),
        "b": np.float32(0.5),
        "c": np.array([[1, 2]]),
        "d": torch.tensor([1.5]),
        "e": torch.tensor(2),
        "f": [np.bool_(True), {"g": np.str_("x")}, (np.array(3),)],
        "h": None,
        "i": np.array(["x", None], dtype=object),
    }
    plain = {"a": 1, "b": 0.5, "c": [[1, 2]], "d": [1.5], "e": 2, "f": [True, {"g": "x"}, (3,)], "h": None, "i": ["x", None]}
    assert python_value(row) == plain and types(python_value(row)) == types(plain)
    thing = object()
    assert python_value({"a": thing})["a"] is thing
    assert read([row]) == [plain]
    assert split_row({"prompt": np.str_("x"), "n": np.int64(2)}, "row") == ("x", {"n": 2})
    assert type(split_row({"prompt": np.str_("x")}, "row")[0]) is str


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("r.txt", "a", r"must end in \.jsonl, \.json, \.csv, \.parquet .*; pass one prompt as a list"),
        ("r.parquet.gz", "a", "must end in"),
        ("r.jsonl", "", r"at least one prompt, got none in '.*r\.jsonl'"),
        ("r.json", "[]", r"got none in '.*r\.json'"),
        ("r.csv", "prompt\n", r"got none in '.*r\.csv'"),
        ("r.csv", "", r"got none in '.*r\.csv'"),
        ("r.json", "[1,\n2", r"line 2 of '.*r\.json' is not JSON"),
        ("r.json", '{"a": 1}\n{', r"line 2 of '.*r\.json' is not JSON"),
        ("r.csv", "prompt,label\na,1\nb\n", r"line 3 of '.*r\.csv' has 1 values, but the header names 2 columns"),
        ("r.parquet", "no", r"'.*r\.parquet' is no Parquet file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    if name == "r.parquet":
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=said):
        read(path)


def test_broken_files(tmp_path: Path) -> None:
    for name in ("r.json.gz", "r.csv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(LINES.encode() * 50)[:-20])
        with pytest.raises(ValueError, match="broken gzip"):
            read(tmp_path / name)
    for name in ("r.json", "r.csv"):
        (tmp_path / name).write_bytes(b'[{"prompt": "\xff"}]')
        with pytest.raises(ValueError, match="is not UTF-8"):
            read(tmp_path / name)
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ValueError, match=r"must be a file|must end in"):
            read(path)


def test_rows_are_named_with_their_file(tmp_path: Path) -> None:
    assert row_name([1], "prompts") == "row {} of `prompts`"
    odd = written(tmp_path, "{}.json", '[{"prompt": "a"}, {"text": "b"}]')
    assert row_name(odd, "prompts").format(3).endswith("{}.json'")
    with pytest.raises(ValueError, match=r"row 1 of '.*\{\}\.json' must have a"):
        read_prompts(odd)
    (tmp_path / "f.json").write_text('[{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"}]')
    with pytest.raises(ValueError, match=r"row 1 of '.*f\.json' must have the columns"):
        read_feedback(tmp_path / "f.json")
    (tmp_path / "f.csv").write_text("prompt,chosen,rejected\na,b,c\na,b,\n")
    with pytest.raises(ValueError, match=r"line 3 of '.*f\.csv'"):
        read_feedback(tmp_path / "f.csv")


def test_a_format_of_numpy_reaches_rewards_as_numbers(tokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "ab", "answer": 5}]).with_format("numpy")
    assert [type(value) for value in PromptSet(data, tokenizer).columns["answer"]] == [int]
