"""Prompts: reading them from every source, tokenising them once, and keeping the other columns for the rewards."""

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from textgym.conversations import Messages, PromptText, conversation_text, row_columns
from textgym.encoding import encode_beginnings, encode_plain
from textgym.rows import FILES, python_value, read_rows, row_name
from textgym.types import BoolArray, IntArray
from textgym.unknown_tokens import check_known

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Messages", "Prompt", "PromptSet", "PromptText", "check_prompt", "copy_prompt", "encode_prompts", "read_prompts", "split_row"]

_FORMS = (
    f'a list of strings, a list of dicts with a "prompt" column, the path of {FILES}, a `datasets.Dataset`, a pandas DataFrame '
    "or a `PromptSet`"
)
_SHOWN_ROWS = 5


class Prompt(NamedTuple):
    """One prompt, ready to begin an episode.

    Attributes:
        prompt_index: its place in the prompt set, -1 for one that is not of the set.
        text: a string or a list of `{role, content}` messages, as the user gave it.
        ids: its tokens, (p,) int64.
        columns: the other columns of its row.
    """

    prompt_index: int
    text: PromptText
    ids: IntArray
    columns: Mapping[str, Any]


class PromptSet:
    """Prompts that are read and tokenised once, and shared by every environment that is given the set.

    `copy.deepcopy` returns the object itself. Pass the set in the place of a list to make many environments from the same prompts
    without tokenising them again.

    Args:
        prompts: a list of strings or message lists, a list of dicts with a `prompt` column, the path of a file (`.jsonl`, `.json`, `.csv`,
            `.parquet`), a `datasets.Dataset`, a pandas DataFrame, or another set, which is tokenised again when it was made with another
            tokenizer. `tools`, `documents` and `chat_template_kwargs` of a row go into its chat template.
        tokenizer: a transformers tokenizer. Prompts of which it knows little or nothing are warned of.

    Raises:
        ValueError: a prompt cannot be read or has no tokens, or the tokenizer knows nothing of any; which is said.

    Attributes:
        texts: the prompts as given, strings or message lists.
        columns: every other column, one value per prompt (None where a row lacks it).
        ids: the tokens of each prompt, int64 arrays.
        lengths: how many those are, (len(prompts),) int64.
        tokenizer: the tokenizer that made them.
    """

    texts: list[PromptText]
    columns: dict[str, list[Any]]
    ids: list[IntArray]
    lengths: IntArray

    def __init__(self, prompts: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
        if isinstance(prompts, PromptSet):
            self.texts, self.columns, where = prompts.texts, prompts.columns, row_name(None, "prompts")
        else:
            (self.texts, self.columns), where = read_prompts(prompts), row_name(prompts, "prompts")
        self.tokenizer = tokenizer
        self._set_ids(encode_prompts(tokenizer, self.texts, where, self.columns))
        check_known(tokenizer, self._tokens, self.lengths, "`prompts`", where.format)

    def _set_ids(self, ids: list[IntArray]) -> None:
        """Stores the tokens of all prompts one after the other in one array, of which `ids` are views."""
        self.lengths = np.array([len(one) for one in ids], dtype=np.int64)
        self._tokens: IntArray = np.concatenate(ids)
        self._ends: IntArray = np.cumsum(self.lengths)
        self.ids = np.split(self._tokens, self._ends[:-1])

    @classmethod
    def build(cls, prompts: Any, tokenizer: "PreTrainedTokenizerBase") -> "PromptSet":
        """Returns `prompts` itself if it is a set made with this tokenizer, else a new set."""
        return prompts if isinstance(prompts, PromptSet) and prompts.tokenizer is tokenizer else cls(prompts, tokenizer)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(self.lengths.max())

    def fit(self, max_prompt_tokens: int, *, truncate: bool = False) -> "PromptSet":
        """Returns a set in which no prompt is longer than `max_prompt_tokens`: itself where none is.

        Args:
            max_prompt_tokens: the limit, in tokens.
            truncate: keep the last `max_prompt_tokens` tokens of a longer prompt; otherwise one is an error that names the rows.
        """
        rows = np.flatnonzero(self.lengths > max_prompt_tokens).tolist()
        if not rows:
            return self
        if not truncate:
            shown = ", ".join(f"row {row} ({len(self.ids[row])} tokens)" for row in rows[:_SHOWN_ROWS])
            more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
            raise ValueError(
                f"`prompts` must have at most `max_prompt_tokens` = {max_prompt_tokens} tokens each, but these are longer: {shown}{more}; "
                f"raise `max_prompt_tokens` (the longest needs {self.longest}) or pass `truncate_prompts=True` to keep the end of each."
            )
        fitted = copy(self)
        fitted._set_ids([ids[-max_prompt_tokens:] for ids in self.ids])
        return fitted

    def left_padded(self, indices: IntArray, width: int, fill_token_id: int) -> tuple[IntArray, BoolArray]:
        """Returns the tokens of some prompts as a right-aligned array.

        Args:
            indices: (K,) prompt numbers.
            width: P, at least the longest of them.
            fill_token_id: the id in front of shorter ones.

        Returns:
            (K, P) ids and the (K, P) mask of the real ones.
        """
        back = np.arange(width, 0, -1)  # how far a column stands from the end
        real = back <= self.lengths[indices][:, None]  # (K, P)
        places = np.where(real, self._ends[indices][:, None] - back, 0)
        return np.where(real, self._tokens[places], fill_token_id), real

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Prompt:
        return Prompt(index, self.texts[index], self.ids[index], {name: values[index] for name, values in self.columns.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> "PromptSet":
        return self

    def __repr__(self) -> str:
        return f"PromptSet({len(self)} prompts, columns={list(self.columns)})"


def read_prompts(prompts: Any) -> tuple[list[PromptText], dict[str, list[Any]]]:
    """Reads prompts from any of their sources.

    Returns:
        The prompts (strings or message lists) and the other columns, one value per prompt each.
    """
    rows = read_rows(prompts, "prompts", forms=_FORMS, required="prompt")
    where = row_name(prompts, "prompts")
    texts, others = zip(*(split_row(row, where.format(i)) for i, row in enumerate(rows)), strict=True)
    names = dict.fromkeys(name for columns in others for name in columns)
    return list(texts), {name: [columns.get(name) for columns in others] for name in names}


def split_row(row: Any, where: str) -> tuple[PromptText, dict[str, Any]]:
    """Splits one row into its prompt and its other columns, which hold plain Python values.

    Args:
        row: a string, a message list, or a dict with a `prompt` column.
        where: what error messages call the row.
    """
    if not isinstance(row, Mapping):
        return check_prompt(row, where), {}
    if "prompt" not in row:
        raise ValueError(f'{where} must have a "prompt" column, got the columns {list(row)}; rename the one that holds the prompt.')
    columns = {str(name): python_value(value) for name, value in row.items() if name != "prompt"}
    return check_prompt(python_value(row["prompt"]), where), columns


def check_prompt(prompt: Any, where: str) -> PromptText:
    """Returns `prompt` if it is a string or a list of messages; anything else is a `ValueError`."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or not prompt:
        raise ValueError(f"{where} must be a string or a non-empty list of {{role, content}} messages, got {prompt!r}.")
    for message in prompt:
        # a message that only calls tools needs no content
        if not isinstance(message, Mapping) or "role" not in message or not ("content" in message or message.get("tool_calls")):
            raise ValueError(f'{where} is a list, so it must hold messages with the keys "role" and "content", got {message!r}.')
    return [dict(message) for message in prompt]


def copy_prompt(prompt: PromptText) -> PromptText:
    """Returns `prompt` as an object of the caller's own: strings as they are, messages copied."""
    return prompt if isinstance(prompt, str) else deepcopy(prompt)


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[PromptText],
    where: str = "row {} of `prompts`",
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list[IntArray]:
    """Tokenises prompts as a causal language model expects them.

    Strings get the special tokens that the tokenizer puts in front (a BOS where it has one), unless they begin with them; an EOS that it
    appends by itself is dropped, since the completion goes on from there. Message lists go through the chat template, which writes its own
    special tokens: none is added a second time. A list that ends with an assistant message is continued; after any other the template's
    generation prompt follows.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: strings or message lists.
        where: what error messages call a prompt, with `{}` for its place.
        columns: the other columns of the rows, one value per prompt; `textgym.conversations.TEMPLATE_COLUMNS` go into the chat template.

    Returns:
        One int64 array per prompt, each of at least one token.
    """
    strings = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
    encoded: list[list[int]] = [[]] * len(prompts)
    for i, ids in zip(strings, encode_beginnings(tokenizer, [str(prompts[i]) for i in strings]), strict=True):
        encoded[i] = ids
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            text = conversation_text(tokenizer, prompt, where.format(i), columns=row_columns(columns, i))
            encoded[i] = encode_plain(tokenizer, [text])[0]
    for i, ids in enumerate(encoded):
        _check_ids(ids, len(tokenizer), prompts[i], where.format(i))
    return [np.array(ids, dtype=np.int64) for ids in encoded]


def _check_ids(ids: list[int], vocab_size: int, prompt: PromptText, where: str) -> None:
    if not ids:
        raise ValueError(
            f"{where} must have at least one token, but {prompt!r} has none in this tokenizer; "
            "begin the prompt with some text or with a token that starts a text, such as the tokenizer's `bos_token`."
        )
    if max(ids) >= vocab_size:
        raise ValueError(
            f"{where} has the token id {max(ids)}, but `len(tokenizer)` is {vocab_size}: the tokenizer's ids have holes; "
            "fill them with `tokenizer.add_tokens`."
        )
