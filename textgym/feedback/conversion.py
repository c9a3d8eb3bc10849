"""Whole files of feedback in another form, with an account of it: what came out, and how many records gave nothing, and why.

    pairs            of comparisons, rankings, judgements; of labels and markings the good against the bad of one prompt
    labels           of labels, comparisons (the better is good, the other bad), markings (good without a span)
    segment-labels   of markings, one per segment
    judgements       of judgements, rankings, comparisons
    rankings         of rankings, comparisons, judgements that agree with one ranking
    demonstrations   the best answers, for SFT
    same             the records as they are

The conversions themselves: `converting.py`.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from textgym.feedback.converting import (
    comparison_to_judgements,
    comparison_to_labels,
    judgements_to_comparisons,
    judgements_to_ranking,
    labels_to_comparisons,
    marking_to_label,
    marking_to_segment_labels,
    ranking_to_judgements,
    to_demonstrations,
)
from textgym.feedback.records import Comment, Comparison, Judgements, Label, Marking, Ranking, Record
from textgym.feedback.rows import form_of, own_names, record_to_row

MANY = 5  # pairs for each label, above which that is said
TIES, SAME_TEXT, COMMENTS = "ties", "pairs of equal texts", "comments, which a judge must read first"
NO_RIVAL = "labels without an opposite verdict on the same prompt"
BAD_TEXTS = "texts that are not good"
SOFT = "pairs with a probability, which no whole verdict says"
NO_RANKING = "judgements that make no one ranking"
MIDDLE = "{form}, of whose middle answers nobody said that they are good or bad: make pairs of them first"
NOT_MARKED = "{form}: only marked texts have segments"
NO_TEXT = "{form}, which holds tokens instead of texts"
LEFT_OUT_COLUMN = "columns called {name}, a name that the new form has for itself"


@dataclass(frozen=True)
class Converted:
    """Feedback in another form.

    Attributes:
        rows: the columns of each record, or demonstration, that came out.
        left_out: how many records, or pairs within them, gave nothing, by the reason in words.
        notes: what else is to be known, in words.
    """

    rows: list[dict[str, Any]]
    left_out: dict[str, int]
    notes: list[str]


def convert(
    records: Iterable[Record],
    to: str,
    *,
    keep_ties: bool = False,
    categories: Collection[str] | None = None,
    segmenter: str = "sub_sentence",
) -> Converted:
    """Converts records of any mixture of forms.

    Args:
        records: the records.
        to: one of `TARGETS`.
        keep_ties: with "pairs": a tie is a pair with `preference` ½, instead of none.
        categories: which spans of markings are faults; None: all.
        segmenter: with "segment-labels": where segments end, as of `marking_to_segment_labels`.

    Raises:
        ValueError: `to` is none of the targets.
    """
    if to not in TARGETS:
        raise ValueError(f"`to` must be one of {', '.join(map(repr, TARGETS))}, got {to!r}.")
    conversion = _Conversion(keep_ties, categories, segmenter)
    found: list[Any] = []
    for record in records:
        found += getattr(conversion, TARGETS[to])(record)
    rivals = conversion.rivals()
    crossed = labels_to_comparisons(rivals)
    found += crossed
    rows = [one if isinstance(one, dict) else conversion.row(one) for one in found]
    notes = _notes(found)
    if len(crossed) > MANY * len(rivals):
        notes.append(f"{len(crossed):,} pairs come of {len(rivals):,} labels: each good text stands against each bad one of its prompt.")
    return Converted(rows, dict(conversion.left_out), notes)


TARGETS = {
    "pairs": "pairs",
    "labels": "labels",
    "segment-labels": "segment_labels",
    "judgements": "judgements",
    "rankings": "rankings",
    "demonstrations": "demonstrations",
    "same": "same",
}


class _Conversion:
    """One conversion: what each record gives, and what gave nothing so far."""

    def __init__(self, keep_ties: bool, categories: Collection[str] | None, segmenter: str) -> None:
        self.keep_ties, self.categories, self.segmenter = keep_ties, categories, segmenter
        self.left_out: Counter[str] = Counter()
        self._labels: list[Label] = []

    def same(self, record: Record) -> list[Record]:
        return [record]

    def pairs(self, record: Record) -> list[Comparison]:
        match record:
            case Comparison():
                return self._decided([record])
            case Ranking():
                return self._decided(_all_pairs(ranking_to_judgements(record)))
            case Judgements():
                return self._decided(_all_pairs(record))
            case Label():
                self._labels.append(record)
            case Marking():
                self._labels.append(marking_to_label(record, self.categories))
            case _:
                self._no_text(record)
        return []

    def rivals(self) -> list[Label]:
        """Returns the labels that have an opposite one of the same prompt, and counts the others."""
        verdicts: dict[str, set[bool]] = {}
        for label in self._labels:
            verdicts.setdefault(repr(label.prompt), set()).add(label.good)
        found = [label for label in self._labels if len(verdicts[repr(label.prompt)]) == 2]
        self._count(NO_RIVAL, len(self._labels) - len(found))
        return found

    def labels(self, record: Record) -> list[Label]:
        match record:
            case Label():
                return [record]
            case Marking():
                return [marking_to_label(record, self.categories)]
            case Comparison():
                return [label for pair in self._decided([record], ties=False) for label in comparison_to_labels(pair)]
            case Ranking() | Judgements():
                self._count(MIDDLE.format(form=_plural(record)))
            case _:
                self._no_text(record)
        return []

    def segment_labels(self, record: Record) -> list[Label]:
        if isinstance(record, Marking):
            return marking_to_segment_labels(record, self.segmenter, self.categories)
        self._count(COMMENTS if isinstance(record, Comment) else NOT_MARKED.format(form=_plural(record)))
        return []

    def judgements(self, record: Record) -> list[Judgements]:
        match record:
            case Judgements():
                return [record]
            case Ranking():
                return [ranking_to_judgements(record)]
            case Comparison() if record.preference in (0.0, 0.5, 1.0):
                return [comparison_to_judgements(record)]
            case Comparison():
                self._count(SOFT)
            case Label() | Marking():
                self._count(f"{_plural(record)}, which compare nothing")
            case _:
                self._no_text(record)
        return []

    def rankings(self, record: Record) -> list[Ranking]:
        if isinstance(record, Ranking):
            return [record]
        found = []
        for one in self.judgements(record):
            try:
                found.append(judgements_to_ranking(one))
            except ValueError:
                self._count(NO_RANKING)
        return found

    def demonstrations(self, record: Record) -> list[dict[str, Any]]:
        if isinstance(record, Judgements):
            ranked = self.rankings(record)
        elif isinstance(record, Comment) or not isinstance(record, Comparison | Ranking | Label | Marking):
            self._no_text(record)
            return []
        else:
            ranked = [marking_to_label(record, self.categories) if isinstance(record, Marking) else record]  # type: ignore[list-item]
        found = to_demonstrations(ranked)
        if ranked and not found:
            self._count(TIES if isinstance(record, Comparison) else BAD_TEXTS)
        return found

    def row(self, record: Record) -> dict[str, Any]:
        """Returns the columns of a record; further columns that are called as its own are left out and counted."""
        taken = (own_names(record) - {"form"}) & record.columns.keys()
        kept = {name: value for name, value in record.columns.items() if name not in taken}
        try:
            row = record_to_row(replace(record, columns=kept))
        except ValueError:  # a `form` of the file's own, where ours is needed
            taken |= {"form"}
            row = record_to_row(replace(record, columns={name: value for name, value in kept.items() if name != "form"}))
        for name in taken:
            self._count(LEFT_OUT_COLUMN.format(name=name))
        return row

    def _decided(self, pairs: Sequence[Comparison], ties: bool | None = None) -> list[Comparison]:
        """Returns the pairs that say something: of two texts, and no ties unless those are kept."""
        keep = self.keep_ties if ties is None else ties
        different = [pair for pair in pairs if pair.chosen != pair.rejected]
        self._count(SAME_TEXT, len(pairs) - len(different))
        found = [pair for pair in different if keep or pair.preference != 0.5]
        self._count(TIES, len(different) - len(found))
        return found

    def _no_text(self, record: Record) -> None:
        self._count(COMMENTS if isinstance(record, Comment) else NO_TEXT.format(form=_plural(record)))

    def _count(self, reason: str, number: int = 1) -> None:
        if number:
            self.left_out[reason] += number


def _all_pairs(judgements: Judgements) -> list[Comparison]:
    """Returns the pairs of judgements, ties among them with a preference of ½."""
    found = judgements_to_comparisons(judgements)
    for one in judgements.judgements:
        if not one.z:
            first, second = (judgements.completions[place] for place in (one.first, one.second))
            tie = Comparison(judgements.prompt, first, second, preference=0.5, weight=judgements.weight, columns=judgements.columns)
            found.append(tie)
    return found


_PLURALS = {"comparison": "pairs", "segment_pair": "pairs of segments", "marking": "marked texts", "judgements": "judgements"}


def _plural(record: Record) -> str:
    form = form_of(record)
    return _PLURALS.get(form, f"{form}s")


def _notes(found: Sequence[Any]) -> list[str]:
    verdicts: dict[str, set[bool]] = {}
    for one in found:
        if isinstance(one, Label):
            verdicts.setdefault(repr((one.prompt, one.completion)), set()).add(one.good)
    both = sum(len(values) == 2 for values in verdicts.values())
    return [f"{both:,} texts are labelled both good and bad: they won against one text and lost against another."] if both else []


def count_forms(records: Iterable[Record]) -> dict[str, int]:
    """Returns how many records there are of each form, in words: `{"pairs": 3, "comments": 1}`."""
    return dict(Counter(map(_plural, records)))
