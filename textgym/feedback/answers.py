"""Prompts and their answers as the columns of a row hold them: texts, messages, and whole conversations that repeat or imply the prompt."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from textgym.feedback.columns import answer_of, shown
from textgym.feedback.records import Text
from textgym.prompts import Messages, check_prompt

_DIALOGUE_TURN = "\n\nAssistant:"  # of the data sets that write conversations as texts (HH-RLHF)


def answers_of(prompt: Any, answers: Sequence[Any], where: str, columns: Sequence[str]) -> tuple[Text, list[Text]]:
    """Reads a prompt and what answers it.

    Answers may be whole conversations that repeat the prompt (UltraFeedback's form): then their beginning is taken for it, which may hold
    more than it, a system message for instance. Its columns say so where the prompt is one of their messages, or what they end with but for
    the answer.

    Args:
        prompt: a string or messages.
        answers: strings, assistant messages or conversations that end with one.
        where: what error messages call the row.
        columns: what they call each answer.

    Raises:
        ValueError: an answer is none of these, or conversations begin differently or without the prompt.
    """
    text = check_prompt(prompt, f"the prompt of {where}")
    if not any(map(_is_conversation, answers)):
        return text, [answer_of(answer, where, column) for answer, column in zip(answers, columns, strict=True)]
    whole: list[Messages] = []
    for answer, column in zip(answers, columns, strict=True):
        if not _is_conversation(answer):
            raise ValueError(f"`{column}` of {where} must be a whole conversation like the other answers of the row, got {shown(answer)}.")
        whole.append(check_prompt(answer, f"`{column}` of {where}"))  # type: ignore[arg-type]
    beginning = whole[0][:-1]
    if any(one[:-1] != beginning for one in whole) or not _repeats(beginning, text):
        names = " and ".join(f"`{column}`" for column in dict.fromkeys(columns))
        raise ValueError(
            f"{names} of {where} must be a string or one assistant message, or conversations that begin alike, with the prompt "
            f"{shown(text)}, got {shown(answers[0])}; leave the prompt out of them, or, of chosen and rejected, the column `prompt`."
        )
    return beginning, [answer_of(one[-1:], where, column) for one, column in zip(whole, columns, strict=True)]


def _is_conversation(answer: Any) -> bool:
    return isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) > 1


def _repeats(beginning: Messages, prompt: Text) -> bool:
    """Returns whether a conversation holds a prompt."""
    if isinstance(prompt, str):
        return any(str(message.get("content")).strip() == prompt.strip() for message in beginning)
    return beginning[-len(prompt) :] == prompt


def implicit_prompt(chosen: Any, rejected: Any, where: str) -> tuple[Text, Text, Text]:
    """What two conversations have in common is their prompt (TRL's form without that column), as messages or as HH-RLHF writes them."""
    if isinstance(chosen, str) and isinstance(rejected, str) and _DIALOGUE_TURN in chosen:
        cut = chosen.rindex(_DIALOGUE_TURN) + len(_DIALOGUE_TURN)
        if rejected[:cut] != chosen[:cut] or _DIALOGUE_TURN in rejected[cut:]:
            raise ValueError(f"`chosen` and `rejected` of {where} must be the same up to their last {_DIALOGUE_TURN.strip()!r}.")
        return chosen[:cut], chosen[cut:], rejected[cut:]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError(f"{where} has texts without a prompt: put what `chosen` and `rejected` begin with into a column `prompt`.")
    first, second = (check_prompt(one, f"`{name}` of {where}") for one, name in ((chosen, "chosen"), (rejected, "rejected")))
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))
    common = min(same, len(first) - 1, len(second) - 1)  # answers that are the same are no part of the prompt
    if not common:
        raise ValueError(f"`chosen` and `rejected` of {where} must begin with the same message, their prompt.")
    prompt: Messages = list(first[:common])  # type: ignore[arg-type]
    return prompt, answer_of(first[common:], where, "chosen"), answer_of(second[common:], where, "rejected")
