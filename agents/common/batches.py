"""The batches that learning works on: one id row per episode, never one observation per token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textgym.types import Info


@dataclass(frozen=True)
class StepObservations:
    """What the policy saw at every single step: kept only where a wrapper breaks the concatenation of tokens.

    Attributes:
        input_ids: (B, T + 1, L) int64, the observation's ids before token t, and that after the last one.
        attention_mask: (B, T + 1, L) bool.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def select(self, rows: Tensor) -> "StepObservations":
        """Returns the rows `rows` (an index tensor)."""
        return StepObservations(self.input_ids[rows], self.attention_mask[rows])


@dataclass(frozen=True)
class RolloutBatch:
    """Episodes sampled by the behaviour policy, with what the environment paid for each token.

    Rows are prompt-major: the `num_generations` completions of one prompt stand next to each other.

    Attributes:
        prompt_ids: (B, P) int64, left-padded.
        prompt_lengths: (B,) int64.
        completion_ids: (B, T) int64, the tokens the policy chose; whatever stands at or beyond `lengths` means nothing.
        lengths: (B,) int64, tokens of each completion that the environment took, EOS included.
        log_probs: (B, T) float32, log-probs under the behaviour policy's sampling distribution, zero on padding.
        rewards: (B, T) float32, what the agent maximises (with KL shaping and every wrapper of the user in it), zero on padding.
        truncated: (B,) bool, cut by an outer time limit: the return goes on beyond the last token.
        unshaped_returns: (B,) float32, the summed rewards without the KL term.
        kl_per_sequence: (B,) float32, Σ_t log π − log π_ref in nats; NaN where nothing measured it.
        num_generations: G, completions per prompt.
        reference_log_probs: (B, T) float32, log π_ref of the tokens, zero on padding; only for agents that apply β themselves.
        kept: (B, T, ceil(V/8)) uint8 bits of the tokens that truncated sampling or a mask kept, or None for the whole vocabulary.
        steps: the observations step by step, only if they are not the concatenation of prompt and completion.
        infos: the final info of each episode.
    """

    prompt_ids: Tensor
    prompt_lengths: Tensor
    completion_ids: Tensor
    lengths: Tensor
    log_probs: Tensor
    rewards: Tensor
    truncated: Tensor
    unshaped_returns: Tensor
    kl_per_sequence: Tensor
    num_generations: int = 1
    reference_log_probs: Tensor | None = None
    kept: Tensor | None = None
    steps: StepObservations | None = None
    infos: Sequence[Info] = ()

    def __len__(self) -> int:
        return int(self.lengths.shape[0])

    @property
    def completion_mask(self) -> Tensor:
        """(B, T) bool, True where the policy chose the token."""
        return torch.arange(self.completion_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @property
    def num_tokens(self) -> int:
        """The tokens the policy chose, over all rows."""
        return int(self.lengths.sum())

    @property
    def pass_tokens(self) -> Tensor:
        """(B,) int64, the tokens that a pass over each row reads at most, prompt included; a closed-loop row is read once per step."""
        if self.steps is None:
            return self.prompt_lengths + self.lengths
        return (self.lengths + 1) * self.steps.input_ids.shape[2]

    @property
    def returns(self) -> Tensor:
        """(B,) the undiscounted sum of `rewards`."""
        return self.rewards.sum(1)

    def select(self, rows: Tensor) -> "RolloutBatch":
        """Returns the rows `rows` (an index tensor), without the columns that none of them uses."""
        chosen = {f.name: getattr(self, f.name)[rows] for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        length, prompt_length = int(chosen["lengths"].max()), int(chosen["prompt_lengths"].max())
        for name in ("completion_ids", "log_probs", "reference_log_probs", "rewards", "kept"):
            if name in chosen:
                chosen[name] = chosen[name][:, :length]
        chosen["prompt_ids"] = chosen["prompt_ids"][:, chosen["prompt_ids"].shape[1] - prompt_length :]
        steps = self.steps.select(rows) if self.steps is not None else None
        if steps is not None:
            steps = StepObservations(steps.input_ids[:, : length + 1], steps.attention_mask[:, : length + 1])
        infos = [self.infos[i] for i in rows.tolist()] if self.infos else ()
        return replace(self, **chosen, steps=steps, infos=infos)

    @staticmethod
    def concatenate(batches: Sequence["RolloutBatch"]) -> "RolloutBatch":
        """Stacks batches of the same widths below each other."""
        if len(batches) == 1:
            return batches[0]
        if len({b.steps is None for b in batches}) == 2:
            raise RuntimeError("Some walks of one rollout were open-loop and others closed-loop; this is a bug of the rollout collector.")
        joined: dict[str, Any] = {
            f.name: torch.cat([getattr(b, f.name) for b in batches])
            for f in fields(RolloutBatch)
            if isinstance(getattr(batches[0], f.name), Tensor)
        }
        steps = None
        if batches[0].steps is not None:
            parts = [b.steps for b in batches if b.steps is not None]
            steps = StepObservations(torch.cat([p.input_ids for p in parts]), torch.cat([p.attention_mask for p in parts]))
        infos = [info for b in batches for info in b.infos]
        return replace(batches[0], **joined, steps=steps, infos=infos)


def micro_batches(lengths: Tensor, size: int | None, tokens: int | None) -> list[Tensor]:
    """Splits rows into parts that are run one after the other.

    Args:
        lengths: tokens of each row, prompt included, (B,) int64.
        size: rows of a part, at most; None for no bound.
        tokens: tokens of a part, padding included: its longest row times its rows, at most; a longer row is a part by itself. None for no
            bound.

    Returns:
        Index tensors on the CPU that hold each row once: in the rows' own order, or, with `tokens`, the longest first (rows of the same
        length in their own order), so that rows of like length stand together.
    """
    count = len(lengths)
    size = size or max(1, count)
    if tokens is None:
        return list(torch.arange(count).split(size)) if count else []
    lengths = lengths.cpu()
    order = lengths.argsort(descending=True, stable=True)
    parts, start = [], 0
    while start < count:
        fitting = max(1, tokens // max(1, int(lengths[order[start]])))
        parts.append(order[start : start + min(size, fitting)])
        start += len(parts[-1])
    return parts


def minibatches(count: int, batch_size: int, generator: np.random.Generator) -> Iterator[Tensor]:
    """Yields index tensors that go once through `count` rows in random order, `batch_size` at a time (the last may be smaller)."""
    order = torch.from_numpy(generator.permutation(count))
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size]
