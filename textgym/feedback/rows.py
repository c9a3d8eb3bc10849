"""One record and one row of columns, both ways: what a line of a file says, checked, and how a record is written.

    comparison    prompt, chosen, rejected [, preference, margin]        TRL's; also conversations `chosen` and `rejected` that begin alike
    ranking       prompt, completions [, ranks (or rank)]                without ranks the best first
    judgements    prompt, completions, comparisons [{i, j, z}]           z = 1: i is better, −1: j is, 0: a tie
    label         prompt, completion, label | text, label                TRL's; true or false, 1 or 0, 1 or −1, or names of classes
    segment_pair  first, second {prompt_ids, completion_ids, start, end}, preference
    marking       prompt, completion, spans [{category, start, end}] | text, spans
    comment       prompt, completions (or completion), comment

Every row may have a `weight`. A column `form` names the form of a row whose columns leave it open. All other columns are kept.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias, get_args

import numpy as np

from textgym.feedback.answers import answers_of, implicit_prompt
from textgym.feedback.columns import (
    Row,
    has_columns,
    is_whole,
    list_of,
    number_of,
    shown,
    verdict_of,
    whole_numbers,
    wrong_columns,
)
from textgym.feedback.records import (
    Comment,
    Comparison,
    Judgement,
    Judgements,
    Label,
    Marking,
    Ranking,
    Record,
    Segment,
    SegmentPair,
    Span,
    Text,
)

Parser: TypeAlias = Callable[[Row, str], Record]


def is_record(value: object) -> bool:
    """Returns whether `value` is a feedback record."""
    return isinstance(value, get_args(Record))


# -- from a row to a record ---------------------------------------------------------------------------------------------------------------


def row_to_record(row: Row, where: str, form: str | None = None, positive: Collection[Any] | None = None) -> Record:
    """Reads a row.

    Args:
        row: its columns.
        where: what error messages call it.
        form: one of `FORMS`; None recognises it from the columns.
        positive: the values of `label` that mean good; None for labels that say so themselves.

    Raises:
        ValueError: a column is missing or holds what it may not; the message says which, the rule and the cure.
    """
    form = form or recognise_form(row)
    if form is None:
        raise wrong_columns(row, where, "of one of the forms of feedback " + _USUAL_FORMS)
    return parse_label(row, where, positive) if form == "label" else _PARSERS[form](row, where)


def recognise_form(row: Row) -> str | None:
    """Returns the form that the columns of `row` have, None if none; where they fit several, the one that says more."""
    if isinstance(row.get("form"), str) and row["form"] in FORMS:
        return str(row["form"])
    answers = has_columns(row, "completions")
    one = has_columns(row, "prompt", "completion") or has_columns(row, "text")
    found = {
        "comparison": has_columns(row, "chosen", "rejected"),
        "segment_pair": all(isinstance(row.get(column), Mapping) for column in ("first", "second")),
        "ranking": answers and (has_columns(row, "ranks") or has_columns(row, "rank")),
        "judgements": answers and has_columns(row, "comparisons"),
        "marking": one and has_columns(row, "spans"),
        "label": one and has_columns(row, "label"),
        "comment": (answers or one) and has_columns(row, "comment"),
    }
    best_first = "ranking" if answers and has_columns(row, "prompt") else None
    return next((form for form, holds in found.items() if holds), best_first)


def parse_comparison(row: Row, where: str) -> Comparison:
    """Reads a pair; without a column `prompt` its prompt is what the two conversations have in common."""
    if not has_columns(row, "chosen", "rejected"):
        raise wrong_columns(row, where, _WANTED["comparison"])
    if has_columns(row, "prompt"):
        columns = ("chosen", "rejected")
        prompt, (chosen, rejected) = answers_of(row["prompt"], [row[column] for column in columns], where, columns)
    else:
        prompt, chosen, rejected = implicit_prompt(row["chosen"], row["rejected"], where)
    return Comparison(
        prompt,
        chosen,
        rejected,
        preference=number_of(row, "preference", 1.0, where, 0.0, 1.0),
        margin=number_of(row, "margin", 0.0, where, -math.inf, math.inf),
        **_common(row, where, "comparison"),
    )


def parse_ranking(row: Row, where: str) -> Ranking:
    """Reads a ranking; without ranks its first completion is the best, its last the worst."""
    if not has_columns(row, "prompt", "completions"):
        raise wrong_columns(row, where, _WANTED["ranking"])
    name = "rank" if has_columns(row, "rank") and not has_columns(row, "ranks") else "ranks"
    prompt, completions = _answers(row, where)
    if not has_columns(row, name):
        _check_best_first(row, where)
    ranks = whole_numbers(row[name], where, name) if has_columns(row, name) else list(range(1, len(completions) + 1))
    if len(ranks) != len(completions):
        raise ValueError(f"`{name}` of {where} must have a rank for each of the {len(completions)} completions, got {len(ranks)}.")
    return Ranking(prompt, completions, tuple(ranks), **_common(row, where, "ranking", *({"rank"} & {name})))


def _check_best_first(row: Row, where: str) -> None:
    """Raises where completions without ranks need not stand in their order."""
    if "ranks" in row or "rank" in row:
        raise ValueError(
            f"`ranks` of {where} must be a list of whole numbers, got None; leave the row out, or the column if the best is first."
        )
    if has_columns(row, "labels"):
        raise ValueError(f"`completions` of {where} stand beside `labels`: give a row per completion, with `completion` and `label`.")


def parse_judgements(row: Row, where: str) -> Judgements:
    """Reads the outcomes of comparing answers pairwise."""
    if not has_columns(row, "prompt", "completions", "comparisons"):
        raise wrong_columns(row, where, _WANTED["judgements"])
    prompt, completions = _answers(row, where)
    judgements: list[Judgement] = []
    for one in list_of(row["comparisons"], where, "comparisons", "judgements {i, j, z}"):
        rule = f"`comparisons` of {where} must hold {{i, j, z}} with two different places i, j below {len(completions)} and z of 1, 0 or -1"
        if not isinstance(one, Mapping) or not all(is_whole(one.get(key)) for key in "ijz"):
            raise ValueError(f"{rule}, got {shown(one)}.")
        judgement = Judgement(int(one["i"]), int(one["j"]), int(one["z"]))
        places = {judgement.first, judgement.second}
        if len(places) != 2 or not all(0 <= place < len(completions) for place in places) or judgement.z not in (-1, 0, 1):
            raise ValueError(f"{rule}, got {shown(one)}.")
        if any(places == {other.first, other.second} for other in judgements):
            raise ValueError(f"`comparisons` of {where} must judge a pair of answers once, got a second judgement in {shown(one)}.")
        judgements.append(judgement)
    if not judgements:
        raise ValueError(f"`comparisons` of {where} must hold at least one judgement, got none; leave the row out.")
    return Judgements(prompt, completions, tuple(judgements), **_common(row, where, "judgements"))


def parse_label(row: Row, where: str, positive: Collection[Any] | None = None) -> Label:
    """Reads a text with a verdict; see `row_to_record` for `positive`."""
    if not has_columns(row, "label"):
        raise wrong_columns(row, where, _WANTED["label"])
    prompt, completion, names = _text(row, where, "label")
    return Label(prompt, completion, verdict_of(row["label"], where, positive), **_common(row, where, "label", *names))


def parse_segment_pair(row: Row, where: str) -> SegmentPair:
    """Reads two compared segments."""
    if not has_columns(row, "first", "second", "preference"):
        raise wrong_columns(row, where, _WANTED["segment_pair"])
    first, second = (_segment(row[column], where, column) for column in ("first", "second"))
    preference = number_of(row, "preference", 1.0, where, 0.0, 1.0)
    return SegmentPair(first, second, preference, **_common(row, where, "segment_pair"))


def parse_marking(row: Row, where: str) -> Marking:
    """Reads a text with marked spans; a span's `category` may be called `type`."""
    if not has_columns(row, "spans"):
        raise wrong_columns(row, where, _WANTED["marking"])
    prompt, completion, names = _text(row, where, "marking")
    if not isinstance(completion, str):
        raise ValueError(f"`completion` of {where} must be a string, in whose characters spans are counted, got {shown(completion)}.")
    spans = tuple(_span(one, len(completion), where) for one in list_of(row["spans"], where, "spans", "spans {category, start, end}"))
    return Marking(prompt, completion, spans, **_common(row, where, "marking", *names))


def parse_comment(row: Row, where: str) -> Comment:
    """Reads words on one or several answers."""
    if not has_columns(row, "comment") or not isinstance(row["comment"], str) or not row["comment"].strip():
        raise ValueError(f"`comment` of {where} must be a string that says something, got {shown(row.get('comment'))}; leave the row out.")
    if has_columns(row, "completions"):
        if not has_columns(row, "prompt"):
            raise wrong_columns(row, where, _WANTED["comment"])
        names: tuple[str, ...] = ()
        prompt, completions = _answers(row, where, at_least=1)
    else:
        prompt, completion, names = _text(row, where, "comment")
        completions = (completion,)
    return Comment(prompt, completions, row["comment"], **_common(row, where, "comment", *names))


def parse_answers(row: Row, where: str) -> tuple[Text, tuple[Text, ...]]:
    """Reads a prompt and its two or more answers, of a row that need not say which is the better: `completions`, or chosen and rejected."""
    if has_columns(row, "chosen", "rejected"):
        pair = parse_comparison(row, where)
        return pair.prompt, (pair.chosen, pair.rejected)
    if not has_columns(row, "prompt", "completions"):
        raise wrong_columns(row, where, "prompt and completions (or chosen and rejected)")
    return _answers(row, where)


_PARSERS: dict[str, Parser] = {
    "comparison": parse_comparison,
    "ranking": parse_ranking,
    "judgements": parse_judgements,
    "label": parse_label,
    "segment_pair": parse_segment_pair,
    "marking": parse_marking,
    "comment": parse_comment,
}
FORMS: tuple[str, ...] = tuple(_PARSERS)
_WANTED = {
    "comparison": "prompt, chosen and rejected",
    "ranking": "prompt, completions and ranks",
    "judgements": "prompt, completions and comparisons",
    "label": "label, and prompt and completion (or text)",
    "segment_pair": "first, second and preference",
    "marking": "spans, and prompt and completion (or text)",
    "comment": "comment, and prompt and completions (or completion)",
}
_USUAL_FORMS = (
    "(a pair: prompt, chosen, rejected; a ranking: prompt, completions; a label: prompt, completion, label; a marked text: prompt, "
    "completion, spans; others: docs/feedback.md)"
)


# -- from a record to a row ---------------------------------------------------------------------------------------------------------------


def record_to_row(record: Record) -> dict[str, Any]:
    """Returns the columns that read as `record`; numbers that have their default values are left out.

    Raises:
        ValueError: one of `record.columns` has the name of a column that the record itself needs.
    """
    if not is_record(record):
        raise ValueError(f"`record` must be one of {', '.join(one.__name__ for one in get_args(Record))}, got {type(record).__name__}.")
    form = form_of(record)
    own = _own_columns(record)
    clash = sorted((_reserved(form) & record.columns.keys()) | ({"form"} if record.columns.get("form") in FORMS else set()))
    if clash:
        raise ValueError(f"`columns` of a {type(record).__name__} must not be called {', '.join(clash)}, names of its own; rename them.")
    row = {**own, **record.columns}
    if recognise_form(row) == form:
        return row
    if "form" in row:
        raise ValueError(f"`columns` of this {type(record).__name__} must not have a `form`: its own is needed to tell it from others.")
    return {"form": form, **row}


def form_of(record: Record) -> str:
    """Returns the name of a record's form, one of `FORMS`."""
    return FORMS[get_args(Record).index(type(record))]


def _own_columns(record: Record) -> dict[str, Any]:
    row: dict[str, Any]
    match record:
        case Comparison():
            row = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
            row |= {name: value for name in ("preference", "margin") if (value := getattr(record, name)) != _DEFAULTS[name]}
        case Ranking():
            row = {"prompt": record.prompt, "completions": list(record.completions), "ranks": list(record.ranks)}
        case Judgements():
            judgements = [{"i": one.first, "j": one.second, "z": one.z} for one in record.judgements]
            row = {"prompt": record.prompt, "completions": list(record.completions), "comparisons": judgements}
        case Label():
            row = {"prompt": record.prompt, "completion": record.completion, "label": record.good}
        case SegmentPair():
            row = {"first": _segment_row(record.first), "second": _segment_row(record.second), "preference": record.preference}
        case Marking():
            spans = [{"category": span.category, "start": span.start, "end": span.end} for span in record.spans]
            row = {"prompt": record.prompt, "completion": record.completion, "spans": spans}
        case Comment():
            row = {"prompt": record.prompt, "completions": list(record.completions), "comment": record.comment}
    return row if record.weight == _DEFAULTS["weight"] else {**row, "weight": record.weight}


_DEFAULTS = {"preference": 1.0, "margin": 0.0, "weight": 1.0}
_NAMES: dict[str, tuple[str, ...]] = {
    "comparison": ("prompt", "chosen", "rejected", "preference", "margin"),
    "ranking": ("prompt", "completions", "ranks"),
    "judgements": ("prompt", "completions", "comparisons"),
    "label": ("prompt", "completion", "label"),
    "segment_pair": ("first", "second", "preference"),
    "marking": ("prompt", "completion", "spans"),
    "comment": ("prompt", "completions", "comment"),
}


def own_names(record: Record) -> set[str]:
    """Returns the names that none of a record's further columns may have."""
    return {*_reserved(form_of(record)), "form"}


def _reserved(form: str) -> set[str]:
    return {*_NAMES[form], "weight"}


def _segment_row(segment: Segment) -> dict[str, Any]:
    ids = {"prompt_ids": list(segment.prompt_ids), "completion_ids": list(segment.completion_ids)}
    return {**ids, "start": segment.start, "end": segment.end}


# -- what several forms read --------------------------------------------------------------------------------------------------------------


def _common(row: Row, where: str, form: str, *used: str) -> dict[str, Any]:
    """Returns the weight, and the columns that were not used."""
    known = _reserved(form) | set(used) | ({"form"} if row.get("form") in FORMS else set())
    columns = {str(name): value for name, value in row.items() if name not in known}
    return {"weight": number_of(row, "weight", 1.0, where, 0.0, math.inf), "columns": columns}


def _text(row: Row, where: str, form: str) -> tuple[Text, Text, tuple[str, ...]]:
    """Returns prompt and completion, and the columns used that need not be of the record's own names.

    A `text` answers nothing, its prompt is ""; where a `prompt` stands beside it the text must begin with that.
    """
    if has_columns(row, "prompt", "completion"):
        prompt, (completion,) = answers_of(row["prompt"], [row["completion"]], where, ["completion"])
        return prompt, completion, ("completion",)
    if not has_columns(row, "text"):
        raise wrong_columns(row, where, _WANTED[form])
    if not isinstance(row["text"], str):
        raise ValueError(f"`text` of {where} must be a string, got {shown(row['text'])}.")
    prompt = row["prompt"] if has_columns(row, "prompt") else ""
    if not isinstance(prompt, str) or not row["text"].startswith(prompt):
        raise ValueError(f"`text` of {where} must begin with its prompt {shown(prompt)}; rename `text` to `completion` if it answers that.")
    return prompt, row["text"][len(prompt) :], ("text",)


def _answers(row: Row, where: str, at_least: int = 2) -> tuple[Text, tuple[Text, ...]]:
    """Returns the prompt of a row and its completions."""
    answers = row["completions"]
    if isinstance(answers, str | Mapping) or not isinstance(answers, Sequence | np.ndarray) or len(answers) < at_least:
        wanted = "at least two completions" if at_least == 2 else "at least one completion"
        raise ValueError(f"`completions` of {where} must be a list of {wanted}, got {shown(answers)}.")
    prompt, found = answers_of(row["prompt"], list(answers), where, ["completions"] * len(answers))
    return prompt, tuple(found)


def _segment(value: Any, where: str, column: str) -> Segment:
    if not isinstance(value, Mapping) or not has_columns(value, "prompt_ids", "completion_ids", "start", "end"):
        raise ValueError(f"`{column}` of {where} must be {{prompt_ids, completion_ids, start, end}}, got {shown(value)}.")
    prompt, completion = (tuple(whole_numbers(value[name], where, f"{column}.{name}")) for name in ("prompt_ids", "completion_ids"))
    start, end = whole_numbers([value["start"], value["end"]], where, f"{column}.start, {column}.end")
    if not 0 <= start < end <= len(completion):
        raise ValueError(
            f"`{column}` of {where} must have 0 <= start < end <= {len(completion)}, the number of `completion_ids`, got {start} and {end}."
        )
    return Segment(prompt, completion, start, end)


def _span(value: Any, length: int, where: str) -> Span:
    category = value.get("category", value.get("type")) if isinstance(value, Mapping) else None
    if not isinstance(category, str) or not category:
        raise ValueError(f"`spans` of {where} must hold {{category, start, end}}, got {shown(value)}.")
    start, end = whole_numbers([value.get("start"), value.get("end")], where, "spans")
    if not 0 <= start < end <= length:
        raise ValueError(f"`spans` of {where} must have 0 <= start < end <= {length}, the characters of the text, got {start} and {end}.")
    return Span(category, start, end)
