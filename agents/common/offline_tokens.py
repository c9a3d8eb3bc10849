"""From texts to the ids that offline learners train on.

Prompt and completion are tokenised apart, and their ids put end to end: the joint is where it is when the policy generates, and no text
is tokenised across it. Prompts are read as the environment reads them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from textgym.agents.common.offline_rows import Example, Ids, Text
from textgym.prompts import Messages, conversation_text, encode_plain, encode_prompts


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
        eos_token_ids: the ids that end a completion.
        where: how error messages name a row, with `{}` for its place.
        append_eos: put the tokenizer's EOS behind completions given as texts, unless they end with one. Ids are taken as they are.
    """
    prompts = _encode_prompts(examples, tokenizer, where)
    strings = [text for example in examples for text in example.completions if isinstance(text, str) and example.prompt is not None]
    encoded = dict(zip(dict.fromkeys(strings), _encode_answers(tokenizer, list(dict.fromkeys(strings))), strict=True))
    usual_end = tokenizer.eos_token_id
    end = [usual_end if usual_end in eos_token_ids else eos_token_ids[0]] if append_eos else []

    def answer(text: Text, example: Example, where: str) -> Ids:
        if _is_ids(text):
            return list(text)
        ids = encoded[text] if isinstance(text, str) else _encode_answer(example, text, tokenizer, eos_token_ids, where)
        return _ended(ids, end, eos_token_ids)

    rows = []
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        if example.prompt is None:  # a plain text: its first token predicts the others
            row = TokenisedExample(prompt[:1], [_ended(prompt[1:], end, eos_token_ids)])
        else:
            row = TokenisedExample(prompt, [answer(text, example, where.format(number)) for text in example.completions])
        _check(row, len(tokenizer), where.format(number))
        rows.append(row)
    return rows


def _encode_prompts(examples: Sequence[Example], tokenizer: Any, where: str) -> list[Ids]:
    """Returns the ids of each prompt, or of a plain text as a whole."""
    texts: list[Any] = [example.completions[0] if example.prompt is None else example.prompt for example in examples]
    # An id list would be taken for messages; any text keeps the places of the others, which error messages name.
    readable = [texts[0] if _is_ids(text) else text for text in texts] if not all(map(_is_ids, texts)) else []
    if readable and _is_ids(texts[0]):
        raise ValueError(f"{where.format(0)} has ids and others have texts; give every row in the same form.")
    encoded = encode_prompts(tokenizer, readable, f"the prompt of {where}") if readable else []
    return [list(text) if _is_ids(text) else encoded[number].tolist() for number, text in enumerate(texts)]


def _is_ids(text: Text | None) -> TypeGuard[Ids]:
    return isinstance(text, list) and len(text) > 0 and isinstance(text[0], int)


def _encode_answer(example: Example, answer: Any, tokenizer: Any, eos_token_ids: Sequence[int], where: str) -> Ids:
    """Returns what the chat template writes for an assistant message: from the end of the prompt to the first EOS."""
    if isinstance(example.prompt, str) or _is_ids(example.prompt):
        raise ValueError(f"{where} has a prompt that is no conversation and a completion that is one; give both in the same form.")
    prompt: Messages = example.prompt  # type: ignore[assignment]
    beginning = conversation_text(tokenizer, prompt, where)
    whole = conversation_text(tokenizer, [*prompt, *answer], where, as_prompt=False)
    if not whole.startswith(beginning):
        raise ValueError(
            f"{where}: the chat template writes the conversation with its answer differently from the prompt alone, so that it cannot be "
            "said which tokens are the answer's; give the completion as a string."
        )
    ids = _encode_answers(tokenizer, [whole[len(beginning) :]])[0]
    ends = [index for index, token in enumerate(ids) if token in eos_token_ids]
    return ids[: ends[0] + 1] if ends else ids


def _encode_answers(tokenizer: Any, texts: list[str]) -> list[Ids]:
    """Returns the ids of what follows a prompt.

    SentencePiece tokenizers (Llama 2, Mistral) put a space of their own before every text. An answer that begins with one would have two,
    where the policy, going on after the prompt, writes one.
    """
    ids = encode_plain(tokenizer, texts)
    begun = [place for place, text in enumerate(texts) if text.startswith(" ") and len(text) > 1]
    for place, shorter in zip(begun, encode_plain(tokenizer, [texts[place][1:] for place in begun]), strict=True):
        if shorter and ids[place][1:] == shorter and str(tokenizer.convert_ids_to_tokens(shorter[:1])[0]).startswith("▁"):
            ids[place] = shorter
    return ids


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
