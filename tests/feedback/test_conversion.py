"""Conversions of whole files: what comes out, and that nothing is left out without being counted."""

from typing import Any

import pytest

from textgym.feedback import (
    Comment,
    Comparison,
    Judgement,
    Judgements,
    Label,
    Marking,
    Ranking,
    Record,
    Segment,
    SegmentPair,
    Span,
    convert,
    read_feedback,
)
from textgym.feedback.conversion import TARGETS

PAIR = Comparison("x", "a", "b", columns={"id": 7})
TIE = Comparison("x", "a", "b", preference=0.5)
SAME = Comparison("x", "a", "a")
RANKING = Ranking("y", ("c", "d", "e"), (1, 2, 2))
CIRCLE = Judgements("y", ("c", "d", "e"), (Judgement(0, 1, 1), Judgement(1, 2, 1), Judgement(2, 0, 1)))
GOOD, BAD, ALONE = Label("z", "f", True), Label("z", "g", False), Label("w", "h", True)
FAULTY = Marking("v", "one two", (Span("wrong", 0, 3),))
COMMENT = Comment("x", ("a", "b"), "both poor")
SEGMENTS = SegmentPair(Segment((1,), (2, 3), 0, 1), Segment((1,), (2, 3), 1, 2), 1.0)
ALL: list[Record] = [PAIR, TIE, SAME, RANKING, CIRCLE, GOOD, BAD, ALONE, FAULTY, COMMENT, SEGMENTS]


def test_pairs() -> None:
    found = convert(ALL, "pairs")
    assert [(row["chosen"], row["rejected"]) for row in found.rows] == [
        *[("a", "b"), ("c", "d"), ("c", "e"), ("c", "d"), ("d", "e"), ("e", "c"), ("f", "g")]
    ]
    assert found.rows[0] == {"prompt": "x", "chosen": "a", "rejected": "b", "id": 7}
    assert found.left_out == {
        "ties": 2,
        "pairs of equal texts": 1,
        "comments, which a judge must read first": 1,
        "pairs of segments, which holds tokens instead of texts": 1,
        "labels without an opposite verdict on the same prompt": 2,
    }
    kept = convert(ALL, "pairs", keep_ties=True)
    assert [row for row in kept.rows if row.get("preference") == 0.5] == [
        {"prompt": "x", "chosen": "a", "rejected": "b", "preference": 0.5},
        {"prompt": "y", "chosen": "d", "rejected": "e", "preference": 0.5},
    ]
    assert "ties" not in kept.left_out


def test_labels() -> None:
    found = convert(ALL, "labels")
    assert [(row["completion"], row["label"]) for row in found.rows] == [
        *[("a", True), ("b", False), ("f", True), ("g", False), ("h", True), ("one two", False)]
    ]
    assert [count for reason, count in found.left_out.items() if "middle" in reason] == [1, 1]
    assert found.left_out["ties"] == found.left_out["pairs of equal texts"] == 1
    assert convert([FAULTY], "labels", categories=["rude"]).rows[0]["label"] is True
    both = convert([PAIR, Comparison("x", "b", "c")], "labels")
    assert both.notes == ["1 texts are labelled both good and bad: they won against one text and lost against another."]


def test_rankings_judgements_segments_demonstrations() -> None:
    assert [row["ranks"] for row in convert(ALL, "rankings").rows] == [[1, 2], [1, 1], [1, 2], [1, 2, 2]]
    assert convert(ALL, "rankings").left_out["judgements that make no one ranking"] == 1
    soft = convert([PAIR, Comparison("x", "a", "b", preference=0.7)], "judgements")
    assert soft.rows[0]["comparisons"] == [{"i": 0, "j": 1, "z": 1}] and sum(soft.left_out.values()) == 1
    segments = convert([Marking("v", "One two. Three.", (Span("wrong", 0, 3),)), PAIR], "segment-labels", segmenter="sentence")
    assert [(row["completion"], row["label"]) for row in segments.rows] == [("One two.", False), ("One two. Three.", True)]
    assert segments.left_out == {"pairs: only marked texts have segments": 1}
    shown = convert(ALL, "demonstrations")
    assert [row["completion"] for row in shown.rows] == ["a", "a", "c", "f", "h"]  # of the pair of equal texts it is the better one too


@pytest.mark.parametrize("to", TARGETS)
def test_every_record_gives_something_or_is_counted_and_what_comes_out_can_be_read(to: str) -> None:
    for record in ALL:
        found = convert([record], to)
        assert found.rows or found.left_out, record
        if found.rows and to != "demonstrations":
            assert len(read_feedback(found.rows)) == len(found.rows)


def test_columns_with_the_names_of_the_new_form_are_left_out_and_counted() -> None:
    odd: dict[str, Any] = {"label": 3, "form": "long", "spans": [], "id": 1}
    found = convert([Comparison("x", "a", "b", columns=odd)], "labels")
    assert found.left_out == {f"columns called {name}, a name that the new form has for itself": 2 for name in ("label", "form")}
    assert found.rows[0] == {"form": "label", "prompt": "x", "completion": "a", "label": True, "spans": [], "id": 1}
    assert convert([PAIR, COMMENT], "same").rows == [
        {"prompt": "x", "chosen": "a", "rejected": "b", "id": 7},
        {"prompt": "x", "completions": ["a", "b"], "comment": "both poor"},
    ]


def test_many_pairs_of_few_labels_are_said() -> None:
    labels = [Label("", str(number), number % 2 == 0) for number in range(40)]
    assert convert(labels, "pairs").notes == ["400 pairs come of 40 labels: each good text stands against each bad one of its prompt."]


def test_an_unknown_target() -> None:
    with pytest.raises(ValueError, match=r"`to` must be one of 'pairs', 'labels', .* got 'kto'"):
        convert([PAIR], "kto")
