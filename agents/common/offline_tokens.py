"""From texts to the ids that offline learners train on.

Prompt and completion are tokenised apart, and their ids put end to end: the joint is where it is when the policy generates, and no text
is tokenised across it. Prompts are read as the environment reads them, completions as they stand behind their prompts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from textgym.agents.common.offline_rows import Example, Ids, Text
from textgym.conversations import Messages, answered, conversation_text
from textgym.encoding import encode_completions
from textgym.prompts import encode_prompts


class TokenisedExample(NamedTuple):
    """The ids of a prompt (at least one) and of its completions (at least one each)."""

    prompt: Ids
    completions: list[Ids]


def tokenise(
    examples: Sequence[Example], tokenizer: Any, eos_token_ids: Sequence[int], where: str, *, append_eos: bool
) -> list[TokenisedExample]:
    """Tokenises rows.

    Args:
        examples: from `read_examples`.
        tokenizer: the policy's.
        eos_token_ids: the ids that end a completion. One given as a text or as a message is cut behind its first end, beyond which no
            episode goes.
        where: how error messages name a row, with `{}` for its place.
        append_eos: put the tokenizer's EOS behind completions given as texts, unless they end with one. Ids are taken as they are.
    """
    prompts = _encode_prompts(examples, tokenizer, where)
    usual_end = tokenizer.eos_token_id
    end = [usual_end if usual_end in eos_token_ids else eos_token_ids[0]] if append_eos else []
    rows = []
    encoded = iter(_encode_answers(examples, prompts, tokenizer, where))
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        if example.prompt is None:  # a plain text: its first token predicts the others
            row = TokenisedExample(prompt[:1], [_ended(prompt[1:], end, eos_token_ids)])
        else:
            answers = [list(text) if is_ids(text) else _until_end(next(encoded), end, eos_token_ids) for text in example.completions]
            row = TokenisedExample(prompt, answers)
        _check(row, len(tokenizer), where.format(number))
        rows.append(row)
    return rows


def _encode_prompts(examples: Sequence[Example], tokenizer: Any, where: str) -> list[Ids]:
    """Returns the ids of each prompt, or of a plain text as a whole."""
    texts: list[Any] = [example.completions[0] if example.prompt is None else example.prompt for example in examples]
    # An id list would be taken for messages; any text keeps the places of the others, which error messages name.
    first = next((text for text in texts if not is_ids(text)), None)
    readable = [] if first is None else [first if is_ids(text) else text for text in texts]
    encoded = encode_prompts(tokenizer, readable, f"the prompt of {where}", _columns(examples)) if readable else []
    return [list(text) if is_ids(text) else encoded[number].tolist() for number, text in enumerate(texts)]


def _columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for example in examples for name in example.columns)
    return {name: [example.columns.get(name) for example in examples] for name in names}


def is_ids(text: Text | None) -> TypeGuard[Ids]:
    """Returns whether a prompt or a completion is given as tokens."""
    return isinstance(text, list) and len(text) > 0 and isinstance(text[0], int)


def _encode_answers(examples: Sequence[Example], prompts: Sequence[Ids], tokenizer: Any, where: str) -> list[Ids]:
    """Returns the ids of the completions that are no ids already, row after row, each as it stands behind its prompt."""
    before, texts = [], []
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        for answer in example.completions if example.prompt is not None else ():
            if not is_ids(answer):
                before.append(prompt)
                texts.append(answer if isinstance(answer, str) else _answer_text(example, answer, tokenizer, where.format(number)))
    return encode_completions(tokenizer, before, texts)


def _answer_text(example: Example, answer: Any, tokenizer: Any, where: str) -> str:
    """Returns what the chat template writes for an assistant message, from the end of the prompt on."""
    if isinstance(example.prompt, str) or is_ids(example.prompt):
        raise ValueError(f"{where} has a prompt that is no conversation and a completion that is one; give both in the same form.")
    prompt: Messages = example.prompt  # type: ignore[assignment]
    beginning = conversation_text(tokenizer, prompt, where, columns=example.columns)
    whole = conversation_text(tokenizer, answered(prompt, answer), where, as_prompt=False, columns=example.columns)
    if not whole.startswith(beginning):
        raise ValueError(
            f"{where}: the chat template writes the conversation with its answer differently from the prompt alone, so that it cannot be "
            "said which tokens are the answer's; give the completion as a string."
        )
    return whole[len(beginning) :]


def _until_end(ids: Ids, end: Ids, eos_token_ids: Sequence[int]) -> Ids:
    """Returns a completion up to its first end; one that has none gets `end`."""
    first = next((place for place, token in enumerate(ids) if token in eos_token_ids), None)
    return [*ids, *end] if first is None else ids[: first + 1]


def _ended(ids: Ids, end: Ids, eos_token_ids: Sequence[int]) -> Ids:
    return ids if ids and ids[-1] in eos_token_ids else [*ids, *end]


def _check(row: TokenisedExample, vocab_size: int, where: str) -> None:
    if not row.prompt or not all(row.completions):
        raise ValueError(
            f"{where} must have at least one token in the prompt and one in each completion, got {len(row.prompt)} and "
            f"{[len(one) for one in row.completions]}."
        )
    for ids in (row.prompt, *row.completions):
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ValueError(f"{where} must have ids from 0 to {vocab_size - 1} (`len(tokenizer) - 1`), got {min(ids)} to {max(ids)}.")
