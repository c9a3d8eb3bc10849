"""What texts look like: length, diversity, repetition, and whether they come to an end."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from textgym.rewards.episodes import Prompt, completion_text
from textgym.rewards.simple import RepetitionPenalty

NGRAM_SIZE = 3  # of repetition, that of RepetitionPenalty and TRL


@dataclass(frozen=True)
class TextStatistics:
    """Statistics of a set of texts; words stand between white space and are lower-cased.

    Attributes:
        count: how many texts.
        words: mean words per text.
        tokens: mean tokens per text, EOS included; None where no ids were given.
        distinct_1: distinct words of all texts over their words.
        distinct_2: distinct pairs of neighbouring words of all texts over their words.
        repetition: mean share of the n-grams of a text (three words) that occur in it before: 1 − distinct / all.
        ended: share of the texts that came to their end by EOS; None where that is not known.
    """

    count: int
    words: float
    tokens: float | None
    distinct_1: float
    distinct_2: float
    repetition: float
    ended: float | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as JSON types."""
        return asdict(self)


def text_statistics(
    completions: Sequence[Prompt], completion_ids: Sequence[Sequence[int]] | None = None, eos_token_ids: Sequence[int] = ()
) -> TextStatistics:
    """Returns the statistics of texts.

    Args:
        completions: texts or message lists, at least one.
        completion_ids: their tokens, without filler, EOS included.
        eos_token_ids: the ids that end a text; without them `ended` is None.
    """
    if not completions:
        raise ValueError("`completions` must hold at least one text.")
    if completion_ids is not None and len(completion_ids) != len(completions):
        raise ValueError(f"`completion_ids` must have one list per text: {len(completions)} texts, got {len(completion_ids)}.")
    ended = None
    if completion_ids is not None and eos_token_ids:
        ended = float(np.mean([len(ids) > 0 and ids[-1] in set(eos_token_ids) for ids in completion_ids]))
    return TextStatistics(
        count=len(completions),
        words=float(np.mean([len(_words(text)) for text in completions])),
        tokens=None if completion_ids is None else float(np.mean([len(ids) for ids in completion_ids])),
        distinct_1=distinct_n(completions, 1),
        distinct_2=distinct_n(completions, 2),
        repetition=float(np.mean(repetition(completions))),
        ended=ended,
    )


def distinct_n(completions: Sequence[Prompt], n: int) -> float:
    """Returns the distinct n-grams of all texts together over the number of their words (Li et al. 2016, arXiv:1510.03055, section 5.3).

    The denominator is the paper's; others divide by the number of n-grams, which is n − 1 per text less. The number falls as texts are
    added: compare sets of equally many texts of like length.

    Args:
        completions: texts or message lists.
        n: words per n-gram, at least 1.

    Returns:
        A number in [0, 1]; 0 where there is no word.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    rows = [_words(text) for text in completions]
    ngrams = {tuple(words[start : start + n]) for words in rows for start in range(len(words) - n + 1)}
    total = sum(map(len, rows))
    return len(ngrams) / total if total else 0.0


def repetition(completions: Sequence[Prompt], ngram_size: int = NGRAM_SIZE) -> list[float]:
    """Returns the share of each text's n-grams that occurred in it before, in [0, 1]: what `RepetitionPenalty` charges for.

    Args:
        completions: texts or message lists.
        ngram_size: words per n-gram; a text of fewer words has 0.
    """
    return [abs(penalty) for penalty in RepetitionPenalty(ngram_size)(completions=completions)]


def _words(text: Prompt) -> list[str]:
    return completion_text(text).lower().split()
