"""Which answers are mathematics, for a computer algebra system, and which only look like it: times, ratios, dates, words."""

import re

from textgym.rewards.answers.normalising import CURRENCY, normalise

_LOOK_LIKE_SUMS = re.compile(
    r"\d\s*:\s*\d|^[^{]*:"  # a time, a ratio; a colon of mathematics is that of a set
    r"|\d+(?:\.\d+){2,}"  # a version, a date
    r"|(?<![\w.)}])\d+[-/]\d+[-/]\d+(?![\w.({])"  # a date
    r"|^\d+(?:\.\d+)?-\d+(?:\.\d+)?$"  # a range, a score
    r"|\d\s+\d"  # two numbers
    r"|\d_|^0[box][\da-fA-F]+$"  # a number in another base
    r"|^\([a-zA-Z]\)\s+\S"  # an answer behind its letter
)
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z*]+\}|\\[a-zA-Z]+")
_FUNCTIONS = r"sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|lg|exp|sqrt|pi|inf|infinity|max|min|gcd|lcm|det|and|or"
_OPERATORS = r"+\-*/^=<>&|\\"
_WORD = re.compile(
    rf"(?<![a-zA-Z])(?!(?:{_FUNCTIONS})(?![a-zA-Z]))"
    r"(?:[^\W\d_]{4,}|[a-zA-Z]+'[a-zA-Z]|(?:to|by|of|at|in|is|as|if|no|so|am|pm|on|for|the|per|not)(?![^\W\d_])"
    # two or three letters on their own are no product of variables, unless they stand beside an operator
    rf"|(?<!\S)(?<![{_OPERATORS}(,{{]\s)[a-zA-Z]{{2,3}}(?!\S)(?!\s*[{_OPERATORS}),}}]))"
)
_LONGEST_EXPRESSION = 1000  # characters
_UNIT = re.compile(
    r"(?:(?<=[\d})])|(?<=\\pi))\s+(?:(?:square|cubic|sq\.?)\s+)?(?:units?|degrees|radians|[ckm]m|inches|feet|ft|cents|dollars)(?:\^\{\d\})?$"
)
_PI = re.compile(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])")
_NO_CURRENCY = str.maketrans("", "", CURRENCY)


def is_expression(answer: str) -> bool:
    """Returns whether a normalised answer may be read as mathematics: no words, and none of the forms that look like sums and are none."""
    if not answer or len(answer) > _LONGEST_EXPRESSION or answer.replace(" ", "").isalpha() or _LOOK_LIKE_SUMS.search(answer):
        return False
    if sum(map(answer.count, "([{")) != sum(map(answer.count, ")]}")):  # [2,5) is an interval
        return False
    return not _WORD.search(_COMMAND.sub(" ", _UNIT.sub("", answer)))


def as_latex(expression: str) -> str:
    """Returns a normalised expression for math-verify: without dollars and a unit of measure behind it, pi as a letter."""
    return _PI.sub(r"\\pi ", _UNIT.sub("", expression).translate(_NO_CURRENCY))


EQUALS = re.compile(r"(?<![<>!\\:=])=(?!=)")
_SEVERAL = re.compile(r";|,(?!\d{3}(?!\d))|\b(?:and|or)\b")


def sides(answer: str) -> list[str]:
    r"""Returns the values that an equation gives, the last of each chain: 7 of `3 + 4 = 7`, `\pi` and 3.14 of `\pi \approx 3.14`."""
    if len(answer) > _LONGEST_EXPRESSION or _SEVERAL.search(answer):
        return [answer]
    return [normalise(EQUALS.split(part)[-1]) for part in answer.split(r"\approx")]


def is_equation(answer: str) -> bool:
    """Returns whether a normalised answer contains an equals sign, or one of being about equal."""
    return EQUALS.search(answer) is not None or r"\approx" in answer
