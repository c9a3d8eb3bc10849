"""Files and lists of feedback: every form, its columns, and what is said about rows that break the rules."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from textgym.errors import FeedbackError
from textgym.feedback import (
    Comment,
    Comparison,
    Judgement,
    Judgements,
    Label,
    Marking,
    Ranking,
    Segment,
    SegmentPair,
    Span,
    read_feedback,
    write_feedback,
)
from textgym.feedback.columns import verdict_of

USER, YES, NO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
SEGMENT = {"prompt_ids": [1], "completion_ids": [2, 3, 4], "start": 1, "end": 3}
PAIR = {"prompt": "x", "chosen": "a", "rejected": "b"}


def one(row: Any, **options: Any) -> Any:
    (record,) = read_feedback([row], **options).records
    return record


def lines(path: Path, *texts: str) -> Path:
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "record"),
    [
        (PAIR, Comparison("x", "a", "b")),
        ({**PAIR, "margin": -2, "preference": 0.25, "weight": 3}, Comparison("x", "a", "b", 0.25, -2.0, 3.0)),
        ({**PAIR, "margin": None, "label": None, "by": "me"}, Comparison("x", "a", "b", columns={"label": None, "by": "me"})),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, Comparison([USER], [YES], [NO])),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, Comparison([USER], [YES], [NO])),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
            },
            Comparison("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d", " e"),
        ),
        ({"prompt": "x", "completions": ["a", "b", "c"]}, Ranking("x", ("a", "b", "c"), (1, 2, 3))),
        ({"prompt": "x", "completions": ["a", "b"], "ranks": [2, 1]}, Ranking("x", ("a", "b"), (2, 1))),
        ({"prompt": "x", "completions": np.array(["a", "b"]), "rank": np.array([1.0, 1.0])}, Ranking("x", ("a", "b"), (1, 1))),
        (
            {"prompt": "x", "completions": ["a", "b"], "ranks": [2, 1], "rank": "first", "comparisons": []},
            Ranking("x", ("a", "b"), (2, 1), columns={"rank": "first", "comparisons": []}),
        ),
        (
            {"prompt": "x", "completions": ["a", "b"], "rank": None, "comparisons": [{"i": 1, "j": 0, "z": -1}]},
            Judgements("x", ("a", "b"), (Judgement(1, 0, -1),), columns={"rank": None}),
        ),
        ({"prompt": "x", "completion": "a", "label": True}, Label("x", "a", True)),
        ({"prompt": "x", "completion": "a", "label": -1, "text": "xa"}, Label("x", "a", False, columns={"text": "xa"})),
        ({"text": "a", "label": 0}, Label("", "a", False)),
        ({"text": "x a", "prompt": "x", "label": 1.0}, Label("x", " a", True)),
        (
            {"first": SEGMENT, "second": {**SEGMENT, "end": 2}, "preference": 0},
            SegmentPair(Segment((1,), (2, 3, 4), 1, 3), Segment((1,), (2, 3, 4), 1, 2), 0.0),
        ),
        (
            {
                "prompt": "x",
                "completion": "abc",
                "spans": [{"category": "wrong", "start": 0, "end": 3}, {"type": "dull", "start": 1, "end": 2}],
            },
            Marking("x", "abc", (Span("wrong", 0, 3), Span("dull", 1, 2))),
        ),
        ({"text": "abc", "spans": []}, Marking("", "abc", ())),
        ({"prompt": "x", "completions": ["a"], "comment": "fine"}, Comment("x", ("a",), "fine")),
        ({"prompt": "x", "completion": "a", "comment": "fine"}, Comment("x", ("a",), "fine")),
        ({**PAIR, "comment": "the first is kinder"}, Comparison("x", "a", "b", columns={"comment": "the first is kinder"})),
        ({**PAIR, "completion": "a", "label": True, "form": "label"}, Label("x", "a", True, columns={"chosen": "a", "rejected": "b"})),
        ({**PAIR, "form": "sonnet"}, Comparison("x", "a", "b", columns={"form": "sonnet"})),
    ],
)
def test_the_form_is_recognised_from_the_columns(row: dict[str, Any], record: Any) -> None:
    assert one(row) == record


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (3, "a record or a dict of columns, got 3"),
        ({"question": "x"}, r"row 0 of `feedback` must have the columns of one of the forms.*got \['question'\]; rename"),
        ({**PAIR, "preference": 1.5}, "`preference` of row 0 .* from 0 to 1, got 1.5"),
        ({**PAIR, "margin": float("nan")}, "`margin` of row 0"),
        ({**PAIR, "weight": -1}, "`weight` of row 0 .* at least 0"),
        ({**PAIR, "weight": True}, "`weight` of row 0"),
        ({**PAIR, "chosen": 3}, "`chosen` of row 0"),
        ({**PAIR, "prompt": []}, "the prompt of row 0"),
        ({"chosen": "a b", "rejected": "a c"}, "into a column `prompt`"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "the same up to their last 'Assistant:'"),
        ({"chosen": [USER, YES], "rejected": [YES]}, "begin with the same message"),
        ({"prompt": "x", "completions": ["a"]}, "at least two completions"),
        ({"prompt": "x", "completions": "ab"}, "at least two completions"),
        ({"prompt": "x", "completions": ["a", "b"], "ranks": [1]}, "a rank for each of the 2 completions, got 1"),
        ({"prompt": "x", "completions": ["a", "b"], "ranks": [1, 1.5]}, "`ranks` of row 0 .* whole numbers"),
        ({"prompt": "x", "completions": ["a", "b"], "ranks": None}, "`ranks` of row 0 .* got None"),
        ({"prompt": "x", "completions": ["a", "b"], "labels": [True, False]}, "a row per completion"),
        ({"prompt": "x", "completions": ["a", "b"], "comparisons": []}, "at least one judgement"),
        ({"prompt": "x", "completions": ["a", "b"], "comparisons": [{"i": 0, "j": 2, "z": 1}]}, "two different places i, j below 2"),
        ({"prompt": "x", "completions": ["a", "b"], "comparisons": [{"i": 0, "j": 0, "z": 1}]}, "two different places"),
        ({"prompt": "x", "completions": ["a", "b"], "comparisons": [{"i": 0, "j": 1, "z": 2}]}, "z of 1, 0 or -1"),
        ({"prompt": "x", "completions": ["a", "b"], "comparisons": [{"i": 0, "j": 1}]}, "must hold {i, j, z}"),
        (
            {"prompt": "x", "completions": ["a", "b"], "comparisons": [{"i": 0, "j": 1, "z": 1}, {"i": 1, "j": 0, "z": 1}]},
            "judge a pair of answers once",
        ),
        ({"prompt": "x", "completion": "a", "label": 2}, "`label` of row 0 .* 1 or -1, got 2"),
        ({"text": "a", "label": "good"}, "pass `positive=`"),
        ({"text": "a", "prompt": "x", "label": 1}, "rename `text` to `completion`"),
        ({"first": {**SEGMENT, "end": 4}, "second": SEGMENT, "preference": 1}, "0 <= start < end <= 3"),
        ({"first": {"prompt_ids": [1]}, "second": SEGMENT, "preference": 1}, r"`first` of row 0 .* must be \{prompt_ids"),
        ({"first": SEGMENT, "second": SEGMENT}, "first, second and preference"),
        ({"text": "abc", "spans": [{"category": "wrong", "start": 1, "end": 4}]}, "end <= 3, the characters"),
        ({"text": "abc", "spans": [{"start": 1, "end": 2}]}, "must hold {category, start, end}"),
        ({"text": "abc", "spans": "none"}, "`spans` of row 0 .* must be a list"),
        ({"prompt": "x", "completion": [YES], "spans": []}, "must be a string, in whose characters"),
        ({"prompt": "x", "completion": "a", "comment": " "}, "a string that says something"),
    ],
)
def test_what_is_wrong_is_named_with_the_row_the_rule_and_what_stood_there(row: Any, said: str) -> None:
    with pytest.raises(FeedbackError, match=said):
        read_feedback([row])
    feedback = read_feedback([PAIR, row], on_bad_row="keep_good")
    assert feedback.records == [Comparison("x", "a", "b")]
    assert [(bad.file, bad.line) for bad in feedback.bad_rows] == [(None, 1)]


def test_bad_lines_are_named_with_file_and_line_and_hide_no_other(tmp_path: Path) -> None:
    good = json.dumps(PAIR)
    path = lines(tmp_path / "pairs.jsonl", good, "", '{"prompt": "x", "chosen": ', '{"prompt": "x"}', good, "3")
    with path.open("ab") as file:
        file.write(b'{"prompt": "\xff"}\n' + good.encode())
    with pytest.raises(FeedbackError) as caught:
        read_feedback(path)
    feedback = caught.value.feedback
    assert len(feedback) == 3 and [bad.line for bad in feedback.bad_rows] == [3, 4, 6, 7]
    assert {bad.file for bad in feedback.bad_rows} == {str(path)}
    for line, said in ((3, "is not JSON"), (4, "must have the columns"), (6, "dict of columns"), (7, "is not UTF-8")):
        assert f"line {line} of '{path}'" in str(caught.value) and said in str(caught.value)
    assert "keep_good" in str(caught.value)
    kept = read_feedback(path, on_bad_row="keep_good")
    assert kept == feedback and list(kept) == [Comparison("x", "a", "b")] * 3


def test_a_broken_gzip_file_keeps_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    texts = [json.dumps({**PAIR, "chosen": str(number) * 50}) + "\n" for number in np.random.default_rng(0).integers(0, 10**9, 2000)]
    path.write_bytes(gzip.compress("".join(texts).encode())[:-20_00])
    feedback = read_feedback(path, on_bad_row="keep_good")
    assert 100 < len(feedback) < 2000 and "broken gzip" in feedback.bad_rows[-1].reason


def test_only_bad_rows_are_an_error_either_way() -> None:
    with pytest.raises(FeedbackError, match=r"(?s)1 bad of 1.*None is left") as caught:
        read_feedback([{"question": "x"}], on_bad_row="keep_good")
    assert len(caught.value.feedback.bad_rows) == 1


def test_a_long_list_of_bad_rows_is_cut() -> None:
    with pytest.raises(FeedbackError, match=r"rows 0, 1, 2, 3, 4 and 4 more of `feedback` must have") as caught:
        read_feedback([{"question": "x"}] * 9)
    assert len(caught.value.feedback.bad_rows) == 9


def test_each_fault_is_said_once_with_its_lines_and_short(tmp_path: Path) -> None:
    wrong = [json.dumps({"prompt": "x", "completion": "abc", "errors": [number]}) for number in range(40)]
    path = lines(tmp_path / "spans.jsonl", *wrong, json.dumps({**PAIR, "weight": -1}), json.dumps({**PAIR, "weight": -2}))
    with pytest.raises(FeedbackError) as caught:
        read_feedback(path)
    said = str(caught.value).splitlines()
    assert said[0] == "`feedback` must have good rows only, got 42 bad of 42:"
    assert said[1].startswith(f"  lines 1, 2, 3, 4, 5 and 35 more of '{path}' must have the columns")
    assert said[2].startswith("  `weight` of lines 41, 42 of ") and "got -1" in said[2] and len(said) == 4
    assert all(len(line.replace(str(path), "")) < 350 for line in said)


def test_comments_beside_a_form_that_is_asked_for_stay_comments() -> None:
    comment = {"prompt": "x", "completions": ["a", "b"], "comment": "both poor", "by": "person"}
    feedback = read_feedback([PAIR, comment], form="comparison")
    assert feedback.records[0] == Comparison("x", "a", "b") and feedback.num_comments == 1
    ranking = {"prompt": "x", "completions": ["a", "b"], "comment": "the first is better"}
    assert isinstance(one(ranking, form="ranking"), Ranking)
    assert len(read_feedback([Label("x", "a", True), Comment("x", ("a",), "so so")], form="label")) == 2


def test_sources(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [PAIR, {"prompt": "x", "chosen": "c", "rejected": "d"}]
    wanted = [Comparison("x", "a", "b"), Comparison("x", "c", "d")]
    plain = lines(tmp_path / "a.jsonl", *map(json.dumps, rows))
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with_bom = tmp_path / "c.jsonl"
    with_bom.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    for source in (rows, wanted, plain, str(plain), packed, with_bom, datasets.Dataset.from_list(rows), read_feedback(rows)):
        assert read_feedback(source).records == wanted
    assert read_feedback([plain, packed]).records == wanted * 2
    bad = lines(tmp_path / "d.jsonl", "{}")
    assert [(row.file, row.line) for row in read_feedback([plain, bad], on_bad_row="keep_good").bad_rows] == [(str(bad), 1)]


def test_rows_of_a_data_set_may_have_different_forms() -> None:
    datasets = pytest.importorskip("datasets")
    nothing = dict.fromkeys(("chosen", "rejected", "completion", "label"))
    rows = [{**nothing, **PAIR}, {**nothing, "prompt": "x", "completion": "a", "label": True}]
    first, second = read_feedback(datasets.Dataset.from_list(rows)).records
    assert (first.chosen, first.rejected) == ("a", "b") and second.good is True


def test_rename() -> None:
    row = {"question": "x", "chosen": "a", "rejected": "b"}
    assert one(row, rename={"question": "prompt"}) == Comparison("x", "a", "b")
    with pytest.raises(ValueError, match=r"`rename` must name columns .* got 'prompt_'.* \['question', 'chosen', 'rejected'\]"):
        read_feedback([row], rename={"prompt_": "prompt"})
    with pytest.raises(FeedbackError, match="row 0 of `feedback` has a column 'chosen' already"):
        read_feedback([row], rename={"question": "chosen"})
    swapped = {"prompt": "x", "chosen": "a", "rejected": "b"}
    assert one(swapped, rename={"chosen": "rejected", "rejected": "chosen"}) == Comparison("x", "b", "a")


def test_class_names() -> None:
    rows = [{"text": text, "label": label} for text, label in (("a", "hate"), ("b", "neither"), ("c", "noHate"))]
    assert [record.good for record in read_feedback(rows, positive="noHate")] == [False, False, True]
    assert [record.good for record in read_feedback(rows, positive=["noHate", "neither"])] == [False, True, True]
    with pytest.raises(
        ValueError, match="`positive` must be among the labels of the rows, got 'nohate'; the labels are 'hate', 'neither', 'noHate'"
    ):
        read_feedback(rows, positive="nohate")
    numbers = [{"text": "a", "label": n} for n in (1, 2)]
    assert [record.good for record in read_feedback(numbers, positive=2)] == [False, True]
    assert [record.good for record in read_feedback(numbers, positive="2")] == [False, True], "as it is given on a command line"
    with pytest.raises(ValueError, match="must be among the labels of the rows, got '3'; the labels are 1, 2"):
        read_feedback(numbers, positive="3")


def test_labels_that_may_mean_neither_are_refused() -> None:
    rows = [{"text": "a", "label": label} for label in (1, 0, -1)]
    with pytest.raises(ValueError, match="both 0 and -1"):
        read_feedback(rows)
    assert [record.good for record in read_feedback(rows, positive=1)] == [True, False, False]
    assert [record.good for record in read_feedback(rows[::2])] == [True, False]


def test_a_form_can_be_asked_for() -> None:
    row = {"prompt": "x", "completions": ["a", "b"], "rank": [1, 2], "comparisons": [{"i": 0, "j": 1, "z": 0}]}
    assert isinstance(one(row), Ranking) and isinstance(one(row, form="judgements"), Judgements)
    with pytest.raises(FeedbackError, match="row 0 of `feedback` must have the columns prompt, chosen and rejected"):
        read_feedback([row], form="comparison")
    with pytest.raises(FeedbackError, match="must be a ranking, as `form` says, got a label"):
        read_feedback([Label("x", "a", True)], form="ranking")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"form": "pairs"}, "`form` must be one of 'comparison'"), ({"on_bad_row": "skip"}, "`on_bad_row` must be 'raise' or 'keep_good'")],
)
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_feedback([PAIR], **options)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no.jsonl", "there is none"),
        ("rows.txt", r"must end in \.jsonl, \.json, \.csv, \.parquet"),
        ("rows.json", r"at least one row, got none in .*rows\.json"),
        ("empty.jsonl", r"at least one row, got none in .*empty\.jsonl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "rows.txt").write_text("[]")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=said):
        read_feedback(tmp_path / name)


@pytest.mark.parametrize("source", [[], 3, iter([PAIR])])
def test_sources_that_cannot_be_read(source: Any) -> None:
    with pytest.raises(ValueError, match="`feedback` must"):
        read_feedback(source)


def test_nothing_is_written_unless_all_can_be(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pair = Comparison("x", "a", "b")
    write_feedback(path, [pair])
    for bad in (Comparison("x", "a", "b", columns={"when": object()}), Comparison("x", "a", "b", columns={"score": float("nan")})):
        with pytest.raises(ValueError, match="record 1 of `records` cannot be written"):
            write_feedback(path, [pair, bad])
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        write_feedback(tmp_path / "pairs.json", [pair])
    assert read_feedback(path).records == [pair]
    write_feedback(path, [pair, pair], append=True)
    assert read_feedback(path).records == [pair] * 3
    write_feedback(tmp_path / "pairs.jsonl.gz", [pair])
    write_feedback(tmp_path / "pairs.jsonl.gz", [pair], append=True)
    assert read_feedback(tmp_path / "pairs.jsonl.gz").records == [pair] * 2


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (Comparison("x", "a", "b", columns={"chosen": "c"}), "must not be called chosen"),
        (Label("x", "a", True, columns={"form": "label"}), "must not be called form"),
        (Label("x", "a", True, columns={"form": "mine", "spans": []}), "must not have a `form`"),
        ("text", "`record` must be one of Comparison"),
    ],
)
def test_columns_that_would_be_read_as_something_else(tmp_path: Path, record: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write_feedback(tmp_path / "a.jsonl", [record])


KIND = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    ("prompt", "beginning"),
    [("hi", [USER]), (" hi\n", [USER]), ("hi", [KIND, USER]), ([USER], [USER]), ([USER], [KIND, USER]), ("hi", [USER, YES, USER])],
)
def test_answers_may_repeat_their_prompt(prompt: Any, beginning: Any) -> None:
    pair = {"prompt": prompt, "chosen": [*beginning, YES], "rejected": [*beginning, NO]}
    assert read_feedback([pair]).records == [Comparison(beginning, [YES], [NO])]
    ranking = {"prompt": prompt, "completions": [[*beginning, YES], [*beginning, NO]], "ranks": [1, 2]}
    assert read_feedback([ranking]).records == [Ranking(beginning, ([YES], [NO]), (1, 2))]
    label = {"prompt": prompt, "completion": [*beginning, YES], "label": True}
    assert read_feedback([label]).records == [Label(beginning, [YES], True)]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("other", [USER, YES], [USER, NO]),
        ([KIND], [USER, YES], [USER, NO]),
        ("hi", [USER, YES], [KIND, USER, NO]),
        ("hi", [USER, YES], "no"),
        ("hi", [USER, USER], [USER, NO]),
    ],
)
def test_conversations_that_do_not_repeat_their_prompt_are_refused_with_a_cure(prompt: Any, chosen: Any, rejected: Any) -> None:
    with pytest.raises(
        ValueError, match=r"row 0 of `feedback`.*(leave the prompt out of them|like the other answers|one assistant message)"
    ):
        read_feedback([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "x", "chosen": None, "rejected": "y"}, "row 0 .* must have a value in each of the columns .*`chosen` holds none"),
        ({"prompt": None, "chosen": "x", "rejected": None}, "texts without a prompt|`prompt` and `rejected` holds none"),
        ({"prompt": "x", "completion": None, "label": True}, "`completion` holds none"),
        ({"prompt": "x", "completion": "y", "label": None}, "`label` holds none"),
    ],
)
def test_a_value_that_is_missing_is_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_feedback([row])


def test_labels_and_numbers_may_be_texts() -> None:
    texts = ["true", "False", "1", "0", "-1", " 1.0"]
    labels = read_feedback([{"prompt": "x", "completion": "y", "label": text} for text in ("true", "False", "1", " 1.0")])
    assert [label.good for label in labels] == [True, False, True, True]
    assert [verdict_of(text, "row") for text in texts] == [True, False, True, False, False, True]
    with pytest.raises(ValueError, match=r"got 'good'\. Where labels are names of classes, pass `positive=` .*read_feedback"):
        read_feedback([{"prompt": "x", "completion": "y", "label": "good"}])
    with pytest.raises(ValueError, match="both 0 and -1"):
        read_feedback([{"prompt": "x", "completion": "y", "label": text} for text in ("0", "-1")])
    with pytest.raises(ValueError, match="`weight` of row 0"):
        read_feedback([{"prompt": "x", "completion": "y", "label": 1, "weight": "much"}])
