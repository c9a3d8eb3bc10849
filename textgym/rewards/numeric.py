"""Whether the number, or other mathematical answer, in a completion is the right one: a verifiable reward."""

from decimal import Decimal
from fractions import Fraction
from math import inf
from numbers import Real
from typing import Any

import numpy as np

from textgym.rewards.answers.expressions import as_latex, is_equation, is_expression, sides
from textgym.rewards.answers.finding import find_answer, is_answer
from textgym.rewards.answers.normalising import normalise, plain_characters, same_text
from textgym.rewards.answers.numbers import WrittenNumber, read_number, same_number
from textgym.rewards.episodes import excerpt
from textgym.rewards.math_process import MathProcess, Side
from textgym.rewards.references import ReferenceReward, is_message_list, require_package

_LONGEST_ANSWER = 12  # words of an answer that is compared as text; more of them are an explanation
_LARGEST = 10**1000  # of the parts of a ratio that is compared with an expression


class NumericReward(ReferenceReward):
    r"""Rewards completions whose answer equals the one in a column of the prompt data: 1 where it does, 0 where not.

    The answer of a completion is what it marks as such: its last `\boxed{}` or, if that comes later, what follows its last `#### ` on that
    line (GSM8K's form); without both, what follows "the answer is" or "Answer:"; without that, the whole completion if it is nothing but an
    answer, or its last number or piece of LaTeX. The answer in the column is marked in the same way, or is the whole text.

    Both are read whole or not at all:

    - numbers as they are written (`1,234.50`, `\$72`, `1e-05`, `1.5\times10^{3}`, `3/4`, `1\frac{1}{2}`, `45\%`, `12 apples`) are compared
      as exact fractions. A decimal of at least six places also equals a ratio that it rounds to; a per cent sign on one side only may be
      left out or stand for a hundredth; two different units of measure, or two currencies, are different.
    - other mathematics, in LaTeX with or without dollars, is compared by math-verify: expressions, points, sets, intervals, matrices,
      equations, of which the right side is the value.
    - everything else (`10:31`, `3:2`, `2024-01-05`, `1.2.3`, `3 to 5`, words) is compared as text, white space and case apart.

    math-verify runs in a process of its own that is killed when a row takes too long; the row then gets 0. So it works in threads and in
    the workers of vector environments, where the timeouts of math-verify itself, alarm signals, do not.

    Args:
        column: the column with the answers, numbers (Python's, numpy's or torch's) or texts or lists of them, any of which is right; by
            default the first of `answer`, `reference` and `references` that there is. None, NaN, an empty text and an explanation (more
            than 12 words that mark no answer) give None.
        tolerance: how far apart numbers may be and count as equal, also those in points, sets, intervals and matrices; of two per cents in
            per cent.
        timeout: seconds for each of reading and comparing one row, at least 1.

    Raises:
        ValueError: an argument breaks these rules; a value of the column is no text or number, or the first call finds nothing but
            explanations in it.
        ImportError: math-verify is not installed.
    """

    default_columns = ("answer", "reference", "references")

    def __init__(self, column: str | None = None, *, tolerance: float = 0.0, timeout: int = 5) -> None:
        super().__init__("numeric", column)
        if not tolerance >= 0 or tolerance == inf:
            raise ValueError(f"`tolerance` must be at least 0, got {tolerance}." if tolerance != inf else "`tolerance` must be finite.")
        if timeout < 1:
            raise ValueError(f"`timeout` must be at least 1 second, got {timeout}.")
        require_package("math_verify", "math-verify", self.__name__)
        self.tolerance, self.timeout = Fraction(str(tolerance)), timeout  # 0.01 is a hundredth
        self._worker = MathProcess(timeout)
        self._answers_were_read, self._explanation = False, ""

    def read(self, value: Any, where: str) -> list[str]:
        """Returns the answers in one value of the column; numbers are answers too."""
        values = [value] if is_message_list(value) else [one for one in _flat(value) if not _is_missing(one)]
        texts = super().read([_number_text(one) if isinstance(one, Real | Decimal) else one for one in values], where)
        self._explanation = self._explanation or next((f"{where}: {excerpt(one)}" for one in texts if one and not _right_answer(one)), "")
        return texts

    def scores(self, texts: list[str], references: list[list[str]]) -> list[float | None]:
        """Returns 1 or 0 for each text, None where no answer of the row can be compared with anything."""
        answers = [[answer for answer in map(_right_answer, own) if answer] for own in references]
        self._answers_were_read = self._answers_were_read or any(answers)
        if self._explanation and not self._answers_were_read:
            raise ValueError(
                f"reward `numeric`: {self._explanation} is an explanation that marks no answer, and no other row has one; write answers "
                r"alone, behind `#### `, or in \boxed{}."
            )
        return [self._score(text, own) if own else None for text, own in zip(texts, answers, strict=True)]

    def _score(self, text: str, answers: list[str]) -> float:
        found = find_answer(plain_characters(text))
        value, source = normalise(found.answer), normalise(found.source)
        return float(any(same_text(answer, source) or self._equal(answer, value) for answer in answers))

    def _equal(self, answer: str, found: str) -> bool:
        """Returns whether two normalised answers are equal; where only one is an equation, its value counts."""
        answers, values = [answer], [found]
        if is_equation(found) and not is_equation(answer):
            values = sides(found)
        elif is_equation(answer) and not is_equation(found):
            answers = sides(answer)
        return any(self._same(one, other) for one in answers for other in values)

    def _same(self, answer: str, found: str) -> bool:
        if same_text(answer, found):
            return True
        numbers = read_number(answer), read_number(found)
        if numbers[0] is not None and numbers[1] is not None:
            return same_number(numbers[0], numbers[1], self.tolerance)
        gold, other = _side(answer, numbers[0]), _side(found, numbers[1])
        if gold is None or other is None:
            return False
        return self._worker.equal(gold, other, max(self.tolerance, *(one.slack() for one in numbers if one is not None), Fraction(0)))


def _side(answer: str, number: WrittenNumber | None) -> Side | None:
    """Returns an answer as math-verify is to read it; None for one that is no mathematics."""
    if number is not None:
        ratio = number.value
        return {"number": str(ratio)} if max(abs(ratio.numerator), ratio.denominator) < _LARGEST else None
    return {"latex": as_latex(answer)} if is_expression(answer) else None


def _right_answer(text: str) -> str:
    """Returns the answer that a text of the column is or marks, whole and normalised; nothing for an explanation that marks none."""
    answer = normalise(find_answer(plain_characters(text)).source)
    return answer if is_answer(answer) or len(answer.split()) <= _LONGEST_ANSWER else ""


def _flat(value: Any) -> list[Any]:
    """Returns the values in one value of the column: those of a list, or of an array of numpy or torch, in their own precision."""
    if hasattr(value, "dtype"):
        try:
            return list(np.asarray(value).ravel())  # whose float32 0.1 is written 0.1
        except (TypeError, RuntimeError):  # bfloat16, or on another device
            value = value.tolist()
    if isinstance(value, list | tuple) and not is_message_list(value):
        return [part for one in value for part in _flat(one)]
    return [value]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float | np.floating | Decimal) and bool(value != value))


def _number_text(value: Any) -> str:
    if isinstance(value, int):
        return str(Decimal(value))  # `str` refuses more than 4,300 digits
    return str(value)
