"""Judges: functions that say which of two answers is better, how good one is, or what a comment means.

    PairJudge      judge(prompt, first, second) -> "first", "second", "tie", or P(first ≻ second)
    TextJudge      judge(prompt, completion) -> True or False (good or bad), or a number (a score)
    CommentJudge   judge(comment) -> a record of another form

A model behind an API, a rule, a person at a terminal: anything that can be called. `swapped` asks a judge of pairs in both orders, which
cancels a liking for the first place (Zheng et al. 2023, arXiv:2306.05685, §3.3).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from textgym.feedback.columns import finite_number, shown
from textgym.feedback.records import Comment, Comparison, Label, Ranking, Record, Text
from textgym.feedback.rows import is_record
from textgym.rewards.texts import score_texts

Verdict: TypeAlias = Literal["first", "second", "tie"]
PairJudge: TypeAlias = Callable[[Any, Any, Any], Verdict | float]
TextJudge: TypeAlias = Callable[[Any, Any], bool | float]

_PREFERENCES = {"first": 1.0, "second": 0.0, "tie": 0.5}


@runtime_checkable
class CommentJudge(Protocol):
    """Turns what somebody said in words into feedback of another form."""

    def __call__(self, comment: Comment, /) -> Record | Sequence[Record]:
        """Returns one record or several, none of them a `Comment`."""
        ...


def ask(judge: PairJudge, prompt: Text, first: Text, second: Text, where: str) -> float:
    """Returns P(first ≻ second) as a judge says it: 1, 0 or ½ for its verdicts, or its own probability.

    Args:
        judge: the judge.
        prompt: x.
        first: an answer.
        second: another.
        where: what error messages call the row.

    Raises:
        ValueError: the judge answered something else.
    """
    verdict: Any = judge(prompt, first, second)
    preference = _PREFERENCES.get(verdict) if isinstance(verdict, str) else finite_number(verdict)
    if preference is None or not 0 <= preference <= 1:
        raise ValueError(f"the judge must return 'first', 'second', 'tie' or a probability from 0 to 1, got {shown(verdict)} for {where}.")
    return preference


def ask_twice(judge: PairJudge, prompt: Text, first: Text, second: Text, where: str) -> tuple[float, float]:
    """Returns P(first ≻ second) and P(second ≻ first) as a judge says them when it is asked in both orders; see `ask`."""
    return ask(judge, prompt, first, second, where), ask(judge, prompt, second, first, f"{where}, order swapped")


def swapped(judge: PairJudge) -> PairJudge:
    """Returns a judge that asks `judge` in both orders: P = ½ [P(first ≻ second) + 1 − P(second ≻ first)].

    A judge of verdicts that contradicts itself says a tie so.
    """
    return lambda prompt, first, second: _mean_of_both(judge, prompt, first, second, "a pair")


def reward_judge(reward: Any, *, temperature: float | None = None, tie_margin: float = 0.0) -> PairJudge:
    """Returns a judge that prefers what a reward scores higher.

    Args:
        reward: anything that `RewardSet.build` takes; it scores one pair at a time. For many at once see `SyntheticAnnotator`.
        temperature: T, in reward: it gives P = σ((r − r')/T) instead of a verdict.
        tie_margin: differences of at most this much, in reward, are ties.
    """
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be a number above 0, or None for verdicts, got {temperature!r}.")
    if not 0 <= tie_margin < math.inf:
        raise ValueError(f"`tie_margin` must be a number of at least 0, got {tie_margin!r}.")

    def judge(prompt: Text, first: Text, second: Text) -> Verdict | float:
        scores = score_texts(reward, [prompt, prompt], [first, second])
        difference = float(scores[0] - scores[1])
        if abs(difference) <= tie_margin:
            return "tie"
        if temperature is None:
            return "first" if difference > 0 else "second"
        return 0.5 * (1 + math.tanh(difference / temperature / 2))  # σ, without overflow

    return judge


def judge_pairs(
    judge: PairJudge, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text], *, swap: bool = True
) -> list[Comparison]:
    """Returns what a judge says of N pairs, the better answer as `chosen`.

    Args:
        judge: asked once a pair, or twice.
        prompts: N prompts.
        first: N answers.
        second: N others.
        swap: ask in both orders, see `swapped`.

    Raises:
        ValueError: the judge answered something that is no verdict; the row is named.
    """
    if not len(prompts) == len(first) == len(second):
        raise ValueError(f"`prompts`, `first` and `second` must be as many, got {len(prompts)}, {len(first)} and {len(second)}.")
    asked = _mean_of_both if swap else ask
    return [
        comparison(prompt, one, other, asked(judge, prompt, one, other, f"row {row}"))
        for row, (prompt, one, other) in enumerate(zip(prompts, first, second, strict=True))
    ]


def judge_texts(judge: TextJudge, prompts: Sequence[Text], completions: Sequence[Text], *, threshold: float = 0.0) -> list[Label]:
    """Returns what a judge says of N texts one by one.

    Args:
        judge: asked once a text.
        prompts: N prompts.
        completions: N texts.
        threshold: a judge's score above it means good.

    Raises:
        ValueError: the judge answered something that is neither True, False nor a finite number; the row is named.
    """
    scores = _scores(judge, prompts, completions)
    return [
        Label(prompt, text, score if isinstance(score, bool) else score > threshold)
        for prompt, text, score in zip(prompts, completions, scores, strict=True)
    ]


def judge_rankings(judge: TextJudge, prompts: Sequence[Text], completions: Sequence[Sequence[Text]]) -> list[Ranking]:
    """Returns the completions of each prompt ranked by a judge's scores; equal scores are ties.

    Args:
        judge: asked once a completion.
        prompts: N prompts.
        completions: K ≥ 2 completions of each.

    Raises:
        ValueError: the judge answered something that is neither True, False nor a finite number; the row is named.
    """
    found = []
    for row, (prompt, answers) in enumerate(zip(prompts, completions, strict=True)):
        if len(answers) < 2:
            raise ValueError(f"`completions` must hold at least 2 of each prompt, got {len(answers)} in row {row}.")
        scores = [float(score) for score in _scores(judge, [prompt] * len(answers), answers, f"row {row}, completion {{}}")]
        levels = sorted(set(scores), reverse=True)
        found.append(Ranking(prompt, tuple(answers), tuple(levels.index(score) + 1 for score in scores)))
    return found


def comments_to_records(comments: Iterable[Comment], judge: CommentJudge) -> list[Record]:
    """Returns what a judge makes of comments; the records keep the comment's words in the column `comment`.

    Raises:
        ValueError: the judge returned something that is no record, or a comment again; the row is named.
    """
    found: list[Record] = []
    for row, comment in enumerate(comments):
        answer: Any = judge(comment)
        for record in answer if isinstance(answer, list | tuple) else [answer]:
            if not is_record(record) or isinstance(record, Comment):
                raise ValueError(f"the judge of comments must return a record of another form, got {shown(record)} for row {row}.")
            found.append(_with_words(record, comment.comment))
    return found


def comparison(prompt: Text, first: Text, second: Text, preference: float) -> Comparison:
    """Returns the pair with P(first ≻ second) = `preference`, the better one as chosen; of a tie the first."""
    if preference >= 0.5:
        return Comparison(prompt, first, second, preference)
    return Comparison(prompt, second, first, 1 - preference)


def _mean_of_both(judge: PairJudge, prompt: Text, first: Text, second: Text, where: str) -> float:
    forth, back = ask_twice(judge, prompt, first, second, where)
    return (forth + 1 - back) / 2


def _scores(judge: TextJudge, prompts: Sequence[Text], completions: Sequence[Text], where: str = "row {}") -> list[bool | float]:
    if len(prompts) != len(completions):
        raise ValueError(f"`prompts` must hold one prompt per completion: {len(completions)} completions, {len(prompts)} prompts.")
    found: list[bool | float] = []
    for row, (prompt, text) in enumerate(zip(prompts, completions, strict=True)):
        answer: Any = judge(prompt, text)
        score = bool(answer) if isinstance(answer, bool | np.bool_) else finite_number(answer)
        if score is None:
            raise ValueError(f"the judge must return True, False or a finite number, got {shown(answer)} for {where.format(row)}.")
        found.append(score)
    return found


def _with_words(record: Record, words: str) -> Record:
    return type(record)(**{**record.__dict__, "columns": {"comment": words, **record.columns}})
