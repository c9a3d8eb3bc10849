"""What offline learners read: rows in TRL's columns or records of feedback, checked one by one, before anything is tokenised.

    SFT   prompt, completion | text | messages            DPO   prompt, chosen, rejected | chosen, rejected (conversations)
    KTO   prompt, completion, label                             | prompt, completions (best first, or with ranks)

The columns of texts are those of `textgym.feedback.rows`; instead of texts `prompt_ids`, `completion_ids`, `chosen_ids` and
`rejected_ids` hold tokens. Every row may have a `weight`, and a pair a `preference`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from textgym.conversations import template_columns
from textgym.feedback.answers import answers_of
from textgym.feedback.columns import has_columns, number_of, shown, verdict_of, wrong_columns
from textgym.feedback.reading import Feedback
from textgym.feedback.records import Comparison, Label, Ranking, Record
from textgym.feedback.rows import form_of, is_record, parse_label, row_to_record
from textgym.prompts import PromptText, check_prompt
from textgym.rows import FILES, read_rows, row_name

Ids: TypeAlias = list[int]
Text: TypeAlias = PromptText | Ids

FORMS = f"a list of dicts or of feedback records, the path of {FILES}, a `datasets.Dataset` or a pandas DataFrame"


class Example(NamedTuple):
    """One row of any offline data set.

    Attributes:
        prompt: a string, a message list, ids, or None for a plain text whose tokens all count.
        completions: what answers it, each of one of these forms; of several the best first.
        label: P(first ≻ second) of a pair, 1 or 0 for desirable or not, else 1.
        weight: how much the row counts, relative to the others.
        columns: what goes into its chat template beside the messages, `textgym.conversations.TEMPLATE_COLUMNS`.
    """

    prompt: Text | None
    completions: list[Text]
    label: float = 1.0
    weight: float = 1.0
    columns: Mapping[str, Any] = {}


RowParser: TypeAlias = Callable[[Mapping[str, Any] | Record, str], Example]


def read_examples(source: Any, argument: str, parse: RowParser) -> tuple[list[Example], str]:
    """Reads every row of `source`.

    Args:
        source: see `FORMS`; or what `read_feedback` returned.
        argument: what error messages call it.
        parse: `supervised_row`, `preference_row` or `labelled_row`.

    Returns:
        The rows, and how error messages name one, with `{}` for its place.
    """
    rows = read_rows(source.records if isinstance(source, Feedback) else source, argument, forms=FORMS)
    where = row_name(source, argument)
    examples = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) and not is_record(row):
            raise ValueError(f"{where.format(number)} must be a dict of columns, got {shown(row)}.")
        example = parse(row, where.format(number))
        columns = row if isinstance(row, Mapping) else {**row.columns, "weight": row.weight}
        weight = number_of(columns, "weight", 1.0, where.format(number), 0.0, math.inf)
        examples.append(example._replace(weight=weight, columns=template_columns(columns)))
    if not any(example.weight for example in examples):
        raise ValueError(f"`{argument}` must have at least one row with a `weight` above 0.")
    return examples, where


def supervised_row(row: Mapping[str, Any] | Record, where: str) -> Example:
    """Reads a row of SFT; a record is refused, because not all that stands in it is to be learned."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where} must be a demonstration, got a {form_of(row)}; pass `textgym.feedback.to_demonstrations(records)`, the best answers."
        )
    if has_columns(row, "prompt_ids", "completion_ids"):
        return Example(_ids(row["prompt_ids"], where, "prompt_ids"), [_ids(row["completion_ids"], where, "completion_ids")])
    if has_columns(row, "prompt", "completion"):
        prompt, completions = answers_of(row["prompt"], [row["completion"]], where, ["completion"])
        return Example(prompt, list(completions))
    if has_columns(row, "messages"):
        messages = check_prompt(row["messages"], f"`messages` of {where}")
        if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"`messages` of {where} must be at least two messages, the last one the assistant's, which is learned; "
                f"got {shown(messages)}."
            )
        return Example(messages[:-1], [messages[-1:]])
    if has_columns(row, "text"):
        if not isinstance(row["text"], str):
            raise ValueError(f"`text` of {where} must be a string, got {shown(row['text'])}.")
        return Example(None, [row["text"]])
    raise wrong_columns(row, where, "prompt and completion, or text, or messages, or prompt_ids and completion_ids")


def labelled_row(row: Mapping[str, Any] | Record, where: str) -> Example:
    """Reads a row of KTO."""
    if isinstance(row, Mapping):
        if row.get("label") is None or not (has_columns(row, "prompt", "completion") or has_columns(row, "prompt_ids", "completion_ids")):
            raise wrong_columns(row, where, "label, and prompt and completion (or prompt_ids and completion_ids)")
        if has_columns(row, "prompt_ids", "completion_ids"):
            return supervised_row(row, where)._replace(label=float(verdict_of(row["label"], where)))
    record = parse_label(row, where) if isinstance(row, Mapping) else row
    if not isinstance(record, Label):
        raise ValueError(f"{where} must be a label, got a {form_of(record)}; pass `textgym.feedback.to_labels(records)`.")
    return Example(record.prompt, [record.completion], float(record.good))


def preference_row(row: Mapping[str, Any] | Record, where: str) -> Example:
    """Reads a row of DPO: a pair or a ranking."""
    if isinstance(row, Mapping) and has_columns(row, "prompt_ids", "chosen_ids", "rejected_ids"):
        return _preference_ids(row, [row["chosen_ids"], row["rejected_ids"]], ("chosen_ids", "rejected_ids"), where)
    if isinstance(row, Mapping) and has_columns(row, "prompt_ids", "completion_ids"):
        answers = _ranked_ids(row["completion_ids"], where)
        return _preference_ids(row, answers, ("completion_ids",) * len(answers), where)
    record = _preference(row, where) if isinstance(row, Mapping) else row
    if isinstance(record, Comparison):
        return Example(record.prompt, [record.chosen, record.rejected], record.preference)
    cure = "read them with `read_feedback` and pass `textgym.feedback.to_comparisons(records)`"
    if not isinstance(record, Ranking):
        raise ValueError(f"{where} must be a comparison or a ranking, got a {form_of(record)}; {cure}.")
    if len(set(record.ranks)) < len(record.ranks):
        raise ValueError(f"`ranks` of {where} must be different numbers, got ties in {list(record.ranks)}; {cure}, pairs without ties.")
    best_first: list[Text] = [answer for _, answer in sorted(zip(record.ranks, record.completions, strict=True), key=lambda pair: pair[0])]
    return Example(record.prompt, best_first, _preference_of(record.columns, len(best_first), where))


def _preference(row: Mapping[str, Any], where: str) -> Record:
    if not has_columns(row, "chosen", "rejected") and not has_columns(row, "prompt", "completions"):
        wanted = "prompt, chosen and rejected, or prompt and completions (or the same as prompt_ids, chosen_ids, ...)"
        raise wrong_columns(row, where, wanted)
    return row_to_record(row, where)


def _preference_ids(row: Mapping[str, Any], answers: list[Any], columns: Sequence[str], where: str) -> Example:
    ids: list[Text] = [_ids(one, where, column) for one, column in zip(answers, columns, strict=True)]
    return Example(_ids(row["prompt_ids"], where, "prompt_ids"), ids, _preference_of(row, len(ids), where))


def _preference_of(columns: Mapping[str, Any], count: int, where: str) -> float:
    preference = number_of(columns, "preference", 1.0, where, 0.0, 1.0)
    if preference != 1.0 and count != 2:
        raise ValueError(f"`preference` of {where} must stand beside two completions, got a ranking of {count}.")
    return preference


def _ranked_ids(answers: Any, where: str) -> list[Any]:
    if isinstance(answers, str) or not isinstance(answers, Sequence | np.ndarray) or len(answers) < 2:
        raise ValueError(f"`completion_ids` of {where} must be a list of at least two completions, best first, got {shown(answers)}.")
    return list(answers)


def _ids(ids: Any, where: str, column: str) -> Ids:
    try:
        found = [int(token) for token in ids if not isinstance(token, str | bool | float)]
    except (TypeError, ValueError):
        found = []
    if not found or len(found) != len(ids):
        raise ValueError(f"`{column}` of {where} must be a list of at least one token id, got {shown(ids)}.")
    return found
