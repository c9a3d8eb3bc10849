"""Prompts: reading them from every source, tokenising them once, and keeping the other columns for the rewards."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from copy import copy, deepcopy
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from textgym.types import BoolArray, IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, Any]]
PromptText: TypeAlias = str | Messages

_FORMS = (
    'a list of strings, a list of dicts with a "prompt" column, the path of a .jsonl or .jsonl.gz file, '
    "a `datasets.Dataset` or a `PromptSet`"
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
        prompts: a list of strings or message lists, a list of dicts with a `prompt` column, the path of a `.jsonl` or `.jsonl.gz` file,
            a `datasets.Dataset`, or another set, which is tokenised again when it was made with another tokenizer.
        tokenizer: a transformers tokenizer.

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
            self.texts, self.columns = prompts.texts, prompts.columns
        else:
            self.texts, self.columns = read_prompts(prompts)
        self.tokenizer = tokenizer
        self._set_ids(encode_prompts(tokenizer, self.texts))

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
    texts, others = zip(*(split_row(row, f"row {i} of `prompts`") for i, row in enumerate(rows)), strict=True)
    names = dict.fromkeys(name for columns in others for name in columns)
    return list(texts), {name: [columns.get(name) for columns in others] for name in names}


def read_rows(source: Any, argument: str, *, forms: str, required: str | None = None) -> list[Any]:
    """Reads the rows of a list, of a `.jsonl` or `.jsonl.gz` file, or of a `datasets.Dataset`; none at all is an error.

    Args:
        source: where the rows are.
        argument: what error messages call `source`.
        forms: what error messages say that `source` can be.
        required: a column that a data set must have.
    """
    if isinstance(source, str | os.PathLike):
        rows = _read_json_lines(Path(source), argument)
    elif hasattr(source, "column_names") and hasattr(source, "__getitem__"):
        rows = _read_dataset(source, argument, required)
    elif isinstance(source, Sequence):
        rows = list(source)
    else:
        raise ValueError(f"`{argument}` must be {forms}, got {type(source).__name__}.")
    if not rows:
        raise ValueError(f"`{argument}` must hold at least one {argument.removesuffix('s')}, got none; pass {forms}.")
    return rows


def split_row(row: Any, where: str) -> tuple[PromptText, dict[str, Any]]:
    """Splits one row into its prompt and its other columns.

    Args:
        row: a string, a message list, or a dict with a `prompt` column.
        where: what error messages call the row.
    """
    if not isinstance(row, Mapping):
        return check_prompt(row, where), {}
    if "prompt" not in row:
        raise ValueError(f'{where} must have a "prompt" column, got the columns {list(row)}; rename the one that holds the prompt.')
    return check_prompt(row["prompt"], where), {str(name): value for name, value in row.items() if name != "prompt"}


def check_prompt(prompt: Any, where: str) -> PromptText:
    """Returns `prompt` if it is a string or a list of messages; anything else is a `ValueError`."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or not prompt:
        raise ValueError(f"{where} must be a string or a non-empty list of {{role, content}} messages, got {prompt!r}.")
    for message in prompt:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f'{where} is a list, so it must hold messages with the keys "role" and "content", got {message!r}.')
    return [dict(message) for message in prompt]


def copy_prompt(prompt: PromptText) -> PromptText:
    """Returns `prompt` as an object of the caller's own: strings as they are, messages copied."""
    return prompt if isinstance(prompt, str) else deepcopy(prompt)


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[PromptText], where: str = "row {} of `prompts`"
) -> list[IntArray]:
    """Tokenises prompts as a causal language model expects them.

    Strings get the special tokens that the tokenizer puts in front (a BOS where it has one); an EOS that it appends by itself is dropped,
    since the completion goes on from there. Message lists go through the chat template, which writes its own special tokens: none is added
    a second time. A list that ends with an assistant message is continued; after any other the template's generation prompt follows.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: strings or message lists.
        where: what error messages call a prompt, with `{}` for its place.

    Returns:
        One int64 array per prompt, each of at least one token.
    """
    strings = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
    encoded: list[list[int]] = [[]] * len(prompts)
    for i, ids in zip(strings, _encode_strings(tokenizer, [str(prompts[i]) for i in strings]), strict=True):
        encoded[i] = ids
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            encoded[i] = encode_plain(tokenizer, [conversation_text(tokenizer, prompt, where.format(i))])[0]
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


def _encode_strings(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = _call(tokenizer, texts, add_special_tokens=True)
    end = tokenizer.eos_token_id
    suspects = [i for i, ids in enumerate(encoded) if len(ids) > 1 and ids[-1] == end]
    if suspects:
        plain = _call(tokenizer, [texts[i] for i in suspects], add_special_tokens=False)
        for i, ids in zip(suspects, plain, strict=True):
            # what ends the text by itself is the user's, one more end is the tokenizer's
            if _trailing(encoded[i], end) > _trailing(ids, end):
                encoded[i] = encoded[i][:-1]
    return encoded


def _trailing(ids: list[int], token: int) -> int:
    """Returns how often `token` stands at the end."""
    return len(list(takewhile(token.__eq__, reversed(ids))))


def _call(tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    # `truncation=False` also switches off a truncation that is stored in the tokenizer's own file.
    batch = tokenizer(
        texts, add_special_tokens=add_special_tokens, padding=False, truncation=False, return_attention_mask=False, verbose=False
    )
    return [list(ids) for ids in batch["input_ids"]]


def encode_plain(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of each text and nothing else: no BOS, no EOS, no truncation."""
    return _call(tokenizer, list(texts), add_special_tokens=False) if texts else []


def conversation_text(tokenizer: "PreTrainedTokenizerBase", messages: Messages, where: str, *, as_prompt: bool = True) -> str:
    """Returns a conversation in the words of the chat template.

    Args:
        tokenizer: a transformers tokenizer.
        messages: the conversation.
        where: what error messages call it.
        as_prompt: it is to be gone on with: a last assistant message stays open, after any other the generation prompt follows.
            Otherwise it is whole as it stands.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} is a list of messages, but the tokenizer has no chat template; "
            "set `tokenizer.chat_template` or give the prompt as a string."
        )
    if not as_prompt:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    continued = messages[-1]["role"] == "assistant"
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued)
    )


class JsonLine(NamedTuple):
    """A line of a file of JSON lines.

    Attributes:
        number: its place, counted from 1.
        row: what it holds; None if it cannot be read.
        problem: why it cannot be read, in a sentence that names it; None if it can.
    """

    number: int
    row: Any
    problem: str | None


def iterate_json_lines(path: Path, argument: str) -> Iterator[JsonLine]:
    """Reads a .jsonl or .jsonl.gz file line by line; blank lines are passed over, and a line that is broken hides no other.

    Args:
        path: the file.
        argument: what error messages call it.

    Raises:
        ValueError: the path ends otherwise, or there is no file.
    """
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(
            f"`{argument}` given as a path must end in .jsonl or .jsonl.gz, got {str(path)!r}; "
            f"pass one {argument.removesuffix('s')} as a list, `[...]`."
        )
    if not path.is_file():
        raise ValueError(f"`{argument}` given as a path must be a file, and there is none at {str(path)!r}.")
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_line(number, line, f"`{argument}`: line {number} of {str(path)!r}")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield JsonLine(number + 1, None, f"`{argument}`: line {number + 1} of {str(path)!r} and what follows is broken gzip ({error}).")


def _json_line(number: int, line: bytes, where: str) -> JsonLine:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return JsonLine(number, None, f"{where} is not UTF-8 ({error.reason}): {line.strip()[:80]!r}.")
    try:
        return JsonLine(number, json.loads(text), None)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        return JsonLine(number, None, f"{where} is not JSON ({reason}): {text.strip()[:80]!r}.")


def _read_json_lines(path: Path, argument: str) -> list[Any]:
    rows = []
    for line in iterate_json_lines(path, argument):
        if line.problem is not None:
            raise ValueError(line.problem)
        rows.append(line.row)
    return rows


def _read_dataset(dataset: Any, argument: str, required: str | None) -> list[Any]:
    names = dataset.column_names
    if not isinstance(names, list) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"`{argument}` must be one split of a map-style `datasets.Dataset`, got {type(dataset).__name__}; "
            'choose a split (`dataset["train"]`) or make a list of an iterable data set.'
        )
    if required is not None and required not in names:
        raise ValueError(
            f'`{argument}` must have a "{required}" column, got the columns {names}; use `dataset.rename_column(..., "{required}")`.'
        )
    columns = dataset[:]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
