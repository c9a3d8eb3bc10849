"""The data that offline learners work on: every different completion stored once, examples as places in that store, batches of them.

Letters: N examples, K completions of an example (the longest ranking), C stored completions, B examples of a batch, U different
completions in it, T tokens.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from textgym.agents.common.masking import completion_mask_from_lengths
from textgym.agents.common.offline_rows import Example
from textgym.agents.common.offline_tokens import TokenisedExample
from textgym.types import IntArray
from textgym.unknown_tokens import check_known


class TokenRows:
    """Id lists, one after the other in one array.

    Args:
        rows: id lists.

    Attributes:
        lengths: (R,) int64.
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.lengths: IntArray = np.array([len(row) for row in rows], dtype=np.int64)
        self._tokens: IntArray = np.array([token for row in rows for token in row], dtype=np.int64)
        self._starts: IntArray = np.cumsum(self.lengths) - self.lengths

    def padded(self, indices: IntArray, *, left: bool) -> Tensor:
        """Returns rows `indices` (R',) as (R', W) int64, zeros before (`left`) or behind them."""
        lengths = self.lengths[indices, None]
        columns = np.arange(lengths.max()) - (lengths.max() - lengths if left else 0)
        real = (columns >= 0) & (columns < lengths)
        return torch.from_numpy(np.where(real, self._tokens[np.where(real, self._starts[indices, None] + columns, 0)], 0))

    def check_known(self, tokenizer: Any, what: str, name: Callable[[int], str]) -> None:
        """Warns where many tokens are unknown to their tokenizer; see `textgym.unknown_tokens.check_known`."""
        check_known(tokenizer, self._tokens, self.lengths, what, name)

    def checksum(self) -> int:
        """A number that other rows hardly have."""
        return zlib.crc32(self._tokens.tobytes(), zlib.crc32(self.lengths.tobytes()))


@dataclass(frozen=True)
class CompletionBatch:
    """Completions with their prompts.

    Attributes:
        prompt_ids: (U, P) int64, left-padded.
        prompt_lengths: (U,) int64.
        completion_ids: (U, T) int64; whatever stands at or beyond `lengths` means nothing.
        lengths: (U,) int64.
        prompt_index: (U,) int64, equal for completions of the same prompt.
    """

    prompt_ids: Tensor
    prompt_lengths: Tensor
    completion_ids: Tensor
    lengths: Tensor
    prompt_index: Tensor

    def __len__(self) -> int:
        return int(self.lengths.shape[0])

    @property
    def completion_mask(self) -> Tensor:
        """(U, T) bool, True at the completion's tokens."""
        return completion_mask_from_lengths(self.lengths, self.completion_ids.shape[1])


@dataclass(frozen=True)
class ExampleBatch:
    """Some examples; a completion that occurs in several of them is there, and is scored, once.

    Attributes:
        completions: the U different completions.
        places: (B, K) int64, which of them each example has, in its order; 0 where `present` is False.
        present: (B, K) bool.
        labels: (B,) float32, see `Example.label`.
        weights: (B,) float32, of mean 1 over the whole data set.
        reference_log_probs: (U,) float32, log π_ref(y|x) in nats; None where the algorithm has no reference.
    """

    completions: CompletionBatch
    places: Tensor
    present: Tensor
    labels: Tensor
    weights: Tensor
    reference_log_probs: Tensor | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def gather(self, values: Tensor) -> Tensor:
        """Hands numbers of completions (U, ...) to the examples that have them, (B, K, ...); those of absent ones mean nothing."""
        return values[self.places]


class ExampleSet:
    """A data set of offline learning.

    Args:
        examples: the rows.
        tokens: their ids.
        names: what error messages call each, N; by default its place.

    Attributes:
        num_tokens: (N,) int64, completion tokens of each example, all its completions together.
        pass_tokens: (N,) int64, K times the longest completion of each example with its prompt: tokens that it takes of a pass at most.
        reference_log_probs: (C,) float32, once an agent has worked them out.
        places: (N,) int64, which row of its source each example was; rows that `max_tokens` left out are missing.
    """

    def __init__(self, examples: Sequence[Example], tokens: Sequence[TokenisedExample], names: Sequence[str] = ()) -> None:
        self.names = list(names) or [f"row {number}" for number in range(len(tokens))]
        prompts: dict[tuple[int, ...], int] = {}
        pairs: dict[tuple[int, tuple[int, ...]], int] = {}
        index = np.full((len(tokens), max(len(row.completions) for row in tokens)), -1, dtype=np.int64)
        for number, row in enumerate(tokens):
            prompt = prompts.setdefault(tuple(row.prompt), len(prompts))
            for place, ids in enumerate(row.completions):
                index[number, place] = pairs.setdefault((prompt, tuple(ids)), len(pairs))
        self.prompts, self.completions = TokenRows(list(prompts)), TokenRows([ids for _, ids in pairs])
        self.prompt_of: IntArray = np.array([prompt for prompt, _ in pairs], dtype=np.int64)  # (C,)
        self.index = torch.from_numpy(index)  # (N, K), -1 where a ranking is shorter
        self.labels = torch.tensor([example.label for example in examples], dtype=torch.float32)
        weights = torch.tensor([example.weight for example in examples], dtype=torch.float64)
        self.weights = (weights / weights.mean()).float()
        lengths = np.where(index >= 0, self.completions.lengths[index], 0)
        self.num_tokens = torch.from_numpy(lengths.sum(axis=1))
        longest = np.where(index >= 0, self.pair_lengths[index], 0).max(axis=1)
        self.pass_tokens = torch.from_numpy(index.shape[1] * longest)
        self.reference_log_probs: Tensor | None = None
        self.places: IntArray = np.arange(len(tokens))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_completions(self) -> int:
        """C, different pairs of prompt and completion."""
        return len(self.prompt_of)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and completion together."""
        return int(self.pair_lengths.max())

    @property
    def pair_lengths(self) -> IntArray:
        """Tokens of each completion with its prompt, (C,)."""
        return self.prompts.lengths[self.prompt_of] + self.completions.lengths

    def pair(self, prompts: IntArray, completions: IntArray, device: torch.device) -> CompletionBatch:
        """Returns completions behind prompts, which need not be their own.

        Args:
            prompts: places in `self.prompts`, (U,).
            completions: places among the C completions, (U,).
            device: where the tensors go.
        """
        return CompletionBatch(
            prompt_ids=self.prompts.padded(prompts, left=True).to(device),
            prompt_lengths=torch.from_numpy(self.prompts.lengths[prompts]).to(device),
            completion_ids=self.completions.padded(completions, left=False).to(device),
            lengths=torch.from_numpy(self.completions.lengths[completions]).to(device),
            prompt_index=torch.from_numpy(prompts).to(device),
        )

    def completion_batch(self, completions: IntArray, device: torch.device) -> CompletionBatch:
        """Returns completions (U,) behind their own prompts."""
        return self.pair(self.prompt_of[completions], completions, device)

    def select(self, rows: Tensor, device: torch.device) -> ExampleBatch:
        """Returns the examples `rows` (an index tensor on the CPU)."""
        index = self.index[rows]
        index = index[:, : int((index >= 0).sum(1).max())]
        present = index >= 0
        completions, places = torch.unique(index[present], return_inverse=True)
        reference = self.reference_log_probs
        return ExampleBatch(
            completions=self.completion_batch(completions.numpy(), device),
            places=torch.zeros_like(index).masked_scatter(present, places).to(device),
            present=present.to(device),
            labels=self.labels[rows].to(device),
            weights=self.weights[rows].to(device),
            reference_log_probs=None if reference is None else reference[completions].to(device),
        )

    def same_sides(self) -> npt.NDArray[np.bool_]:
        """Returns which examples compare completions that are all the same tokens, (N,)."""
        present = self.index >= 0
        same = ((self.index == self.index[:, :1]) | ~present).all(1) & (present.sum(1) > 1)
        return np.asarray(same.numpy())

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data set from others, as JSON types."""
        return {
            "num_items": len(self),
            "tokens": int(self.num_tokens.sum()),
            "checksum": self.prompts.checksum() ^ self.completions.checksum(),
        }
