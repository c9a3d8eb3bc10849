"""Where a segment of text ends, decided from the text so far: nothing may look ahead.

A segmenter is a callable `segmenter(segment, segment_ids) -> bool`: `segment` is the text since the last segment ended, `segment_ids`
its tokens; True means that the segment ends with its last token. It is asked once after every token. The end of the episode closes the
last segment without asking. Any function of this form can be given to `segment_level`; it must depend on its arguments alone.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Segmenter: TypeAlias = Callable[[str, list[int]], bool]

# Full stops, question and exclamation marks: Latin, double and full-width forms; Arabic, Urdu; Devanagari; Armenian; Ethiopic; Burmese;
# Khmer; Tibetan; Greek, whose question mark looks like a semicolon. Thai has none.
SENTENCE_MARKS = (
    ".!?\u2026\u203c\u2047\u2048\u2049\u203d\u3002\uff01\uff1f\uff0e\uff61"
    "\u061f\u06d4\u0964\u0965\u0589\u1362\u1367\u1368\u104b\u17d4\u17d5\u0f0d\u0f0e\u037e"
)
# Commas, semicolons, colons and the dash, in the same order.
SUB_SENTENCE_MARKS = ",;:\u2014\uff0c\uff1b\uff1a\u3001\uff64\u060c\u061b\u055d\u1363\u1364\u1365\u1366\u104a"
# Not those with which a sentence ends as often as it does not (etc., Inc., a.m., No.).
ENGLISH_ABBREVIATIONS = ("Mr", "Mrs", "Ms", "Dr", "Prof", "St", "Gen", "Col", "Capt", "Sen", "Rep", "vs", "e.g", "i.e", "cf", "Fig", "Eq")

_CLOSING = "\"'”’»›)\\]}」』】）"
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Sentences:
    """Ends at the marks with which sentences end, closing quotes and brackets included, and at a line break.

    A segment has at least one letter or digit, so the second and third dots of `...` begin the next one. Because nothing looks ahead, a
    token that ends in the dot of `3.` or of `Dr.` closes a segment, unless `abbreviations` or `numbers` say otherwise. A mark in the
    middle of a token does not end a segment: its last token is the one that ends with the mark.

    Args:
        marks: the characters that end a segment.
        abbreviations: words, without their last dot, whose dot ends nothing; upper and lower case count.
        numbers: False: a dot after a digit ends nothing, which keeps `3.14` whole and misses the end of `in 1999.`
    """

    marks: str = SENTENCE_MARKS
    abbreviations: tuple[str, ...] = ()
    numbers: bool = True
    _end: re.Pattern[str] = field(init=False, repr=False, compare=False)
    _no_end: re.Pattern[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.marks:
            raise ValueError("`marks` must hold at least one character.")
        object.__setattr__(self, "_end", re.compile(rf"[{re.escape(self.marks)}]+[{_CLOSING}]*\s*\Z|\n\s*\Z"))
        # Of `e.g.` the first dot ends nothing either.
        words = {word[:end] for word in self.abbreviations for end in (*(i for i, c in enumerate(word) if c == "."), len(word))}
        exceptions = [rf"\b{re.escape(word)}" for word in sorted(words)] + ([] if self.numbers else [r"\d"])
        object.__setattr__(self, "_no_end", re.compile(rf"(?:{'|'.join(exceptions)})\.[ \t]*\Z") if exceptions else None)

    def __call__(self, segment: str, segment_ids: list[int]) -> bool:
        """Returns whether the segment ends here."""
        if not (self._end.search(segment) and _WORD.search(segment)):
            return False
        return self._no_end is None or not self._no_end.search(segment)


def whole(segment: str, segment_ids: list[int]) -> bool:
    """Never ends before the episode does: the whole completion is one segment."""
    return False


@dataclass(frozen=True)
class TokenCount:
    """Ends after every `num_tokens` tokens.

    Args:
        num_tokens: tokens per segment, at least 1.
    """

    num_tokens: int

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"`num_tokens` must be at least 1, got {self.num_tokens}.")

    def __call__(self, segment: str, segment_ids: list[int]) -> bool:
        """Returns whether the segment has its `num_tokens` tokens."""
        return len(segment_ids) >= self.num_tokens


sentence = Sentences()
sub_sentence = Sentences(SENTENCE_MARKS + SUB_SENTENCE_MARKS)
SEGMENTERS: dict[str, Segmenter] = {"sentence": sentence, "sub_sentence": sub_sentence, "whole": whole}


def find_segmenter(segmenter: Any) -> Segmenter:
    """Returns the segmenter that a name stands for, or the function that was given; anything else is a `ValueError`."""
    found = SEGMENTERS.get(segmenter) if isinstance(segmenter, str) else segmenter
    if not callable(found):
        raise ValueError(f"`segmenter` must be one of {sorted(SEGMENTERS)} or a function, got {segmenter!r}.")
    return found
