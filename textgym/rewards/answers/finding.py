r"""Finding the answer in a text: in its last `\boxed{}`, behind GSM8K's mark, where it says so, or its last number."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from textgym.rewards.answers.expressions import EQUALS, is_expression
from textgym.rewards.answers.normalising import CURRENCY, normalise
from textgym.rewards.answers.numbers import read_number

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BETWEEN = re.compile(r"[\s$]*(?:[,;]\s*(?:and|or)?|and|or|\\text\s*\{\s*(?:and|or)\s*\})[\s$]*")
_MARK = re.compile(r"(?<!#)####(?!#)(?P<line>(?:(?!####).)*)")
_HEADING = re.compile(r"\d[.)]?\s+[A-Z]")
_ANNOUNCEMENT = re.compile(
    r"(?:\banswer\b[^.\n:=]{0,60}?(?:\b(?:is|are|be)\b|=)"
    r"|(?:^[ \t#>*_`]*|\bfinal\s)(?:the\s)?(?:final\s)?answer[*_`]*\s*[:=])[:\s*_`]*",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"(?<!\bRs)(?<!\bNo)[.!?][*_`\"')]*(?:\s|$)|\n|$")
_MATHEMATICS = re.compile(
    r"\$\$(?P<a>[^$]+)\$\$|\$(?!\s)(?P<b>[^$\n]+)(?<!\s)\$(?!\d)|\\\[(?P<c>.{1,500}?)\\\]|\\\((?P<d>.{1,500}?)\\\)"
    r"|(?<![\w}])(?P<e>-?\d*\\[dtc]?frac\s*\{[^{}]*\}\s*\{[^{}]*\})",
    re.DOTALL,
)
_AMOUNT = rf"(?:[-+](?=[\d.{CURRENCY}]))?[{CURRENCY}]?-?(?:\d|\.\d)(?:[.,:/'-]?\d)*"
_MONTH = (
    r"(?-i:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|"
    r"Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
_DATE = rf"(?:{_MONTH}\.? \d{{1,2}}(?:[snrt][tdh])?(?:,? \d{{4}})?|\d{{1,2}}(?:[snrt][tdh])?(?: of)? {_MONTH}(?:,? \d{{4}})?)(?!\w)"
_MEASURES = (
    r"(?:hours?|h|minutes?|min|seconds?|s|days?|weeks?|months?|years?|feet|foot|ft|inch(?:es)?|in|"
    r"pounds?|lbs?|ounces?|oz|dollars?|cents?|[ck]?m)"
)
_MEASURED = rf"\d[\d.,]*[ ]?{_MEASURES}(?:(?:,?[ ]and|,)?[ ]\d[\d.,]*[ ]?{_MEASURES}\b)+"
_JOINED = re.compile(
    rf"{_DATE}|{_MEASURED}|"
    rf"[-+]?[{CURRENCY}]?\d[\d.,:/'_{{}}-]*(?:\s?(?:to|through|until|and|or|[-:])\s?[{CURRENCY}]?\d[\d.,:/'-]*)*(?:\s[^\W\d_]+){{0,3}}",
    re.IGNORECASE,
)
_QUANTITY = re.compile(
    rf"(?<!\w)(?:{_DATE}|{_MEASURED})|(?<!\w)(?<!\d\.){_AMOUNT}"
    r"(?:e[-+]?\d+|\s?(?:\\times|\\cdot|\*|x)\s{0,2}10\s?\^\s?\{?[-+]?\d+\}?|[ ]\d+/\d+|_\{?\d+\}?|[a-z^](?:[\w^{}]|-(?=\d))*)?"
    r"(?:[ ]?(?:\\?%|(?:percent|per cent|hundred|thousand|million|billion|trillion|[ap]\.?m)\b))?"
    rf"(?:[ ](?:to|and|or|through|until|\\times|[-+*/^])[ ]{{1,2}}{_AMOUNT})*",
    re.IGNORECASE,
)
_STEPS = re.compile(r"=[^=]*(?:[,;]|\b(?:and|so)\b)[^=]*=")  # 3 + 4 = 7, so y = 14
_LETTERS = re.compile(r"[A-Za-z](?:\s*[,;]\s*[A-Za-z])*")


def is_answer(text: str) -> bool:
    """Returns whether a text is an answer and nothing else, rather than prose with or without one."""
    answer = normalise(text)
    return read_number(answer) is not None or is_expression(answer) or _JOINED.fullmatch(answer) is not None


@dataclass(frozen=True)
class FoundAnswer:
    """An answer in a text.

    Attributes:
        answer: the answer.
        source: the box, line, sentence or whole text that it was taken out of.
    """

    answer: str
    source: str


def find_answer(text: str) -> FoundAnswer:
    r"""Returns the answer of a text.

    That is its last `\boxed{}` or, where that comes later, what follows its last `####` on that line (GSM8K's form; a heading of Markdown
    is no answer). Without both it is what follows the last "the answer is" or "Answer:". Without that it is the text, if it is nothing
    but an answer, or its last number or piece of mathematics.

    Args:
        text: in `plain_characters`.
    """
    box_start, box = _last_box(text)
    for mark in reversed(list(_MARK.finditer(text))):
        if mark.start() < box_start:
            break
        line = _line_of_mark(text, mark)
        if line and (is_answer(line.answer) or (box is None and not text[mark.end() :].strip())):
            return line
    if box is not None:
        return FoundAnswer(box, box)
    return _announced(text) or _last_quantity(text.strip())


def _last_quantity(text: str) -> FoundAnswer:
    if "\n" not in text and is_answer(text) and not _STEPS.search(text):
        return FoundAnswer(text, text)
    return FoundAnswer(next(reversed(_quantities(text)), text), text)


def _last_box(text: str) -> tuple[int, str | None]:
    """The start and the content of the last box that is not empty; of several with commas or "and" between them, all contents."""
    contents: list[str] = []
    start, begin = -1, len(text)
    for found in reversed(list(_BOX.finditer(text))):
        end, content = _box_content(text, found.end())
        if not content:
            continue
        if contents and not _BETWEEN.fullmatch(text, end, begin):
            break
        start, begin = max(start, found.start()), found.start()
        contents.insert(0, content)
    return start, ", ".join(contents) or None


def _box_content(text: str, start: int) -> tuple[int, str]:
    """The end of a box and its content, which begins at `start`; one that is never closed ends with its line."""
    if not text.startswith("{", start):
        end = next((found.start() for found in re.compile(r"[\s$]|$").finditer(text, start)), len(text))
        return end, text[start:end].strip()
    depth = 0
    for found in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return found.end(), text[start + 1 : found.start()].strip()
    end = text.find("\n", start)
    return len(text), text[start + 1 : end if end >= 0 else len(text)].strip()


def _line_of_mark(text: str, mark: re.Match[str]) -> FoundAnswer | None:
    """What stands behind a mark of GSM8K on its line; None where it is a heading with more text below."""
    line: str = mark["line"].strip()
    at_beginning = not text[: mark.start()].rpartition("\n")[2].strip()
    if not line or (at_beginning and _HEADING.match(line) and text[mark.end() :].strip()):
        return None
    return _announced(line) or FoundAnswer(line, line)


def _announced(text: str) -> FoundAnswer | None:
    """What follows the last "the answer is" in the same sentence, or on the next line; of a longer sentence its first quantity."""
    last = next(reversed(list(_ANNOUNCEMENT.finditer(text))), None)
    if last is None or not (rest := text[last.end() :]):
        return None
    if found := _MATHEMATICS.match(rest):
        line = rest[: _line_end(rest, found.end())]
        return FoundAnswer(next(iter(_quantities(line)), found[0]), line)
    ending = _SENTENCE_END.search(rest)
    sentence = rest[: ending.start() if ending else len(rest)]
    if is_answer(sentence):
        return FoundAnswer(sentence, sentence)
    return FoundAnswer(next(iter(_quantities(EQUALS.split(sentence)[-1])), sentence), sentence)


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return end if end >= 0 else len(text)


def _quantities(text: str) -> list[str]:
    """The pieces of mathematics and the numbers in a text, in their order, without letters on their own."""
    found: list[str] = []
    position = 0
    for start, end, content in _mathematics(text):
        found += [one[0] for one in _QUANTITY.finditer(text, position, start)]
        position = end
        if not _LETTERS.fullmatch(content):
            found.append(content)
    return found + [one[0] for one in _QUANTITY.finditer(text, position)]


def _mathematics(text: str) -> Iterator[tuple[int, int, str]]:
    """The pieces of mathematics in a text, (start, end, content); values with commas or "and" between them are one piece."""
    pending: tuple[int, int, str] | None = None
    for found in _MATHEMATICS.finditer(text):
        content = next(group for group in found.groups() if group is not None)
        if pending and "=" not in pending[2] + content and _BETWEEN.fullmatch(text, pending[1], found.start()):
            pending = (pending[0], found.end(), f"{pending[2]}, {content}")
            continue
        if pending:
            yield pending
        pending = (found.start(), found.end(), content)
    if pending:
        yield pending
