"""Where a segment of text ends, decided from the text so far: nothing may look ahead.

A segmenter is a callable `segmenter(segment, segment_ids) -> bool`: `segment` is the text since the last segment ended, `segment_ids`
its tokens; True means that the segment ends with its last token. It is asked once after every token. The end of the episode closes the
last segment without asking. Any function of this form can be given to `segment_level`; it must depend on its arguments alone.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Segmenter: TypeAlias = Callable[[str, list[int]], bool]

# A mark, then closing quotes or brackets, then white space only.
_SENTENCE_END = re.compile(r"[.!?…。！？]+[\"'”’»)\]]*\s*\Z|\n\s*\Z")
_SUB_SENTENCE_END = re.compile(r"[.!?…。！？,;:—，；：、]+[\"'”’»)\]]*\s*\Z|\n\s*\Z")
_WORD = re.compile(r"\w")


def sentence(segment: str, segment_ids: list[int]) -> bool:
    """Ends at `.`, `!`, `?`, `…` (or their full-width forms), closing quotes included, and at a line break.

    A segment has at least one letter or digit, so the second and third dots of `...` begin the next one. Because nothing looks ahead,
    a token that ends in the dot of `3.` or `Dr.` closes a segment too.
    """
    return bool(_SENTENCE_END.search(segment) and _WORD.search(segment))


def sub_sentence(segment: str, segment_ids: list[int]) -> bool:
    """Ends where `sentence` does, and at `,`, `;`, `:` and the dash `—`."""
    return bool(_SUB_SENTENCE_END.search(segment) and _WORD.search(segment))


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


SEGMENTERS: dict[str, Segmenter] = {"sentence": sentence, "sub_sentence": sub_sentence, "whole": whole}
