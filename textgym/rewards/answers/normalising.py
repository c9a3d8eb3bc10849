r"""One written form for answers that differ in nothing but their dress: `**\$72**`, `\boxed{\text{72}}`, `$72$.`."""

import re
import unicodedata

CURRENCY = "$＄€£¥₹₩₽₺₫฿₪₴₦￠￡￥"  # ＄ is an escaped dollar sign, which cannot begin or end mathematics

_DASHES = dict.fromkeys(map(ord, "‐‑‒–—―−﹣－⁻"), "-")
_SPACES = dict.fromkeys(map(ord, "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"), " ")
_NOTHING = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f\u2061\u2062"), "")
_SYMBOLS = {
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "±": r"\pm ", "⋅": r"\cdot ", "·": r"\cdot ", "×": r"\times ", "≈": r"\approx ", "°": r"^\circ ",
    "÷": "/", "⁄": "/", "∕": "/", "／": "/", "′": "'", "’": "'", "％": "%", "．": ".", "，": ",", "：": ":", "＝": "=", "＋": "+",
    "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "（": "(", "）": ")", "｛": "{", "｝": "}",
}  # fmt: skip
_CHARACTERS = _DASHES | _SPACES | _NOTHING | str.maketrans(_SYMBOLS)
_THOUSANDS = re.compile(r"(?<=\d)(?:[\u00a0\u2007\u2008\u2009\u202f]|\\[,;: ]|\{,\}|\\thinspace ?|,?\\!\s?)(?=\d{3}(?!\d))")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile(r"[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|[a-zA-Z]|\([^()]*\))")


def plain_characters(text: str) -> str:
    r"""Returns the text with one character for each thing.

    Minus signs and dashes become `-`, all digits 0 to 9, `½` ` 1/2`, `²` `^{2}`, `≤` `\leq`, spaces of any width the one in ASCII, thin
    ones between thousands a comma, an escaped dollar sign `＄`.
    """
    text = _THOUSANDS.sub(",", text)
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{found[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _ROOT.sub(r"\\sqrt{\1}", text).translate(_CHARACTERS).replace(r"\$", "＄")
    return text if text.isascii() else "".join(map(_plain_character, text))


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("⁄", "/")
    return character


_CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\s+", " "),
        (r"(?<![\w)}])(\*\*|__|`+)(?=\S)(.+?)(?<=\S)\1", r"\2"),
        (r"(?<!\\)\\!", ""),  # two backslashes begin a new row of a matrix
        (r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-zA-Z])|(?:thin|med|thick|en)space(?![a-zA-Z]))|~", " "),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
        (r"\\displaystyle(?![a-zA-Z])", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
        (r"\\(?:text(?:normal|bf|it|rm)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])", " degrees "),
        (r"\\%", "%"),
        (r"\{:\}", ":"),  # a time of day without the space around a ratio
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"(?i)(?<![a-z])([ap])\.m(?:\.|(?![a-z]))", r"\1m"),
        (r"(?<!\^)\*\*(?=[-\d({a-zA-Z])", "^"),  # Python's power
        (r"\^\s*(-?\d+)(?![\d.])", r"^{\1}"),  # x^10 is meant to be x^{10}
        (r"_\s*(\d)(?!\d)", r"_{\1}"),
        (r"(?<![a-zA-Z\\])inf(?:inity)?(?![a-zA-Z])", r"\\infty "),
        (r" +\^", "^"),
        (r" +", " "),
    ]
]
_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$?([^$]+)\$\$?",
        r"\\\((.*)\\\)",
        r"\\\[(.*)\\\]",
        r"\\(?:boxed|fbox)\s*\{([^{}]*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^{}]*)*)\}",
        r"\{([^{}]*)\}",
        r"\(([^\s(),]+)\)",  # (5), (B); a point or an interval has a comma
        r"([a-zA-Z])\)",  # B), as choices are listed
    )
]
_EMPHASIS = '*_`"'
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_LONGEST_DRESS = 10_000  # characters; longer than any answer but a number of digits alone


def normalise(answer: str) -> str:
    """Returns one written form for answers that differ in nothing but their dress.

    Emphasis, code marks, full stops, dollars and boxes around it go, and so do LaTeX's spaces, sizes of brackets and words as text.
    """
    answer = plain_characters(answer).strip()
    if len(answer) > _LONGEST_DRESS:
        return answer
    previous = None
    while answer != previous:
        previous = answer
        answer = _undressed(answer)
    return answer


def _undressed(answer: str) -> str:
    """One step of `normalise`."""
    for pattern, replacement in _CLEANING:
        answer = pattern.sub(replacement, answer)
    answer = answer.strip(_EMPHASIS + " ").rstrip(".,;: ").lstrip("=: ").removeprefix(r"\approx").strip()
    for wrapper in _WRAPPERS:
        if found := wrapper.fullmatch(answer):
            answer = found[1].strip()
    return answer


def same_text(first: str, second: str) -> bool:
    """Returns whether two normalised answers are the same text, white space and upper and lower case apart.

    Only a space between two digits counts: `3 1/2` is not `31/2`.
    """
    return bool(first) and _SPACE.sub("", first).casefold() == _SPACE.sub("", second).casefold()
