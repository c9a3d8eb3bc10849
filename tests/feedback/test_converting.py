"""Converters, on cases worked out by hand, and their laws on random ones."""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgym.feedback import (
    Comment,
    Comparison,
    Judgement,
    Judgements,
    Label,
    Marking,
    Ranking,
    Span,
    comparison_to_labels,
    judgements_to_comparisons,
    judgements_to_ranking,
    labels_to_comparisons,
    marking_to_label,
    marking_to_segment_labels,
    ranking_to_comparisons,
    ranking_to_judgements,
    to_comparisons,
    to_demonstrations,
    to_labels,
)
from textgym.rewards import TokenCount

SOURCE = {"weight": 2.0, "columns": {"by": "me"}}
B_C_D_A = Ranking("x", ("a", "b", "c", "d"), (3, 1, 2, 2), **SOURCE)  # b > c = d > a
TEXT = "The sea is wet. It is green, and it is dry."
MARKED = Marking("x", TEXT, (Span("wrong", 22, 27), Span("wrong", 37, 42), Span("dull", 0, 3)), **SOURCE)


def judged(count: int, *outcomes: tuple[int, int, int]) -> Judgements:
    return Judgements("x", tuple("abcdef"[:count]), tuple(Judgement(*one) for one in outcomes))


def test_a_ranking_as_pairs_without_its_ties() -> None:
    found = [(one.chosen, one.rejected) for one in ranking_to_comparisons(B_C_D_A)]
    assert found == [("b", "a"), ("c", "a"), ("d", "a"), ("b", "c"), ("b", "d")]
    assert ranking_to_comparisons(B_C_D_A)[0] == Comparison("x", "b", "a", **SOURCE)
    assert ranking_to_comparisons(Ranking("x", ("a", "b"), (1, 1))) == []


def test_a_ranking_as_judgements() -> None:
    found = ranking_to_judgements(B_C_D_A)
    assert [(one.first, one.second, one.z) for one in found.judgements] == [
        (0, 1, -1),
        (0, 2, -1),
        (0, 3, -1),
        (1, 2, 1),
        (1, 3, 1),
        (2, 3, 0),
    ]
    assert (found.weight, found.columns) == (2.0, {"by": "me"})


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_judgements_of_a_ranking_give_its_order_back(ranks: list[int]) -> None:
    found = judgements_to_ranking(ranking_to_judgements(Ranking("x", tuple("abcdef"[: len(ranks)]), tuple(ranks))))
    levels = sorted(set(ranks))
    assert list(found.ranks) == [levels.index(rank) + 1 for rank in ranks]


def test_few_judgements_are_enough_where_they_decide_the_order() -> None:
    assert judgements_to_ranking(judged(3, (0, 1, -1), (2, 0, -1))).ranks == (2, 1, 3)
    assert judgements_to_ranking(judged(4, (0, 1, 0), (1, 2, 0), (3, 2, 1))).ranks == (2, 2, 2, 1)


@pytest.mark.parametrize(
    ("judgements", "said"),
    [
        (judged(3, (0, 1, 1), (1, 2, 1), (0, 2, -1)), r"completions \[0, 1, 2\] beat or tie each other in a circle"),
        (judged(3, (0, 1, 1), (1, 2, 0), (0, 2, 0)), r"in a circle"),
        (judged(4, (3, 0, 1), (0, 1, 1), (1, 2, 1), (0, 2, 0), (3, 1, 1), (3, 2, 1)), r"completions \[0, 1, 2\] beat or tie"),
        (judged(3, (0, 1, 1), (0, 2, 1)), r"which of completions \[1, 2\] is better"),
        (judged(4, (0, 1, 0), (2, 3, 0)), r"which of completions \[0, 2\] is better"),
    ],
)
def test_judgements_that_make_no_ranking_or_several_are_refused(judgements: Judgements, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        judgements_to_ranking(judgements)


def test_judgements_as_pairs() -> None:
    found = judgements_to_comparisons(judged(3, (0, 1, 1), (1, 2, 0), (0, 2, -1)))
    assert found == [Comparison("x", "a", "b"), Comparison("x", "c", "a")]


def test_a_pair_as_labels() -> None:
    assert comparison_to_labels(Comparison("x", "a", "b", **SOURCE)) == [Label("x", "a", True, **SOURCE), Label("x", "b", False, **SOURCE)]
    assert comparison_to_labels(Comparison("x", "a", "b", preference=0.2)) == [Label("x", "b", True), Label("x", "a", False)]
    assert comparison_to_labels(Comparison("x", "a", "b", preference=0.5)) == []


def test_labels_as_pairs_of_the_same_prompt() -> None:
    chat = [{"role": "user", "content": "x"}]
    labels = [
        Label("x", "a", True, 2.0, {"by": "me", "n": 1}),
        Label(chat, "b", False),
        Label("x", "c", False, 3.0, {"by": "me", "n": 2}),
        Label("x", "d", False),
        Label(chat, "e", True),
        Label("y", "f", True),
    ]
    assert labels_to_comparisons(labels) == [
        Comparison("x", "a", "c", weight=6.0, columns={"by": "me"}),
        Comparison("x", "a", "d", weight=2.0),
        Comparison(chat, "e", "b"),
    ]


def test_a_marking_as_a_label() -> None:
    assert marking_to_label(MARKED) == Label("x", TEXT, False, **SOURCE)
    assert marking_to_label(MARKED, ["rude"]).good and not marking_to_label(MARKED, ["dull"]).good
    with pytest.raises(ValueError, match="put it into a list"):
        marking_to_label(MARKED, "dull")


@pytest.mark.parametrize(
    ("segmenter", "categories", "wanted"),
    [
        ("sentence", None, [("The sea is wet.", False), (" It is green, and it is dry.", False)]),
        ("sentence", ["wrong"], [("The sea is wet.", True), (" It is green, and it is dry.", False)]),
        ("sub_sentence", ["wrong"], [("The sea is wet.", True), (" It is green,", False), (" and it is dry.", False)]),
        ("sub_sentence", ["dull"], [("The sea is wet.", False), (" It is green,", True), (" and it is dry.", True)]),
        ("whole", ["wrong"], [(TEXT, False)]),
        (TokenCount(8), ["wrong"], [("The sea is wet. It is green, and", False), (" it is dry.", False)]),
    ],
)
def test_a_marking_as_labels_of_its_segments(segmenter: Any, categories: Any, wanted: list[tuple[str, bool]]) -> None:
    found = marking_to_segment_labels(MARKED, segmenter, categories)
    assert [(one.columns["segment"], one.good) for one in found] == wanted
    assert [one.completion for one in found] == ["".join(text for text, _ in wanted[: place + 1]) for place in range(len(wanted))]
    assert [one.columns["segment_index"] for one in found] == list(range(len(wanted)))
    assert {(one.prompt, one.weight, one.columns["by"]) for one in found} == {("x", 2.0, "me")}


def test_where_spans_and_segments_meet() -> None:
    def verdicts(*spans: tuple[int, int]) -> list[bool]:
        marking = Marking("", "One. Two.", tuple(Span("wrong", *span) for span in spans))
        return [one.good for one in marking_to_segment_labels(marking, "sentence")]

    assert verdicts((0, 4)) == [False, True]
    assert verdicts((0, 5)) == [False, True], "the space between is no part of the second sentence"
    assert verdicts((0, 6)) == verdicts((3, 6)) == [False, False]
    assert verdicts((5, 6)) == verdicts((8, 9)) == [True, False]


def test_white_space_at_the_end_and_texts_of_nothing_else() -> None:
    def segments(text: str) -> list[str]:
        return [one.columns["segment"] for one in marking_to_segment_labels(Marking("", text, ()), "sentence")]

    assert segments("One. Two. \n") == ["One.", " Two. \n"]
    assert segments("") == [""] and segments("  ") == ["  "]


def test_pieces_of_a_tokenizer() -> None:
    marking = Marking("", "a.b c", (Span("wrong", 2, 3),))
    assert [one.columns["segment"] for one in marking_to_segment_labels(marking, "sentence")] == ["a.b c"]
    found = marking_to_segment_labels(marking, "sentence", pieces=["a", ".", "b", " c"])
    assert [(one.columns["segment"], one.good) for one in found] == [("a.", True), ("b c", False)]
    with pytest.raises(ValueError, match="make up the completion"):
        marking_to_segment_labels(marking, pieces=["a", "b"])
    with pytest.raises(ValueError, match=r"`segmenter` must be one of \['sentence'"):
        marking_to_segment_labels(marking, "word")


def test_mixtures() -> None:
    pair, good, bad = Comparison("x", "a", "b"), Label("y", "c", True), Label("y", "d", False)
    found = to_comparisons([good, pair, Ranking("x", ("e", "f"), (2, 1)), bad, judged(2, (0, 1, 1))])
    assert [(one.chosen, one.rejected) for one in found] == [("a", "b"), ("f", "e"), ("a", "b"), ("c", "d")]
    assert [(one.completion, one.good) for one in to_labels([good, pair, MARKED])] == [
        ("c", True),
        ("a", True),
        ("b", False),
        (TEXT, False),
    ]
    rows = to_demonstrations([good, bad, pair, Ranking("x", ("e", "f", "g"), (3, 0, 0)), MARKED, Marking("x", "h", (), 2.0)])
    assert [row["completion"] for row in rows] == ["c", "a", "f", "g", "h"] and rows[-1] == {
        "prompt": "x",
        "completion": "h",
        "weight": 2.0,
    }


@pytest.mark.parametrize(
    ("convert", "record", "said"),
    [
        (to_comparisons, MARKED, "record 1 .* to comparisons: it is a marking"),
        (to_labels, B_C_D_A, "record 1 .* to labels: it is a ranking"),
        (to_demonstrations, judged(2, (0, 1, 1)), "record 1 .* to demonstrations: it is a judgements"),
    ],
)
def test_what_cannot_be_converted_is_named(convert: Any, record: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        convert([Label("x", "a", True), record])


def test_comments_are_no_obstacle() -> None:
    records = [Comparison("x", "a", "b"), Comment("x", ("a", "b"), "both poor")]
    assert to_comparisons(records) == records[:1]
    assert [label.good for label in to_labels(records)] == [True, False]
    assert [row["completion"] for row in to_demonstrations(records)] == ["a"]


def test_every_pair_is_judged_once() -> None:
    found = ranking_to_judgements(Ranking("x", tuple("abcdef"), tuple(range(6)))).judgements
    assert [(one.first, one.second) for one in found] == list(combinations(range(6), 2))
