"""What is written and read again is equal: records of every form, with columns that look like those of other forms."""

from itertools import combinations
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    read_feedback,
    write_feedback,
)
from textgym.feedback.rows import FORMS, _reserved, form_of

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": words})
prompts = words | st.lists(message, min_size=1, max_size=3)
answers = words | st.builds(lambda text: [{"role": "assistant", "content": text}], words)
chances = st.floats(0, 1)
weights = st.floats(0, 1e6)
json_values = st.none() | st.booleans() | st.integers() | words | st.lists(st.integers(), max_size=2)
OTHERS = [
    "source",
    "rank",
    "ranks",
    "spans",
    "label",
    "chosen",
    "rejected",
    "comment",
    "text",
    "completion",
    "completions",
    "comparisons",
    "ß",
]
ids = st.lists(st.integers(0, 50), min_size=1, max_size=5).map(tuple)


def columns(form: str) -> Any:
    return st.dictionaries(st.sampled_from([name for name in OTHERS if name not in _reserved(form)]), json_values, max_size=4)


@st.composite
def segments(draw: Any) -> Segment:
    completion = draw(ids)
    end = draw(st.integers(1, len(completion)))
    return Segment(draw(ids), completion, draw(st.integers(0, end - 1)), end)


@st.composite
def rankings(draw: Any) -> Ranking:
    texts = tuple(draw(st.lists(answers, min_size=2, max_size=4)))
    ranks = tuple(draw(st.lists(st.integers(1, 5), min_size=len(texts), max_size=len(texts))))
    return Ranking(draw(prompts), texts, ranks, draw(weights), draw(columns("ranking")))


@st.composite
def judgements(draw: Any) -> Judgements:
    texts = tuple(draw(st.lists(answers, min_size=2, max_size=4)))
    pairs = draw(st.lists(st.sampled_from(list(combinations(range(len(texts)), 2))), min_size=1, unique=True))
    found = tuple(Judgement(*(pair if draw(st.booleans()) else pair[::-1]), draw(st.sampled_from([-1, 0, 1]))) for pair in pairs)
    return Judgements(draw(prompts), texts, found, draw(weights), draw(columns("judgements")))


@st.composite
def markings(draw: Any) -> Marking:
    text = draw(words)
    places = st.lists(st.integers(0, len(text)), min_size=2, max_size=2, unique=True).map(sorted)
    spans = draw(st.lists(st.tuples(st.sampled_from(["wrong", "dull"]), places), max_size=3)) if text else []
    return Marking(draw(prompts), text, tuple(Span(name, *place) for name, place in spans), draw(weights), draw(columns("marking")))


records: Any = st.one_of(
    st.builds(Comparison, prompts, answers, answers, chances, st.floats(-1e6, 1e6), weights, columns("comparison")),
    rankings(),
    judgements(),
    st.builds(Label, prompts, answers, st.booleans(), weights, columns("label")),
    st.builds(SegmentPair, segments(), segments(), chances, weights, columns("segment_pair")),
    markings(),
    st.builds(
        Comment,
        prompts,
        st.lists(answers, min_size=1, max_size=3).map(tuple),
        words.filter(str.strip),
        weights,
        columns("comment"),
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(records, min_size=1, max_size=5))
def test_written_and_read_again(tmp_path: Path, found: list[Record]) -> None:
    path = tmp_path / "feedback.jsonl"
    write_feedback(path, found)
    assert read_feedback(path).records == found


def test_every_form_is_tried() -> None:
    assert {form_of(one) for one in EXAMPLES} == set(FORMS)


EXAMPLES = [
    Comparison("x", "a", "b"),
    Ranking("x", ("a", "b"), (1, 1)),
    Judgements("x", ("a", "b"), (Judgement(0, 1, 0),)),
    Label("x", "a", False),
    SegmentPair(Segment((1,), (2,), 0, 1), Segment((1,), (3,), 0, 1), 0.5),
    Marking("x", "a", ()),
    Comment("x", ("a",), "good"),
]


def test_the_form_is_written_only_where_the_columns_leave_it_open(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    write_feedback(path, EXAMPLES)
    assert '"form"' not in path.read_text()
    write_feedback(path, [Label("x", "a", True, columns={"spans": []})])
    assert '"form": "label"' in path.read_text()
