"""What offline learners read: rows in TRL's columns, checked one by one, before anything is tokenised.

    SFT   prompt, completion | text | messages            DPO   prompt, chosen, rejected | chosen, rejected (conversations)
    KTO   prompt, completion, label                             | prompt, completions (best first)

Texts are strings or lists of `{role, content}` messages; instead of them `prompt_ids`, `completion_ids`, `chosen_ids` and `rejected_ids`
hold tokens. Every row may have a `weight`, and a pair a `preference`.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from textgym.prompts import Messages, PromptText, check_prompt, read_rows

Ids: TypeAlias = list[int]
Text: TypeAlias = PromptText | Ids

FORMS = "a list of dicts, the path of a .jsonl or .jsonl.gz file, or a `datasets.Dataset`"


class Example(NamedTuple):
    """One row of any offline data set.

    Attributes:
        prompt: a string, a message list, ids, or None for a plain text whose tokens all count.
        completions: what answers it, each of one of these forms; of several the best first.
        label: P(first ≻ second) of a pair, 1 or 0 for desirable or not, else 1.
        weight: how much the row counts, relative to the others.
    """

    prompt: Text | None
    completions: list[Text]
    label: float = 1.0
    weight: float = 1.0


RowParser: TypeAlias = Callable[[Mapping[str, Any], str], Example]


def read_examples(source: Any, argument: str, parse: RowParser) -> tuple[list[Example], str]:
    """Reads every row of `source`.

    Args:
        source: see `FORMS`.
        argument: what error messages call it.
        parse: `supervised_row`, `preference_row` or `labelled_row`.

    Returns:
        The rows, and how error messages name one, with `{}` for its place.
    """
    rows = read_rows(source, argument, forms=FORMS)
    where = f"row {{}} of {str(source)!r}" if isinstance(source, str) or hasattr(source, "__fspath__") else f"row {{}} of `{argument}`"
    where = where if where.count("{}") == 1 else f"row {{}} of `{argument}`"
    examples = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where.format(number)} must be a dict of columns, got {_short(row)}.")
        example = parse(row, where.format(number))
        weight = _number(row, "weight", 1.0, where.format(number), 0.0, float("inf"))
        examples.append(example._replace(weight=weight))
    if not any(example.weight for example in examples):
        raise ValueError(f"`{argument}` must have at least one row with a `weight` above 0.")
    return examples, where


def supervised_row(row: Mapping[str, Any], where: str) -> Example:
    """Reads a row of SFT."""
    if _has(row, "prompt_ids", "completion_ids"):
        return Example(_ids(row["prompt_ids"], where, "prompt_ids"), [_ids(row["completion_ids"], where, "completion_ids")])
    if _has(row, "prompt", "completion"):
        return Example(check_prompt(row["prompt"], f"the prompt of {where}"), [_answer(row["completion"], where, "completion")])
    if _has(row, "messages"):
        messages = check_prompt(row["messages"], f"`messages` of {where}")
        if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"`messages` of {where} must be at least two messages, the last one the assistant's, which is learned; "
                f"got {_short(messages)}."
            )
        return Example(messages[:-1], [messages[-1:]])
    if _has(row, "text"):
        if not isinstance(row["text"], str):
            raise ValueError(f"`text` of {where} must be a string, got {_short(row['text'])}.")
        return Example(None, [row["text"]])
    raise _wrong_columns(row, where, "prompt and completion, or text, or messages, or prompt_ids and completion_ids")


def labelled_row(row: Mapping[str, Any], where: str) -> Example:
    """Reads a row of KTO."""
    if "label" not in row or not (_has(row, "prompt", "completion") or _has(row, "prompt_ids", "completion_ids")):
        raise _wrong_columns(row, where, "label, and prompt and completion (or prompt_ids and completion_ids)")
    if not isinstance(row["label"], bool | np.bool_) and row["label"] not in (0, 1):
        raise ValueError(f"`label` of {where} must be true (desirable) or false, got {row['label']!r}.")
    return supervised_row(row, where)._replace(label=float(row["label"]))


def preference_row(row: Mapping[str, Any], where: str) -> Example:
    """Reads a row of DPO: a pair or a ranking."""
    example = _comparison(row, where)
    preference = _number(row, "preference", 1.0, where, 0.0, 1.0)
    if preference != 1.0 and len(example.completions) != 2:
        raise ValueError(f"`preference` of {where} must stand beside two completions, got a ranking of {len(example.completions)}.")
    return example._replace(label=preference)


def _comparison(row: Mapping[str, Any], where: str) -> Example:
    if _has(row, "prompt_ids", "chosen_ids", "rejected_ids"):
        return Example(_ids(row["prompt_ids"], where, "prompt_ids"), [_ids(row[c], where, c) for c in ("chosen_ids", "rejected_ids")])
    if _has(row, "prompt_ids", "completion_ids"):
        ranking = _ranking(row["completion_ids"], where, "completion_ids")
        return Example(_ids(row["prompt_ids"], where, "prompt_ids"), [_ids(one, where, "completion_ids") for one in ranking])
    if _has(row, "prompt", "chosen", "rejected"):
        answers: list[Text] = [_answer(row[column], where, column) for column in ("chosen", "rejected")]
        return Example(check_prompt(row["prompt"], f"the prompt of {where}"), answers)
    if _has(row, "prompt", "completions"):
        answers = [_answer(one, where, "completions") for one in _ranking(row["completions"], where, "completions")]
        return Example(check_prompt(row["prompt"], f"the prompt of {where}"), answers)
    if _has(row, "chosen", "rejected"):
        return _implicit_prompt(row["chosen"], row["rejected"], where)
    raise _wrong_columns(row, where, "prompt, chosen and rejected, or prompt and completions (or the same as prompt_ids, chosen_ids, ...)")


def _implicit_prompt(chosen: Any, rejected: Any, where: str) -> Example:
    """TRL's form without a prompt column: what two conversations have in common is the prompt."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError(f"{where} has texts without a prompt: put what `chosen` and `rejected` begin with into a column `prompt`.")
    first, second = (check_prompt(one, f"`{name}` of {where}") for one, name in ((chosen, "chosen"), (rejected, "rejected")))
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))
    if not common:
        raise ValueError(f"`chosen` and `rejected` of {where} must begin with the same message, their prompt.")
    return Example(
        list(first[:common]),  # type: ignore[arg-type]
        [_answer(first[common:], where, "chosen"), _answer(second[common:], where, "rejected")],
    )


def _answer(answer: Any, where: str, column: str) -> Text:
    """Returns a completion if it is a string or one assistant message."""
    if isinstance(answer, str):
        return answer
    messages: Messages = check_prompt(answer, f"`{column}` of {where}")  # type: ignore[assignment]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(f"`{column}` of {where} must be a string or one assistant message, got {_short(messages)}.")
    return messages


def _ranking(answers: Any, where: str, column: str) -> list[Any]:
    if isinstance(answers, str) or not isinstance(answers, Sequence | np.ndarray) or len(answers) < 2:
        raise ValueError(f"`{column}` of {where} must be a list of at least two completions, best first, got {_short(answers)}.")
    return list(answers)


def _ids(ids: Any, where: str, column: str) -> Ids:
    try:
        found = [int(token) for token in ids if not isinstance(token, str | bool | float)]
    except (TypeError, ValueError):
        found = []
    if not found or len(found) != len(ids):
        raise ValueError(f"`{column}` of {where} must be a list of at least one token id, got {_short(ids)}.")
    return found


def _number(row: Mapping[str, Any], column: str, default: float, where: str, low: float, high: float) -> float:
    value = row.get(column, default)
    if isinstance(value, bool | str) or value is None or not (low <= value <= high and value < float("inf")):
        raise ValueError(f"`{column}` of {where} must be a finite number from {low:g} to {high:g}, got {value!r}.")
    return float(value)


def _has(row: Mapping[str, Any], *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def _wrong_columns(row: Mapping[str, Any], where: str, wanted: str) -> ValueError:
    return ValueError(f"{where} must have the columns {wanted}, got {list(row)}; rename those that hold them.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
