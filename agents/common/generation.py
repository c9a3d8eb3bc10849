"""What is asked of an engine that samples completions, and what it gives back."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from textgym.agents.common.action_masks import ActionMasker
from textgym.agents.common.sampling import Sampling
from textgym.tokenizers import Decode


@dataclass(eq=False)
class Generation:
    """Completions, one per row. Rows are prompt-major: row `i * num_generations + j` is completion `j` of prompt `i`.

    Attributes:
        ids: (B, T) int64, T = `max_new_tokens`; row i counts up to `lengths[i]` (EOS included), the rest is filler.
        lengths: (B,) int64, from 1 to T.
        log_probs: log-probs of `ids` under the distribution they were drawn from, in nats, zero on filler, (B, T) float32.
        prompt_ids: (B, P) int64, left-padded.
        prompt_lengths: (B,) int64.
        kept: the packed kept set of every draw (`sampling.unpack_kept` gives booleans), (B, T, ceil(V/8)) uint8; None when every token
            could be drawn at every step.
        stopped: the row ended because its text contains a stop string, (B,) bool.
        eos_token_ids: the ids that ended a row.
        decode: the ids of prompts and completions to texts, for `texts`.
    """

    ids: Tensor
    lengths: Tensor
    log_probs: Tensor
    prompt_ids: Tensor
    prompt_lengths: Tensor
    kept: Tensor | None
    stopped: Tensor
    eos_token_ids: tuple[int, ...]
    decode: Decode = field(repr=False)

    @cached_property
    def completion_ids(self) -> list[list[int]]:
        """The ids of each row without filler, EOS kept."""
        return [row[:length] for row, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    @cached_property
    def prompt_id_lists(self) -> list[list[int]]:
        """The ids of each row's prompt, without filler."""
        return without_filler(self.prompt_ids, self.prompt_lengths)

    @cached_property
    def texts(self) -> list[str]:
        """The completions as text, as they read behind their prompts, without special tokens; decoded when first asked for."""
        return self.decode(self.prompt_id_lists, self.completion_ids)

    @property
    def completion_mask(self) -> Tensor:
        """True on the tokens that were drawn, (B, T) bool."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths.unsqueeze(1)

    @cached_property
    def finish_reasons(self) -> list[str]:
        """Why each row ended: "eos", "stop" (a stop string; the last token may be EOS as well) or "length"."""
        ends = [row[-1] in self.eos_token_ids for row in self.completion_ids]
        return ["stop" if stop else "eos" if eos else "length" for stop, eos in zip(self.stopped.tolist(), ends, strict=True)]


@dataclass(frozen=True)
class DecodeOptions:
    """What `decode` needs besides the prompts.

    Attributes:
        max_new_tokens: T.
        sampling: the distribution to draw from.
        num_generations: completions per prompt; the prompt is run once.
        max_batch_size: rows that are decoded at a time; a further one begins when there is room. None: all.
        greedy: take the most probable token instead of drawing; `log_probs` stay those of `sampling`.
        epsilon: draw ε-greedily over the legal tokens that `sampling` keeps; `log_probs` are those of that draw. None: do not.
        min_new_tokens: EOS is no legal token before that many.
        eos_token_ids: ids that end a row.
        fill_token_id: stands where a row has ended.
        stop_strings: a row ends with the token that makes its text contain one.
        action_mask: legal tokens, (V,) or (B, V) bool, or an `ActionMasker`.
    """

    max_new_tokens: int
    sampling: Sampling
    num_generations: int = 1
    max_batch_size: int | None = None
    greedy: bool = False
    epsilon: float | None = None
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    fill_token_id: int = 0
    stop_strings: tuple[str, ...] = ()
    action_mask: Tensor | ActionMasker | None = None

    def __post_init__(self) -> None:
        """Refuses a stop string that every text contains."""
        if any(not isinstance(stop, str) or not stop for stop in self.stop_strings):
            raise ValueError(f"`stop_strings` must be texts of at least one character, got {list(self.stop_strings)}.")


def without_filler(prompt_ids: Tensor, prompt_lengths: Tensor) -> list[list[int]]:
    """Returns the ids of left-padded prompts (B, P) with lengths (B,) as lists."""
    width = prompt_ids.shape[1]
    return [row[width - length :] for row, length in zip(prompt_ids.tolist(), prompt_lengths.tolist(), strict=True)]
