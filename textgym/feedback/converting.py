"""Feedback of one form as another: pure functions from records to records.

    ranking_to_comparisons      judgements_to_comparisons    labels_to_comparisons      to_comparisons    (any mixture)
    judgements_to_ranking       ranking_to_judgements        comparison_to_judgements
    comparison_to_labels        marking_to_label             marking_to_segment_labels  to_labels         (any mixture)
    to_demonstrations           the best answers, to be imitated

Every record that comes out has the weight and the further columns of the one it came from. What a form cannot say is dropped where that is
the usual reading (a tie is no pair) and refused where it would be a guess (a cycle is no ranking). Words need a judge: `judging.py`.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import combinations, pairwise
from typing import Any

from textgym.feedback.records import Comment, Comparison, Judgement, Judgements, Label, Marking, Ranking, Record
from textgym.feedback.rows import form_of
from textgym.rewards.dense import Segmentation
from textgym.rewards.episodes import EpisodeBatch
from textgym.rewards.segmenters import Segmenter, find_segmenter

_PIECE = re.compile(r"\s*\S+|\s+\Z")  # a word with the white space before it


def ranking_to_judgements(ranking: Ranking) -> Judgements:
    """Returns all C(K, 2) outcomes, ties with z = 0."""
    ranks = ranking.ranks
    found = [Judgement(i, j, _sign(ranks[j] - ranks[i])) for i, j in combinations(range(len(ranks)), 2)]
    return Judgements(ranking.prompt, ranking.completions, tuple(found), ranking.weight, ranking.columns)


def ranking_to_comparisons(ranking: Ranking) -> list[Comparison]:
    """Returns the pairs of a ranking; tied pairs are dropped."""
    return judgements_to_comparisons(ranking_to_judgements(ranking))


def judgements_to_comparisons(judgements: Judgements) -> list[Comparison]:
    """Returns the pairs that were decided; ties are dropped."""
    found = []
    for judgement in judgements.judgements:
        if judgement.z:
            chosen, rejected = (judgements.completions[place] for place in _winner_first(judgement))
            found.append(Comparison(judgements.prompt, chosen, rejected, weight=judgements.weight, columns=judgements.columns))
    return found


def judgements_to_ranking(judgements: Judgements) -> Ranking:
    """Returns the one ranking, ties included, with which all outcomes agree; the ranks are 1, 2, ... without gaps.

    Raises:
        ValueError: there is none (answers beat each other in a circle, or tie and do not), or several (too few pairs were judged).
    """
    group = _tied_groups(judgements)
    beats = {(group[i], group[j]) for i, j in (_winner_first(one) for one in judgements.judgements if one.z)}
    left, ranks, rank = set(group), {}, 0
    while left:
        best = [one for one in left if not any((other, one) in beats for other in left)]
        if not best:
            places = sorted(place for place, one in enumerate(group) if one in left)
            raise ValueError(f"`judgements` must agree with one ranking, but completions {places} beat or tie each other in a circle.")
        if len(best) > 1:
            places = sorted(group.index(one) for one in best)
            raise ValueError(f"`judgements` must decide the whole ranking, but no outcome says which of completions {places} is better.")
        rank += 1
        ranks[best[0]] = rank
        left.remove(best[0])
    found = tuple(ranks[one] for one in group)
    return Ranking(judgements.prompt, judgements.completions, found, judgements.weight, judgements.columns)


def comparison_to_judgements(comparison: Comparison) -> Judgements:
    """Returns the one outcome of a pair, a tie with z = 0.

    Raises:
        ValueError: its preference is a probability, which no outcome says.
    """
    if comparison.preference not in (0.0, 0.5, 1.0):
        raise ValueError(f"`preference` must be 0, 0.5 or 1 to be an outcome, got {comparison.preference}.")
    outcome = Judgement(0, 1, round(2 * comparison.preference - 1))
    answers = (comparison.chosen, comparison.rejected)
    return Judgements(comparison.prompt, answers, (outcome,), comparison.weight, comparison.columns)


def comparison_to_labels(comparison: Comparison) -> list[Label]:
    """Returns the more probable answer as good and the other as bad; a tie (preference ½) gives none."""
    if comparison.preference == 0.5:
        return []
    answers = (comparison.chosen, comparison.rejected)
    good, bad = answers if comparison.preference > 0.5 else answers[::-1]
    return [
        Label(comparison.prompt, text, verdict, comparison.weight, comparison.columns) for text, verdict in ((good, True), (bad, False))
    ]


def labels_to_comparisons(labels: Iterable[Label]) -> list[Comparison]:
    """Returns each good completion against each bad one of the same prompt, in the order of the prompts.

    The weight is the product of both; the columns are those that both share with equal values. Texts that answer nothing (prompt "") are
    each other's rivals as well.
    """
    prompts: dict[str, list[Label]] = {}
    for label in labels:
        prompts.setdefault(json.dumps(label.prompt, sort_keys=True), []).append(label)
    return [
        Comparison(
            good.prompt, good.completion, bad.completion, weight=good.weight * bad.weight, columns=_shared(good.columns, bad.columns)
        )
        for of_prompt in prompts.values()
        for good in of_prompt
        for bad in of_prompt
        if good.good and not bad.good
    ]


def marking_to_label(marking: Marking, categories: Collection[str] | None = None) -> Label:
    """Returns the text as good if nothing in it is marked.

    Args:
        marking: a text with spans that mark faults.
        categories: which faults count; None counts all.
    """
    faults = _faults(marking, categories)
    return Label(marking.prompt, marking.completion, not faults, marking.weight, marking.columns)


def marking_to_segment_labels(
    marking: Marking,
    segmenter: str | Segmenter = "sub_sentence",
    categories: Collection[str] | None = None,
    pieces: Sequence[str] | None = None,
) -> list[Label]:
    """Returns one label per segment: what a reward model of fine-grained feedback learns (Wu et al. 2023, arXiv:2306.01693, §3.1).

    The label's completion is the text *up to and including* the segment, from which such a model scores R(x, y_≤t, j); it is good if no
    fault touches the segment. `columns` get `segment`, the segment alone, and `segment_index`.

    Args:
        marking: a text with spans that mark faults.
        segmenter: "sentence", "sub_sentence", "whole", or a function `segmenter(segment, segment_ids) -> bool` that is asked after every
            piece whether a segment ends with it (`segment_ids` are the numbers of the pieces).
        categories: which faults count, for a model of one category; None counts all.
        pieces: the text cut as a tokenizer cuts it; by default its words, each with the white space before it.

    Raises:
        ValueError: the segmenter is unknown, or the pieces do not make up the text.
    """
    ends_with = find_segmenter(segmenter)
    cut = _PIECE.findall(marking.completion) if pieces is None else list(pieces)
    if "".join(cut) != marking.completion:
        raise ValueError("`pieces` must make up the completion when they are put end to end.")
    faults = _faults(marking, categories)
    found = []
    for index, (start, end) in enumerate(_segments(cut, ends_with)):
        text = marking.completion[start:end]
        first = start + len(text) - len(text.lstrip())  # a span that ends with the sentence before touches white space at most
        good = not any(span_start < end and first < span_end for span_start, span_end in faults)
        columns = {**marking.columns, "segment": text, "segment_index": index}
        found.append(Label(marking.prompt, marking.completion[:end], good, marking.weight, columns))
    return found


def to_comparisons(records: Iterable[Record]) -> list[Comparison]:
    """Returns all pairs in records of any mixture of comparisons, rankings, judgements and labels (good against bad of one prompt).

    Comments are passed over: a judge makes pairs of them (`comments_to_records`).

    Raises:
        ValueError: a record is of another form.
    """
    found: list[Comparison] = []
    labels: list[Label] = []
    for number, record in enumerate(records):
        match record:
            case Comparison():
                found.append(record)
            case Ranking():
                found += ranking_to_comparisons(record)
            case Judgements():
                found += judgements_to_comparisons(record)
            case Label():
                labels.append(record)
            case Comment():
                continue
            case _:
                raise _no_conversion(number, record, "comparisons")
    return found + labels_to_comparisons(labels)


def to_labels(records: Iterable[Record]) -> list[Label]:
    """Returns good and bad texts of records of any mixture of labels, comparisons and markings.

    Rankings and judgements are refused: what is the middle of three is neither good nor bad. Make comparisons of them first. Comments are
    passed over.

    Raises:
        ValueError: a record is of another form.
    """
    found: list[Label] = []
    for number, record in enumerate(records):
        match record:
            case Label():
                found.append(record)
            case Comparison():
                found += comparison_to_labels(record)
            case Marking():
                found.append(marking_to_label(record))
            case Comment():
                continue
            case _:
                raise _no_conversion(number, record, "labels")
    return found


def to_demonstrations(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Returns what to imitate, as rows with `prompt`, `completion` and `weight` for SFT.

    Of a comparison the more probable answer (of a tie none), of a ranking its best, of labels the good ones, of markings those without a
    fault; comments are passed over.

    Raises:
        ValueError: a record is of another form.
    """
    found = []
    for number, record in enumerate(records):
        match record:
            case Ranking():
                best = [answer for answer, rank in zip(record.completions, record.ranks, strict=True) if rank == min(record.ranks)]
                labels = [Label(record.prompt, answer, True, record.weight) for answer in best]
            case Label() | Comparison() | Marking():
                labels = to_labels([record])
            case Comment():
                labels = []
            case _:
                raise _no_conversion(number, record, "demonstrations")
        found += [{"prompt": one.prompt, "completion": one.completion, "weight": one.weight} for one in labels if one.good]
    return found


def _no_conversion(number: int, record: Record, wanted: str) -> ValueError:
    return ValueError(f"record {number} of `records` cannot be converted to {wanted}: it is a {form_of(record)}; see textgym.feedback.")


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def _winner_first(judgement: Judgement) -> tuple[int, int]:
    places = (judgement.first, judgement.second)
    return places if judgement.z > 0 else places[::-1]


def _tied_groups(judgements: Judgements) -> list[int]:
    """Returns the group of each answer, the smallest place in it: ties put answers into one, directly or through others."""
    group = list(range(len(judgements.completions)))
    for one in judgements.judgements:
        if one.z == 0:
            low, high = sorted((group[one.first], group[one.second]))
            group = [low if place == high else place for place in group]
    return group


def _faults(marking: Marking, categories: Collection[str] | None) -> list[tuple[int, int]]:
    if isinstance(categories, str):
        raise ValueError(f"`categories` must be a collection of names, got the string {categories!r}; put it into a list.")
    return [(span.start, span.end) for span in marking.spans if categories is None or span.category in categories]


def _segments(pieces: Sequence[str], segmenter: Segmenter) -> list[tuple[int, int]]:
    """Returns where each segment starts and ends, in characters; white space at the end belongs to the last."""
    numbers = list(range(len(pieces)))
    batch = EpisodeBatch([""], [numbers], decode=lambda _, rows: ["".join(pieces[number] for number in row) for row in rows])
    segments = Segmentation(segmenter).all_segments(batch, [True])[0]
    ends = [*(len(one.prefix) for one in segments[:-1]), sum(map(len, pieces))]
    return list(pairwise([0, *ends]))


def _shared(first: Any, second: Any) -> dict[str, Any]:
    return {name: value for name, value in first.items() if name in second and second[name] == value}
