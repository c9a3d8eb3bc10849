"""`textgym convert`: files in, files out, what it says, and its errors."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from textgym.feedback import Comment, Comparison, Judgement, Judgements, Ranking, read_feedback, write_feedback


def rows_of(path: str) -> list[dict[str, Any]]:
    data = Path(path).read_bytes()
    text = (gzip.decompress(data) if path.endswith(".gz") else data).decode()
    return [json.loads(line) for line in text.splitlines()]


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def rankings(textgym: Any) -> str:
    write_feedback(
        "rankings.jsonl",
        [
            Ranking("x", ("a", "b", "c"), (1, 2, 2)),
            Judgements("y", ("d", "e"), (Judgement(0, 1, -1),)),
            Comment("x", ("a", "b"), "so so"),
            Comparison("z", "f", "f"),
        ],
    )
    return "rankings.jsonl"


def test_what_goes_in_comes_out_or_is_counted(textgym: Any, rankings: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert textgym("convert", rankings, "--to", "pairs", "--out", "pairs.jsonl") == 0
    assert [(row["chosen"], row["rejected"]) for row in rows_of("pairs.jsonl")] == [("a", "b"), ("a", "c"), ("e", "d")]
    assert capsys.readouterr().out.splitlines() == [
        "Read 4 rows: 1 rankings, 1 judgements, 1 comments, 1 pairs",
        "Wrote 3 pairs to pairs.jsonl",
        "Left out: 1 ties",
        "Left out: 1 comments, which a judge must read first",
        "Left out: 1 pairs of equal texts",
    ]
    assert textgym("convert", rankings, "--to", "pairs", "--keep-ties", "--out", "pairs.jsonl.gz") == 0
    assert sum(row.get("preference") == 0.5 for row in rows_of("pairs.jsonl.gz")) == 1
    assert len(read_feedback("pairs.jsonl.gz")) == 4


def test_other_names_classes_and_bad_rows(textgym: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(
        "reviews.jsonl", [{"review": f"text {i}", "stars": "pos" if i % 2 else "neg"} for i in range(4)] + [{"review": 3, "stars": "pos"}]
    )
    command = ["convert", "reviews.jsonl", "--rename", "review=text", "--rename", "stars=label", "--positive", "pos", "--to", "labels"]
    assert textgym(*command, "--out", "labels.jsonl") == 2
    said = capsys.readouterr().err
    assert said.startswith("textgym: FILES must have good rows only, got 1 bad of 5:\n") and "give --keep-good" in said
    assert textgym(*command, "--keep-good", "--out", "labels.jsonl") == 0
    assert "Bad rows: left out 1 row; the first: `text` of line 5" in capsys.readouterr().out
    assert [row["label"] for row in rows_of("labels.jsonl")] == [False, True, False, True]


def test_marked_texts_by_category(textgym: Any) -> None:
    spans = [{"category": "rude", "start": 0, "end": 3}]
    write_rows("marked.jsonl", [{"prompt": "x", "completion": "one two. three.", "errors": spans}])
    command = ["convert", "marked.jsonl", "--rename", "errors=spans", "--out", "out.jsonl", "--force"]
    assert textgym(*command, "--to", "labels", "--category", "rude") == 0
    assert rows_of("out.jsonl")[0]["label"] is False
    assert textgym(*command, "--to", "segment-labels", "--segmenter", "sentence") == 0
    assert [row["label"] for row in rows_of("out.jsonl")] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "kto"], "--to must be one of pairs, labels, segment-labels"),
        (["--to", "labels"], "nothing is left to write: 1 rankings, of whose middle answers"),
        (["--to", "pairs", "--out", "pairs.txt"], "--out must end in .jsonl or .jsonl.gz, not 'pairs.txt'"),
        (["--to", "pairs", "--out", "rankings.jsonl", "--force"], "--out must be another file than what is read"),
        (["--to", "pairs", "--out", "there.jsonl"], "--out there.jsonl exists: choose another file, or replace it with --force"),
        (["--to", "labels", "--keep-ties"], "--keep-ties belongs to --to pairs"),
        (["--to", "labels", "--segmenter", "whole"], "--segmenter belongs to --to segment-labels"),
        (["--to", "same", "--category", "wrong"], "--category cannot be given with --to same"),
        (["--to", "pairs", "--category", "wrong"], "--category must be one of those in the spans, which are none, not wrong"),
        (["--to", "pairs", "--rename", "a"], "--rename takes OLD=NEW"),
        (["--to", "pairs", "--rename", "a=b", "--rename", "a=c"], "--rename a=c: a is renamed twice"),
        (["--to", "pairs", "--form", "pairs"], "FILES: --form must be one of"),
    ],
)
def test_errors_are_one_sentence(textgym: Any, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_feedback("rankings.jsonl", [Ranking("x", ("a", "b", "c"), (1, 2, 3))])
    Path("there.jsonl").write_text("kept")
    out = [] if "--out" in arguments else ["--out", "out.jsonl"]
    assert textgym("convert", "rankings.jsonl", *arguments, *out) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert Path("there.jsonl").read_text() == "kept" and not Path("out.jsonl").exists()


def test_help_fits_eighty_columns(textgym: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert textgym("convert", "--help") == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and "textgym convert rankings.jsonl --to pairs --out pairs.jsonl" in " ".join(shown.split())


def test_numbers_that_json_cannot_say_are_named_and_nothing_is_written(textgym: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("odd.jsonl").write_text('{"prompt": "x", "chosen": "a", "rejected": "b", "score": NaN}\n')
    assert textgym("convert", "odd.jsonl", "--to", "pairs", "--out", "out.jsonl") == 2
    assert "record 0 of what would be written holds what JSON cannot say" in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


def test_other_formats_are_read(textgym: Any) -> None:
    Path("reviews.csv").write_text("text,label\nso good,pos\nso bad,neg\n")
    assert textgym("convert", "reviews.csv", "--positive", "pos", "--to", "labels", "--out", "labels.jsonl") == 0
    assert [(row["completion"], row["label"]) for row in rows_of("labels.jsonl")] == [("so good", True), ("so bad", False)]
    Path("pairs.json").write_text(json.dumps([{"prompt": "x", "chosen": "a", "rejected": "b"}]))
    assert textgym("convert", "pairs.json", "--to", "labels", "--out", "more.jsonl.gz") == 0
    assert [row["label"] for row in rows_of("more.jsonl.gz")] == [True, False]
