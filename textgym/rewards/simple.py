"""Small rewards without a model or state, in TRL's calling form: length, pattern, exact answer, repetition, word list.

Each is an object that is made once and given as `reward=`; parts of a sum are named after their class (`names=` of `RewardSet.build`
gives them others). Completions may be strings or message lists.
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

from textgym.rewards.calling import NamedReward
from textgym.rewards.episodes import Prompt, completion_text

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_APOSTROPHES = str.maketrans("’ʼ＇", "'''")


class LengthReward(NamedReward):
    """Rewards completions near a target length: 1 at the target, falling linearly to 0 at a distance of `width` and beyond.

        R = max(0, 1 - |n - target| / width)        without a target: R = n

    Args:
        target: the wanted length, in `unit`; None: the reward is the length n itself (give it a small or a negative weight).
        width: the distance from the target at which the reward is 0, in `unit`; more than 0. By default the target, but at least 1.
        unit: `"tokens"` (those of the policy, EOS included), `"words"` (between white space) or `"characters"`.
    """

    def __init__(
        self, target: float | None = None, width: float | None = None, unit: Literal["tokens", "words", "characters"] = "tokens"
    ) -> None:
        if target is not None and not target >= 0:
            raise ValueError(f"`target` must be at least 0, got {target}.")
        if width is not None and not width > 0:
            raise ValueError(f"`width` must be more than 0, got {width}.")
        if width is not None and target is None:
            raise ValueError("`width` is the distance from a `target`, which must be given too.")
        if unit not in ("tokens", "words", "characters"):
            raise ValueError(f"`unit` must be 'tokens', 'words' or 'characters', got {unit!r}.")
        self.target, self.unit = target, unit
        self.width = max(target or 0.0, 1.0) if width is None else width

    def __call__(self, completions: Sequence[Prompt], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """Returns one reward per completion: from 0 to 1, without a target its length."""
        if self.unit == "tokens":
            lengths = [len(ids) for ids in completion_ids]
        elif self.unit == "words":
            lengths = [len(completion_text(completion).split()) for completion in completions]
        else:
            lengths = [len(completion_text(completion)) for completion in completions]
        if self.target is None:
            return [float(length) for length in lengths]
        return [max(0.0, 1.0 - abs(length - self.target) / self.width) for length in lengths]


class RegexReward(NamedReward):
    r"""Rewards completions in which a pattern is found.

    Args:
        pattern: a regular expression of Python's `re`, searched anywhere in the completion; anchor it with `\A` and `\Z` for the whole.
        found: the reward where it is found.
        missing: the reward where it is not.
        flags: flags of `re`, such as `re.IGNORECASE`.
    """

    def __init__(self, pattern: str, *, found: float = 1.0, missing: float = 0.0, flags: int = 0) -> None:
        try:
            self.pattern = re.compile(pattern, flags)
        except re.error as error:
            raise ValueError(f"`pattern` must be a regular expression, got {pattern!r}: {error}.") from error
        self.found, self.missing = float(found), float(missing)

    def __call__(self, completions: Sequence[Prompt], **columns: Any) -> list[float]:
        """Returns `found` or `missing` for each completion."""
        return [self.found if self.pattern.search(completion_text(completion)) else self.missing for completion in completions]


class ExactMatchReward(NamedReward):
    """Rewards completions that equal the answer in a column of the prompt data: 1 where they do, 0 where not.

    White space at both ends is ignored. A row whose answer is None is not scored (None).

    Args:
        column: the column with the answers; a value is a string, or a list of strings any of which is right.
        ignore_case: compare without regard to upper and lower case.
    """

    def __init__(self, column: str = "answer", *, ignore_case: bool = False) -> None:
        self.column, self.ignore_case = column, ignore_case

    def __call__(self, completions: Sequence[Prompt], **columns: Any) -> list[float | None]:
        """Returns 1, 0 or None for each completion."""
        if self.column not in columns:
            raise ValueError(f"ExactMatchReward: the prompts have no column {self.column!r}; name the one with the answers: `column=`.")
        return [
            None if answer is None else float(self._normal(completion_text(completion)) in self._accepted(answer))
            for completion, answer in zip(completions, columns[self.column], strict=True)
        ]

    def _normal(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()

    def _accepted(self, answer: Any) -> set[str]:
        answers = [answer] if isinstance(answer, str) else answer
        if not isinstance(answers, list | tuple | set) or not all(isinstance(one, str) for one in answers):
            raise ValueError(f"ExactMatchReward: column {self.column!r} must hold strings or lists of strings, got {answer!r}.")
        return {self._normal(one) for one in answers}


class RepetitionPenalty(NamedReward):
    """Penalises n-grams of words that occur again: the definition of TRL's `get_repetition_penalty_reward`.

        R = max_penalty · (1 - distinct n-grams / n-grams)

    Words are lower-cased and stand between white space; a completion of fewer than `ngram_size` words gets 0.

    Args:
        ngram_size: words per n-gram, at least 1.
        max_penalty: what a completion of nothing but repetition approaches; at most 0.
    """

    def __init__(self, ngram_size: int = 3, max_penalty: float = -1.0) -> None:
        if ngram_size < 1:
            raise ValueError(f"`ngram_size` must be at least 1, got {ngram_size}.")
        if max_penalty > 0:
            raise ValueError(f"`max_penalty` must be at most 0, got {max_penalty}.")
        self.ngram_size, self.max_penalty = ngram_size, max_penalty

    def __call__(self, completions: Sequence[Prompt], **columns: Any) -> list[float]:
        """Returns one penalty per completion, between `max_penalty` and 0."""
        return [self._penalty(completion_text(completion).lower().split()) for completion in completions]

    def _penalty(self, words: list[str]) -> float:
        ngrams = list(zip(*(islice(words, start, None) for start in range(self.ngram_size)), strict=False))
        return self.max_penalty * (1.0 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0


def _one_form(text: str) -> str:
    """Returns a text in which a letter with an accent is one character, and every apostrophe the straight one."""
    return unicodedata.normalize("NFC", text).translate(_APOSTROPHES)


class LexiconReward(NamedReward):
    """Sentiment by a list of words with valences, such as that of VADER (Hutto & Gilbert 2014).

    The valences v of the words of the completion that are in the list are added up; words that are not count nothing:

        "compound":  R = s / sqrt(s² + 15),  s = Σ v        in (-1, 1): VADER's normalisation, without its rules for negation and emphasis
        "mean":      R = Σ v / number of words in the list  in the range of the valences; 0 if there is none

    A word is a run of letters (accents in either form of Unicode) and apostrophes, straight or curly, in lower case; a run between white
    space that is in the list as it stands (an emoticon) counts as that.

    Args:
        valences: word to valence, positive for good; keys in lower case.
        normalise: `"compound"` or `"mean"`.

    Raises:
        ValueError: an argument breaks these rules, or a valence is not finite.
    """

    def __init__(self, valences: Mapping[str, float], *, normalise: Literal["compound", "mean"] = "compound") -> None:
        if not valences:
            raise ValueError("`valences` must hold at least one word.")
        if normalise not in ("compound", "mean"):
            raise ValueError(f"`normalise` must be 'compound' or 'mean', got {normalise!r}.")
        self.valences: dict[str, float] = {}
        for word, valence in valences.items():
            if not math.isfinite(valence):
                raise ValueError(f"`valences` must be finite numbers, got {valence} for {word!r}.")
            self.valences.setdefault(_one_form(word), valence)
        self.normalise = normalise

    @classmethod
    def from_file(cls, path: str | PathLike[str], *, normalise: Literal["compound", "mean"] = "compound") -> Self:
        """Reads a tab-separated UTF-8 file: the word in the first column, its valence in the second, further columns ignored.

        Words are lower-cased; of two entries that then are the same word, the first counts.
        """
        valences: dict[str, float] = {}
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            columns = line.split("\t")
            try:
                valences.setdefault(columns[0].lower(), float(columns[1]))
            except (IndexError, ValueError):
                raise ValueError(f"{path}, line {number}: expected a word, a tab and a number, got {line!r}.") from None
        if not valences:
            raise ValueError(f"{path} holds no words.")
        return cls(valences, normalise=normalise)

    def __call__(self, completions: Sequence[Prompt], **columns: Any) -> list[float]:
        """Returns one score per completion."""
        return [self._score(completion_text(completion)) for completion in completions]

    def _score(self, text: str) -> float:
        found = [self.valences[word] for word in self._words(_one_form(text.lower())) if word in self.valences]
        total = sum(found)
        if self.normalise == "compound":
            return total / math.sqrt(total * total + 15.0)
        return total / len(found) if found else 0.0

    def _words(self, text: str) -> Iterator[str]:
        for run in text.split():
            if run in self.valences:
                yield run
            else:
                yield from _WORD.findall(run)
