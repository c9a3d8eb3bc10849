"""What a reward sees: a batch of completions with their prompts and the columns of the prompt data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeAlias

from textgym.tokenizers import Decode, decode_completions

Messages: TypeAlias = list[dict[str, Any]]
Prompt: TypeAlias = str | Messages

RESERVED_COLUMNS = frozenset(
    {"prompts", "completions", "completion_ids", "segments", "segment_ids", "segment_index", "trainer_state", "log_extra", "log_metric"}
)


@dataclass
class EpisodeBatch:
    """A batch of N completions (or of prefixes of completions) to be scored.

    Attributes:
        prompts: N prompts, each a string or a list of `{role, content}` messages.
        completion_ids: N lists of token ids, without filler tokens, with the EOS that ended the completion.
        columns: every other column of the prompt data, N values each.
        prompt_ids: the ids that the completions go on from, or only their ends (`textgym.tokenizers.prompt_ends`), N sequences. Default:
            none, as of texts that were tokenised on their own.
        decode: turns N prompts' and N completions' ids into the N texts of the completions, without special tokens
            (`textgym.tokenizers.decode_completions`). Called once, when a text is first asked for.
    """

    prompts: Sequence[Prompt]
    completion_ids: list[list[int]]
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    prompt_ids: Sequence[Sequence[int]] = field(default=(), kw_only=True)
    decode: Decode = field(kw_only=True)

    def __post_init__(self) -> None:
        """Checks that all columns have one value per completion."""
        n = len(self.completion_ids)
        self.prompt_ids = self.prompt_ids or [()] * n
        if len(self.prompts) != n:
            raise ValueError(f"`prompts` must hold one prompt per completion: {n} completions, {len(self.prompts)} prompts.")
        if len(self.prompt_ids) != n:
            raise ValueError(f"`prompt_ids` must hold one sequence per completion: {n} completions, {len(self.prompt_ids)} sequences.")
        for name, values in self.columns.items():
            if name in RESERVED_COLUMNS:
                raise ValueError(f"the prompt data has a column {name!r}, a name that rewards use for something else; rename the column.")
            if len(values) != n:
                raise ValueError(f"column {name!r} must hold one value per completion: {n} completions, {len(values)} values.")

    @classmethod
    def from_texts(cls, prompts: Sequence[Prompt], completions: Sequence[str], tokenizer: Any, **columns: list[Any]) -> "EpisodeBatch":
        """Makes a batch of texts, to try a reward out.

        Args:
            prompts: N prompts.
            completions: N texts, which stay as they are; the ids are those of `tokenizer`, without special tokens, and EOS is not
                appended.
            tokenizer: a transformers tokenizer.
            columns: further columns, N values each.
        """
        ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in completions]
        return cls(prompts, ids, columns, decode=partial(decode_completions, tokenizer))

    def __len__(self) -> int:
        """Returns N."""
        return len(self.completion_ids)

    def select(self, rows: Sequence[int], completion_ids: list[list[int]] | None = None) -> "EpisodeBatch":
        """Returns the batch of some rows, in that order; a row may come several times.

        Args:
            rows: K row numbers.
            completion_ids: K other completions of theirs, prefixes for instance. None: their own.
        """
        return EpisodeBatch(
            [self.prompts[row] for row in rows],
            [self.completion_ids[row] for row in rows] if completion_ids is None else completion_ids,
            {name: [values[row] for row in rows] for name, values in self.columns.items()},
            prompt_ids=[self.prompt_ids[row] for row in rows],
            decode=self.decode,
        )

    @cached_property
    def texts(self) -> list[str]:
        """The N completions as plain strings, without special tokens, as they read behind their prompts."""
        return list(self.decode(self.prompt_ids, self.completion_ids)) if self.completion_ids else []

    @cached_property
    def completions(self) -> list[Prompt]:
        """The N completions in the form of their prompts: a string, or `[{"role": "assistant", "content": text}]`."""
        return [as_completion(prompt, text) for prompt, text in zip(self.prompts, self.texts, strict=True)]


def as_completion(prompt: Prompt, text: str) -> Prompt:
    """Returns `text` in the form that rewards get for `prompt`: a string for a string, a message list for messages (as TRL)."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def completion_text(completion: Prompt) -> str:
    """Returns the text of a completion as rewards get it: the string, or the contents of the messages, one after the other."""
    return completion if isinstance(completion, str) else "".join(str(message.get("content") or "") for message in completion)


def excerpt(value: object, limit: int = 100) -> str:
    """Returns `repr(value)`, cut in the middle to about `limit` characters, for error messages."""
    shown = repr(value)
    half = (limit - 3) // 2
    return shown if len(shown) <= limit else f"{shown[:half]}...{shown[-half:]}"


def describe_row(batch: EpisodeBatch, row: int) -> str:
    """Returns `row 3 (prompt '...', completion '...')`, for error messages."""
    return f"row {row} (prompt {excerpt(batch.prompts[row])}, completion {excerpt(batch.texts[row])})"
