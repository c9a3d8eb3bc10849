"""How much of the words or characters of a completion its references share: BLEU, chrF, clipped n-gram precision and ROUGE.

All are sentence scores from 0 to 1 (sacrebleu's own figures go to 100). BLEU and chrF are computed by sacrebleu, ROUGE by rouge-score;
both packages come with the extra `metrics`. With several references BLEU, chrF and the precision use all of them in the way they define,
ROUGE takes the best.
"""

import re
import unicodedata
from collections import Counter
from itertools import islice
from typing import Any, Literal, get_args

from textgym.rewards.references import ReferenceReward, require_package

Smoothing = Literal["none", "floor", "add-k", "exp"]
RougeScore = Literal["fmeasure", "precision", "recall"]
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_OF_NUMBERS = re.compile(r"(?<=\d)[.,:/-](?=\d)|(?<!\w)-(?=[$€£]?\.?\d)|(?<!\w)\.(?=\d)|(?<=\d)%")  # punctuation that makes another number
_ROUGE = re.compile(r"rouge([1-9]|L|Lsum)")


class BleuReward(ReferenceReward):
    """Sentence BLEU by sacrebleu (Papineni et al. 2002; Post 2018), from 0 to 1.

        BLEU = BP · exp(1/N Σ_n log p_n),   BP = min(1, exp(1 - reference length / length)),   p_n the clipped n-gram precisions

    Args:
        column: the column with the references; see `ReferenceReward`.
        smoothing: what stands for a p_n of 0: `"exp"` (1/2, 1/4, ... of a match: NIST's, method 3 of Chen & Cherry 2014), `"floor"` and
            `"add-k"` (`smooth_value` of a match, added to zeros only, or to all orders above 1) or `"none"` (the score is 0).
        smooth_value: that number of matches; by default 0.1 for `"floor"` and 1 for `"add-k"`.
        effective_order: N is the number of orders with at least one n-gram in the completion, so that texts of fewer than 4 words can
            have a score above that of their smoothing.
        tokenize: sacrebleu's tokenizer of words: `"13a"`, `"intl"`, `"char"`, `"zh"`, `"none"`, ...
        lowercase: compare in lower case.
        max_ngram_order: N, at least 1.

    Raises:
        ValueError: an argument breaks these rules.
        ImportError: sacrebleu is not installed.
    """

    def __init__(
        self,
        column: str | None = None,
        *,
        smoothing: Smoothing = "exp",
        smooth_value: float | None = None,
        effective_order: bool = True,
        tokenize: str = "13a",
        lowercase: bool = False,
        max_ngram_order: int = 4,
    ) -> None:
        super().__init__("bleu", column)
        if smoothing not in get_args(Smoothing):
            raise ValueError(f"`smoothing` must be one of {', '.join(get_args(Smoothing))}, got {smoothing!r}.")
        if max_ngram_order < 1:
            raise ValueError(f"`max_ngram_order` must be at least 1, got {max_ngram_order}.")
        require_package("sacrebleu", "sacrebleu", self.__name__)
        from sacrebleu.metrics.bleu import BLEU

        if tokenize not in BLEU.TOKENIZERS:
            raise ValueError(f"`tokenize` must be one of {', '.join(BLEU.TOKENIZERS)}, got {tokenize!r}.")
        self._metric: Any = BLEU(
            smooth_method=smoothing,
            smooth_value=smooth_value,
            effective_order=effective_order,
            tokenize=tokenize,
            lowercase=lowercase,
            max_ngram_order=max_ngram_order,
        )

    def scores(self, texts: list[str], references: list[list[str]]) -> list[float]:
        """Returns the BLEU of each text."""
        return [min(1.0, self._one(text, own)) for text, own in zip(texts, references, strict=True)]

    def _one(self, text: str, references: list[str]) -> float:
        # As a corpus of one sentence: `sentence_score` is the same, and warns at every call where `effective_order` is off.
        return float(self._metric.corpus_score([text], [[reference] for reference in references]).score) / 100.0


class ChrfReward(ReferenceReward):
    """Sentence chrF by sacrebleu: the F-score of character n-grams (Popović 2015), from 0 to 1.

    Args:
        column: the column with the references; see `ReferenceReward`.
        char_order: longest n-gram of characters.
        word_order: longest n-gram of words; 0 is chrF, 2 is chrF++.
        beta: how many times more recall counts than precision.
        lowercase: compare in lower case.
        whitespace: count n-grams across white space.
        eps_smoothing: the smoothing of Popović's own script, in place of the effective order.

    Raises:
        ValueError: an argument breaks these rules.
        ImportError: sacrebleu is not installed.
    """

    def __init__(
        self,
        column: str | None = None,
        *,
        char_order: int = 6,
        word_order: int = 0,
        beta: int = 2,
        lowercase: bool = False,
        whitespace: bool = False,
        eps_smoothing: bool = False,
    ) -> None:
        super().__init__("chrf", column)
        if char_order < 1 or word_order < 0:
            raise ValueError(f"`char_order` must be at least 1 and `word_order` at least 0, got {char_order} and {word_order}.")
        if not beta > 0:
            raise ValueError(f"`beta` must be more than 0, got {beta}.")
        require_package("sacrebleu", "sacrebleu", self.__name__)
        from sacrebleu.metrics.chrf import CHRF

        self._metric: Any = CHRF(
            char_order=char_order,
            word_order=word_order,
            beta=beta,
            lowercase=lowercase,
            whitespace=whitespace,
            eps_smoothing=eps_smoothing,
        )

    def scores(self, texts: list[str], references: list[list[str]]) -> list[float]:
        """Returns the chrF of each text."""
        return [min(1.0, self._metric.sentence_score(text, own).score / 100.0) for text, own in zip(texts, references, strict=True)]


class NgramPrecisionReward(ReferenceReward):
    """The clipped n-gram precision inside BLEU, alone: which share of the completion's n-grams stands in a reference, from 0 to 1.

        p_n = Σ_g min(count of g in the completion, largest count of g in one reference) / number of n-grams in the completion

    Texts are lower-cased, stripped of punctuation and cut at white space; numbers keep their sign, their point and what else stands between
    digits (`-5`, `3.50`, `10:31`), but no comma between thousands. A completion without n-grams gets 0. "the the the the the the
    the" has p_1 = 2/7 against "The cat is on the mat." and "There is a cat on the mat." (Papineni et al. 2002).

    Args:
        column: the column with the references; see `ReferenceReward`.
        n: words per n-gram, at least 1.
    """

    def __init__(self, column: str | None = None, *, n: int = 1) -> None:
        super().__init__("ngram-precision", column)
        if n < 1:
            raise ValueError(f"`n` must be at least 1, got {n}.")
        self.n = n

    def scores(self, texts: list[str], references: list[list[str]]) -> list[float]:
        """Returns the precision of each text."""
        return [self._precision(text, own) for text, own in zip(texts, references, strict=True)]

    def _precision(self, text: str, references: list[str]) -> float:
        counts = self._ngrams(text)
        largest: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            largest |= self._ngrams(reference)
        return (counts & largest).total() / counts.total() if counts else 0.0

    def _ngrams(self, text: str) -> Counter[tuple[str, ...]]:
        text = _THOUSANDS.sub("", text.lower().replace("\u2212", "-"))
        kept = {found.start() for found in _OF_NUMBERS.finditer(text)}
        words = "".join(c for i, c in enumerate(text) if i in kept or not unicodedata.category(c).startswith("P")).split()
        return Counter(zip(*(islice(words, start, None) for start in range(self.n)), strict=False))


class RougeReward(ReferenceReward):
    """ROUGE by rouge-score (Lin 2004), from 0 to 1; of several references the one with the best score counts.

    Words are runs of ASCII letters and digits in lower case, as in that package: for other scripts take chrF or BLEU.

    Args:
        kind: `"rouge1"` to `"rouge9"` (overlap of n-grams), `"rougeL"` (longest common subsequence of the whole texts) or `"rougeLsum"`
            (the same sentence by sentence, where every line is a sentence).
        column: the column with the references; see `ReferenceReward`.
        score: `"fmeasure"`, `"precision"` (share of the completion) or `"recall"` (share of the reference).
        stemmer: compare Porter stems of words of more than three letters.

    Raises:
        ValueError: an argument breaks these rules.
        ImportError: rouge-score is not installed.
    """

    def __init__(self, kind: str = "rougeL", column: str | None = None, *, score: RougeScore = "fmeasure", stemmer: bool = False) -> None:
        if not _ROUGE.fullmatch(kind):
            raise ValueError(f"`kind` must be rouge1 to rouge9, rougeL or rougeLsum, got {kind!r}.")
        super().__init__(f"rouge-{kind.removeprefix('rouge').lower()}", column)
        if score not in get_args(RougeScore):
            raise ValueError(f"`score` must be one of {', '.join(get_args(RougeScore))}, got {score!r}.")
        require_package("rouge_score", "rouge-score", self.__name__)
        from rouge_score.rouge_scorer import RougeScorer

        self.kind, self.score_name = kind, score
        self._scorer: Any = RougeScorer([kind], use_stemmer=stemmer)

    def scores(self, texts: list[str], references: list[list[str]]) -> list[float]:
        """Returns the chosen figure of each text."""
        return [max(self._one(text, reference) for reference in own) for text, own in zip(texts, references, strict=True)]

    def _one(self, text: str, reference: str) -> float:
        return float(getattr(self._scorer.score(reference, text)[self.kind], self.score_name))
