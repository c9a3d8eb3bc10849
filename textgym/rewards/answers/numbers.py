r"""Numbers as people and models write them: `1,234.50`, `\$72`, `-3`, `1 1/2`, `\frac{3}{4}`, `1.5\times10^{3}`, `45\%`, `12 apples`.

A text is read whole or not at all: where something is left over that is no unit, there is no number, whatever stands in front.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from textgym.rewards.answers.normalising import CURRENCY


@dataclass(frozen=True)
class WrittenNumber:
    """A number that somebody wrote.

    Attributes:
        value: as it stands, `45` in `45%`.
        places: decimal places that were written; None for a ratio.
        percent: whether a per cent sign follows.
        unit: the unit of measure behind it in its shortest form; empty where there is none that is known.
    """

    value: Fraction
    places: int | None = None
    percent: bool = False
    unit: str = ""

    def slack(self) -> Fraction:
        """Half a unit of the last place where at least six were written, as of `0.333333` for 1/3; otherwise 0."""
        return Fraction(1, 2 * 10**self.places) if self.places is not None and self.places >= 6 and self.value else Fraction(0)


def same_number(first: WrittenNumber, second: WrittenNumber, tolerance: Fraction) -> bool:
    """Returns whether two numbers are equal to within `tolerance`.

    A ratio equals a decimal of six or more places that it rounds to. Where one only has a per cent sign, it may be meant as 50 or as 0.5.
    """
    if first.unit and second.unit and first.unit != second.unit:
        return False
    if (first.places is None) != (second.places is None):
        tolerance = max(tolerance, first.slack(), second.slack())
    if abs(first.value - second.value) <= tolerance:
        return True
    if first.percent == second.percent:
        return False
    shares = [one.value / 100 if one.percent else one.value for one in (first, second)]
    return abs(shares[0] - shares[1]) <= tolerance


_GROUPED = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ ']\d{3})+(?!\d)"
_DECIMAL = rf"(?:(?:{_GROUPED}|\d+)(?:\.\d+)?|\.\d+)"
_POWER_OF_TEN = r"(?:e(?P<e>[-+]?\d+)|\s?(?:\\times|\\cdot|\*|x)\s?10\s?\^\s?\{?(?P<power>[-+]?\d+)\}?(?!\d))"
_LETTER = r"[^\W\d_]"
_MONEY = rf"(?:(?:US|CA?|AU?|NZ|HK|S)?(?P<money>[{re.escape(CURRENCY)}])|(?:USD|EUR|GBP|INR|CAD|AUD|CHF|Rs\.?)\s?)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s?{_MONEY}?\s?(?P<inner>[-+]?)\s?(?:(?P<whole>\d+)(?: and|)[ ](?=\d+\s?/\s?\d))?(?P<number>{_DECIMAL})"
    rf"(?:\s?/\s?(?P<divisor>-?{_DECIMAL})|{_POWER_OF_TEN})?(?P<rest>(?![\d.,]).*)",
    re.IGNORECASE,
)
_FRACTION = re.compile(r"\\frac\s*\{\s*([-\d., ]+?)\s*\}\s*\{\s*([-\d., ]+?)\s*\}(?!\s*\d)")
_RECURRING = re.compile(r"(?P<sign>[-+]?)(?P<whole>\d*)\.(?P<fixed>\d*)\\overline\s?\{(?P<period>\d+)\}")
_LARGEST_EXPONENT = 9999  # a power of ten of more digits is not computed


def read_number(answer: str) -> WrittenNumber | None:
    """Returns the number that a normalised answer is, or None where it is something else, in whole or in part."""
    if found := _RECURRING.fullmatch(answer):
        return WrittenNumber(_recurring(found))
    found = _NUMBER.fullmatch(_FRACTION.sub(_as_slash, answer).strip())
    if found is None or (found["sign"] and found["inner"]):
        return None
    behind = _read_behind(found["rest"])
    value = _value(found)
    if behind is None or value is None:
        return None
    scale, percent, unit = behind
    sign = -1 if "-" in (found["sign"], found["inner"]) else 1
    plain = not (found["divisor"] or found["e"] or found["power"]) and scale == 1
    places = len(found["number"].partition(".")[2]) if plain else None if found["divisor"] else 0
    return WrittenNumber(sign * value * scale, places, percent, unit or _MONEY_UNITS.get(found["money"], found["money"] or ""))


def _as_slash(fraction: re.Match[str]) -> str:
    behind_a_digit = fraction.string[: fraction.start()][-1:].isdigit()  # a mixed number
    return f"{' ' if behind_a_digit else ''}{fraction[1]}/{fraction[2]}"


def _decimal(text: str) -> Fraction:
    # `Decimal` reads any number of digits; `int` and `Fraction` refuse more than 4,300 of them.
    return Fraction(Decimal(re.sub("[ ,']", "", text)))


def _value(found: re.Match[str]) -> Fraction | None:
    """The value of a match of `_NUMBER` without its sign; None where it cannot be computed."""
    value = _decimal(found["number"])
    if found["divisor"]:
        divisor = _decimal(found["divisor"])
        if not divisor:
            return None
        value /= divisor
    elif exponent := found["e"] or found["power"]:
        if len(exponent) > 6 or abs(int(exponent)) > _LARGEST_EXPONENT:
            return None
        value *= Fraction(10) ** int(exponent)
    return value + _decimal(found["whole"]) if found["whole"] else value


def _recurring(found: re.Match[str]) -> Fraction:
    r"""The value of `0.1\overline{6}`."""
    fixed, period = found["fixed"], found["period"]
    repeated: int = 10 ** len(fixed) * (10 ** len(period) - 1)
    value = _decimal(f"{found['whole'] or '0'}.{fixed or '0'}") + _decimal(period) / repeated
    return -value if found["sign"] == "-" else value


_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "bn": 10**9, "mn": 10**6}
_SCALE = re.compile(rf"\s?({'|'.join(_SCALES)})(?!{_LETTER})|(k)(?!{_LETTER})", re.IGNORECASE)
_PERCENT = re.compile(rf"\s?(?:%|(?:percent|per cent|percentage|pct)(?!{_LETTER}))", re.IGNORECASE)
_WORD = rf"{_LETTER}(?:{_LETTER}|[.'-](?={_LETTER}))*\.?(?:\^\{{-?\d\}})?"
_WORDS = re.compile(rf"(?P<space>\s?)\(?(?P<words>{_WORD}(?:(?:\s?/\s?| \(?){_WORD}\)?){{0,7}})\)?")
_MONEY_UNITS = {"$": "dollar", "＄": "dollar", "€": "euro", "￡": "£", "￥": "¥"}
_UNIT_NAMES = """
    mm millimeter millimetre; cm centimeter centimetre; dm; km kilometer kilometre; m meter metre; in inch inches; ft foot feet; yd yard;
    mi mile; mg milligram; g gram; kg kilogram kilo; oz ounce; lb lbs; ml milliliter millilitre; l liter litre; gal gallon; s sec second;
    min minute; h hr hour; day; week; month; yr year; am a.m a.m.; pm p.m p.m.; mph; kmh km/h kph; km/s; m/s; degrees degree deg;
    cent; dollar usd; euro eur; ms; kb; mb; gb
"""
_ORDINALS = {"".join(letters): "".join(letters) for letters in zip("snrt", "tddh", strict=True)}  # 1st, 2nd, 3rd, 4th
_UNITS = _ORDINALS | {name: names.split()[0] for names in _UNIT_NAMES.split(";") for name in names.split()}
_OTHER_WORDS = """
    and or to than not through until vs versus mod half third quarter one two three four five six seven eight nine ten dozen hundred
    thousand million billion trillion pi sin cos tan cot sec csc log ln exp sqrt inf infinity remainder is are was
    jan january feb february mar march apr april may jun june jul july aug august sep sept september oct october nov november dec december
"""
_NO_UNITS = frozenset(_OTHER_WORDS.split())


def _read_behind(text: str) -> tuple[int, bool, str] | None:
    """Returns what the words and signs behind a number say, (factor, per cent, unit); None where they are more than that."""
    scale, percent = 1, False
    if found := _SCALE.match(text):
        scale, text = _SCALES.get((found[1] or "").lower(), 1000), text[found.end() :]
    if found := _PERCENT.match(text):
        percent, text = True, text[found.end() :]
    if (money := text.strip()[:1]) and money in CURRENCY:
        return (scale, percent, _MONEY_UNITS.get(money, money)) if text.strip() == money else None
    if not text.strip():
        return scale, percent, ""
    found = _WORDS.fullmatch(text.rstrip())
    words = found["words"].lower().split() if found else []
    if found is None or not _NO_UNITS.isdisjoint(words):
        return None
    unit, apart = _unit(words), bool(found["space"]) or scale != 1 or percent
    return None if _is_product(words, unit, apart) else (scale, percent, unit)


def _unit(words: list[str]) -> str:
    """The short form of a known unit that is the first word and not a part of a longer one; otherwise nothing."""
    name = words[0].partition("^")[0]
    known = _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))
    compound = words[1:2] in (["per"], ["squared"], ["cubed"])
    return known + words[0].removeprefix(name) if known and not compound else ""


def _is_product(words: list[str], unit: str, apart: bool) -> bool:
    """Whether a letter or two behind a number are rather its factors, as in `2x`, `3xy`, `3R^2` or `2 x`."""
    letters = len(words[0].partition("^")[0]) if len(words) == 1 else 3
    return (letters == 1 and not (apart and unit)) or (letters == 2 and not (apart or unit))
