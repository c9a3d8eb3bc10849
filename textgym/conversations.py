"""Conversations in the words of a chat template: what goes into it beside the messages, begun answers, and what it refuses."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, Any]]
PromptText: TypeAlias = str | Messages

# Columns of a row that go into its chat template, beside the messages; the names are TRL's and transformers'.
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
# What the template is told by whoever calls it, and no row may say otherwise.
_OWN_ARGUMENTS = frozenset(
    {
        "conversation",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "return_dict",
        "return_tensors",
        "padding",
        "truncation",
    }
)
_SHOWN = 120


def template_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns that go into a chat template, of one row or of many."""
    return {name: columns[name] for name in TEMPLATE_COLUMNS if columns.get(name) is not None}


def row_columns(columns: Mapping[str, Sequence[Any]] | None, row: int) -> dict[str, Any]:
    """Returns what `columns`, of many rows, hold for the template of one row."""
    return {name: values[row] for name, values in template_columns(columns or {}).items() if values[row] is not None}


def with_template_columns(prompts: Sequence[PromptText], columns: Mapping[str, Any]) -> list[Any]:
    """Returns prompts as rows, dicts with a `prompt` column, where something beside the messages goes into their templates."""
    if not template_columns(columns):
        return list(prompts)
    return [{"prompt": prompt, **row_columns(columns, row)} for row, prompt in enumerate(prompts)]


def conversation_text(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    where: str,
    *,
    as_prompt: bool = True,
    columns: Mapping[str, Any] | None = None,
) -> str:
    """Returns a conversation in the words of the chat template.

    Args:
        tokenizer: a transformers tokenizer.
        messages: the conversation.
        where: what error messages call it.
        as_prompt: it is to be gone on with: a last assistant message stays open, after any other the generation prompt follows.
            Otherwise it is whole as it stands.
        columns: the columns of its row. `tools` (JSON schemas, as a list or as JSON text), `documents` and the arguments in
            `chat_template_kwargs` are handed to the template.

    Raises:
        ValueError: there is no chat template, or it refuses the conversation; its own reason is said.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} is a list of messages, but the tokenizer has no chat template; "
            "set `tokenizer.chat_template` or give the prompt as a string."
        )
    arguments = _template_arguments(tokenizer, columns or {}, where)
    continued = as_prompt and messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=as_prompt and not continued, continue_final_message=continued, **arguments
        )
    except ImportError:
        raise
    except Exception as error:  # a template may raise anything: its own refusals (jinja's TemplateError), and what its code runs into
        raise ValueError(f"{where}: {_refusal(messages, error)}") from error
    return str(text)


def _refusal(messages: Messages, error: Exception) -> str:
    """Returns why a template does not take a conversation, and what can be done."""
    roles = [message["role"] for message in messages]
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason if len(reason) <= 2 * _SHOWN else reason[: 2 * _SHOWN] + "..."
    if "system" in roles:
        cure = "if it is the system message, put its text in front of the first user message"
    elif any(first == second for first, second in pairwise(roles)):
        cure = "if roles must alternate, join messages of one role that follow each other"
    else:
        cure = "write the messages as it wants them, or give the prompt as a string"
    return f"the chat template refuses the conversation of the roles {', '.join(map(str, roles))}: {reason.rstrip('.')}; {cure}."


def _template_arguments(tokenizer: Any, columns: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns what `apply_chat_template` is given beside the messages."""
    given = columns.get("chat_template_kwargs")
    given = _from_json(given) if given is not None else {}
    if not isinstance(given, Mapping):
        raise ValueError(f"`chat_template_kwargs` of {where} must be a dict of arguments of the chat template, got {_shown(given)}.")
    taken = sorted(_OWN_ARGUMENTS & given.keys())
    if taken:
        raise ValueError(f"`chat_template_kwargs` of {where} must not hold {', '.join(taken)}, which textgym says itself; leave it out.")
    # A key that a row lacks is None in a data set whose other rows have it.
    arguments = {str(name): value for name, value in given.items() if value is not None}
    for name, wanted in (("tools", "JSON schemas"), ("documents", "dicts with `title` and `text`")):
        values = _from_json(columns.get(name))
        if not values:  # none at all: some templates write the frame of an empty list
            continue
        if isinstance(values, Sequence) and all(isinstance(one, Mapping) or (name == "tools" and callable(one)) for one in values):
            arguments[name] = list(values)
        elif name in str(tokenizer.chat_template):  # a template that does not read it leaves the column to the rewards
            raise ValueError(f"`{name}` of {where} goes into the chat template, so it must be a list of {wanted}, got {_shown(values)}.")
    return arguments


def _from_json(value: Any) -> Any:
    """Returns what a JSON text says; anything else, and a text that is no JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def answered(prompt: Messages, answer: Messages) -> Messages:
    """Returns a conversation with its answer; an assistant message that ends the prompt is begun, and the answer goes on with it.

    Args:
        prompt: at least one message.
        answer: what answers it; the text of its first message is put behind that of a begun one.
    """
    if prompt[-1]["role"] != "assistant" or not answer or answer[0]["role"] != "assistant":
        return [*prompt, *answer]
    begun, first = prompt[-1], answer[0]
    content = _put_together(begun.get("content"), first.get("content"))
    return [*prompt[:-1], {**begun, **first, "content": content}, *answer[1:]]


def _put_together(begun: Any, rest: Any) -> Any:
    """Returns the contents of two messages as one: texts end to end, of lists of parts the last text with the first one."""
    if isinstance(begun, str | None) and isinstance(rest, str | None):
        return (begun or "") + (rest or "")
    first, second = (content if isinstance(content, list) else [{"type": "text", "text": content or ""}] for content in (begun, rest))
    if first and second and isinstance(first[-1].get("text"), str) and isinstance(second[0].get("text"), str):
        return [*first[:-1], {**first[-1], "text": first[-1]["text"] + second[0]["text"]}, *second[1:]]
    return [*first, *second]
