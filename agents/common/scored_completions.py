"""Completions with their rewards, outside an environment: prompts read once, sampled or given texts, scored by a `RewardSet`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from textgym.agents.common.generation import Generation
from textgym.agents.common.offline_rows import Example, Ids
from textgym.agents.common.offline_tokens import tokenise
from textgym.agents.policy import CausalLMPolicy
from textgym.conversations import row_columns
from textgym.pending import Pending
from textgym.prompts import PromptSet, PromptText, read_prompts
from textgym.rewards.compose import EpisodeBatch, RewardSet, Scores, TokenScores
from textgym.tokenizers import Decode

Float64Array = np.ndarray[Any, np.dtype[np.float64]]


class Sampler(Protocol):
    """What completes prompts: a `CausalLMPolicy`, or a `BestOfN` around one."""

    def generate(self, prompts: Any, max_new_tokens: int, *, num_generations: int, generator: torch.Generator) -> Generation:
        """See `CausalLMPolicy.generate`."""
        ...


@dataclass(frozen=True)
class PromptRows:
    """Prompts with the other columns of their rows, which rewards get.

    Attributes:
        texts: N strings or message lists.
        columns: N values each.
    """

    texts: list[PromptText]
    columns: Mapping[str, list[Any]]

    @classmethod
    def read(cls, prompts: Any) -> "PromptRows":
        """Reads prompts in every form that an environment takes."""
        if isinstance(prompts, PromptRows):
            return prompts
        return cls(prompts.texts, prompts.columns) if isinstance(prompts, PromptSet) else cls(*read_prompts(prompts))

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> "PromptRows":
        """Returns some rows, in that order; a row may come several times."""
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        return PromptRows([self.texts[i] for i in indices], columns)

    def batches(self, size: int) -> Iterator["PromptRows"]:
        """Yields the rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.select(range(start, min(start + size, len(self))))

    def as_rows(self) -> list[dict[str, Any]]:
        """Returns one dict per prompt."""
        return [{"prompt": text, **{name: values[i] for name, values in self.columns.items()}} for i, text in enumerate(self.texts)]


def score(reward: RewardSet, prompts: PromptRows, prompt_ids: list[list[int]], completion_ids: list[list[int]], decode: Decode) -> Scores:
    """Scores completions as an environment does at their end: the weighted sum of all parts, dense ones summed over the tokens.

    Args:
        reward: the rewards.
        prompts: one row per completion.
        prompt_ids: N lists of tokens, those of the prompts.
        completion_ids: N lists of tokens, EOS included.
        decode: the ids of prompts and completions to the completions' texts without special tokens.

    Returns:
        (N,) rewards, and the unweighted ones of each part, (N,) with NaN where a part did not apply.
    """
    return start_scoring(reward, prompts, prompt_ids, completion_ids, decode).result()


def start_scoring(
    reward: RewardSet, prompts: PromptRows, prompt_ids: list[list[int]], completion_ids: list[list[int]], decode: Decode
) -> Pending[Scores]:
    """Starts `score`, so that something else can be done while rewards that are async functions are waited for."""
    batch = EpisodeBatch(prompts.texts, completion_ids, prompts.columns, prompt_ids=prompt_ids, decode=decode)
    with reward.start_dense_sequence(batch, np.ones(len(batch), dtype=np.bool_)) as dense:
        final = reward.start_terminal(batch)

    def add_up(paid: tuple[TokenScores, Scores]) -> Scores:
        (token_rewards, token_parts), (totals, parts) = paid
        sums = {name: np.array([row.sum() for row in rows]) for name, rows in token_parts.items()}
        return totals + np.array([row.sum() for row in token_rewards]), reward.in_order(parts | sums)

    return dense.beside(final).then(add_up)


def text_ids(policy: CausalLMPolicy, prompts: PromptRows, texts: Sequence[str], where: str) -> tuple[list[Ids], list[Ids]]:
    """Tokenises given texts as completions of their prompts, each ended by EOS, as SFT reads its examples.

    Args:
        policy: gives the tokenizer and the ids that end a completion.
        prompts: one row per text.
        texts: the completions.
        where: how error messages name a row, with `{}` for its place.

    Returns:
        the ids of the prompts, and those of the completions.
    """
    rows_of_texts = enumerate(zip(prompts.texts, texts, strict=True))
    examples = [Example(prompt, [text], columns=row_columns(prompts.columns, row)) for row, (prompt, text) in rows_of_texts]
    rows = tokenise(examples, policy.tokenizer, policy.eos_token_ids, where, append_eos=True)
    return [row.prompt for row in rows], [row.completions[0] for row in rows]
