"""Judges of pairs, texts and comments: what they may answer, the order they are asked in, and a reward as a judge."""

import math
from typing import Any

import numpy as np
import pytest

from textgym.feedback import (
    Comment,
    CommentJudge,
    Comparison,
    Label,
    Ranking,
    comments_to_records,
    judge_pairs,
    judge_rankings,
    judge_texts,
    read_feedback,
    reward_judge,
    swapped,
    write_feedback,
)


def longer(prompt: str, first: str, second: str) -> str:
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


def likes_the_first_place(prompt: str, first: str, second: str) -> float:
    """P of a judge of lengths, with a bonus for the first place."""
    return 1 / (1 + math.exp(-(len(first) - len(second) + 2)))


def test_verdicts_become_records_with_the_better_one_chosen() -> None:
    found = judge_pairs(longer, ["x", "y", "z"], ["a", "bb", "c"], ["aa", "b", "d"])
    assert found == [Comparison("x", "aa", "a"), Comparison("y", "bb", "b"), Comparison("z", "c", "d", 0.5)]


def test_probabilities_are_kept() -> None:
    (found,) = judge_pairs(lambda prompt, first, second: 0.25, ["x"], ["a"], ["b"], swap=False)
    assert found == Comparison("x", "b", "a", 0.75)
    (found,) = judge_pairs(lambda prompt, first, second: np.float32(1), ["x"], ["a"], ["b"], swap=False)
    assert found == Comparison("x", "a", "b")


def test_asking_in_both_orders_cancels_a_liking_for_a_place() -> None:
    assert [one.preference for one in judge_pairs(lambda *_: "first", ["x"], ["a"], ["b"])] == [0.5]
    both = swapped(likes_the_first_place)
    assert likes_the_first_place("x", "a", "b") > 0.8 and both("x", "a", "b") == pytest.approx(0.5)
    for first, second in (("aa", "b"), ("a", "bbbb")):
        assert both("x", first, second) == pytest.approx(1 - both("x", second, first))
        assert (both("x", first, second) > 0.5) == (len(first) > len(second))
    assert judge_pairs(likes_the_first_place, ["x"], ["aa"], ["b"])[0].preference == pytest.approx(both("x", "aa", "b"))


def test_both_orders_are_asked() -> None:
    asked = []

    def judge(prompt: str, first: str, second: str) -> str:
        asked.append((prompt, first, second))
        return longer(prompt, first, second)

    judge_pairs(judge, ["x"], ["a"], ["bb"])
    judge_pairs(judge, ["y"], ["a"], ["bb"], swap=False)
    assert asked == [("x", "a", "bb"), ("x", "bb", "a"), ("y", "a", "bb")]


@pytest.mark.parametrize("answer", ["A", None, True, 1.5, -0.1, float("nan"), [0.5]])
def test_malformed_answers_about_pairs_are_errors_that_name_the_row(answer: Any) -> None:
    def judge(prompt: str, first: str, second: str) -> Any:
        return answer if first == "bad" else "tie"

    with pytest.raises(ValueError, match=r"must return 'first', 'second', 'tie' or a probability .* for row 1\."):
        judge_pairs(judge, ["x", "y"], ["a", "bad"], ["b", "c"])
    with pytest.raises(ValueError, match=r"for row 1, order swapped\."):
        judge_pairs(judge, ["x", "y"], ["a", "b"], ["b", "bad"])
    with pytest.raises(ValueError, match="must be as many, got 2, 1 and 1"):
        judge_pairs(longer, ["x", "y"], ["a"], ["b"])


def test_a_reward_as_a_judge() -> None:
    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    judge = reward_judge(length)
    assert [judge("x", "aa", other) for other in ("b", "bb", "bbb")] == ["first", "tie", "second"]
    assert [reward_judge(length, tie_margin=1)("x", "aa", other) for other in ("b", "bbb", "bbbb")] == ["tie", "tie", "second"]
    soft = reward_judge(length, temperature=2.0)
    assert soft("x", "aaa", "b") == pytest.approx(1 / (1 + math.exp(-1)))
    assert soft("x", "a" * 10_000, "b") == 1 and soft("x", "a", "b" * 10_000) == 0
    with pytest.raises(ValueError, match="`temperature` must be a number above 0"):
        reward_judge(length, temperature=0)
    with pytest.raises(ValueError, match="`tie_margin` must be"):
        reward_judge(length, tie_margin=-1)


def test_texts_one_by_one() -> None:
    assert judge_texts(lambda prompt, text: text == "a", ["x", "y"], ["a", "b"]) == [Label("x", "a", True), Label("y", "b", False)]
    scores = [label.good for label in judge_texts(lambda prompt, text: len(text), ["x"] * 3, ["a", "bb", "ccc"], threshold=2)]
    assert scores == [False, False, True]
    for answer in ("good", None, float("inf")):
        with pytest.raises(ValueError, match=r"True, False or a finite number, got .* for row 1"):
            judge_texts(lambda prompt, text, answer=answer: answer if text == "b" else True, ["x", "y"], ["a", "b"])
    with pytest.raises(ValueError, match="one prompt per completion"):
        judge_texts(lambda prompt, text: True, ["x"], ["a", "b"])


def test_scores_make_rankings_with_ties() -> None:
    found = judge_rankings(lambda prompt, text: len(text), ["x", "y"], [["a", "bbb", "cc", "ddd"], ["e", "f"]])
    assert found == [Ranking("x", ("a", "bbb", "cc", "ddd"), (3, 1, 2, 1)), Ranking("y", ("e", "f"), (1, 1))]
    with pytest.raises(ValueError, match="at least 2 of each prompt, got 1 in row 0"):
        judge_rankings(lambda prompt, text: 1, ["x"], [["a"]])
    with pytest.raises(ValueError, match="for row 1, completion 0"):
        judge_rankings(lambda prompt, text: 1 if prompt == "x" else "?", ["x", "y"], [["a", "b"], ["c", "d"]])


def test_words_become_another_form_and_are_kept(tmp_path: Any) -> None:
    comments = [Comment("x", ("a",), "wonderful", columns={"by": "me"}), Comment("y", ("b", "c"), "the second is kinder")]

    def judge(comment: Comment) -> Any:
        if len(comment.completions) == 1:
            return Label(comment.prompt, comment.completions[0], "wonderful" in comment.comment, columns=comment.columns)
        return [Comparison(comment.prompt, comment.completions[1], comment.completions[0])]

    assert isinstance(judge, CommentJudge)
    found = comments_to_records(comments, judge)
    assert found == [
        Label("x", "a", True, columns={"comment": "wonderful", "by": "me"}),
        Comparison("y", "c", "b", columns={"comment": "the second is kinder"}),
    ]
    write_feedback(tmp_path / "a.jsonl", found)
    assert read_feedback(tmp_path / "a.jsonl").records == found


@pytest.mark.parametrize("answer", ["good", None, Comment("x", ("a",), "hm"), [Label("x", "a", True), 3]])
def test_a_judge_of_comments_must_return_records(answer: Any) -> None:
    with pytest.raises(ValueError, match=r"must return a record of another form, got .* for row 0"):
        comments_to_records([Comment("x", ("a",), "good")], lambda comment: answer)
