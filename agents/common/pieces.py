"""What a reward model reads of a text."""

from typing import NamedTuple


class Piece(NamedTuple):
    """Some tokens of a text: the score of a piece is the sum of the scores at its tokens, each of which sees all that stands before it.

    Attributes:
        ids: the tokens of the text, prompt included.
        start: the first token that is read.
        end: the place behind the last one.
    """

    ids: list[int]
    start: int
    end: int
