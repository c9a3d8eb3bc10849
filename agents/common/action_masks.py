"""Masks over the vocabulary that follow the rows of a decode loop."""

from typing import Protocol

import torch
from torch import Tensor

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.decoders import Decoder, make_decoder
from textgym.agents.common.sampling import TokenRule


class ActionMasker(Protocol):
    """Says at every step which tokens are legal; follows the rows of a decode loop as they grow."""

    def start(self, prompt_ids: Tensor, prompt_lengths: Tensor, max_new_tokens: int, num_generations: int) -> Tensor:
        """Returns the legal first tokens, (B * num_generations, V) bool, for left-padded prompts (B, P)."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Returns the legal next tokens, (rows, V) bool, after `tokens` (rows,) were appended; rows that have ended get any token."""
        ...

    def select(self, rows: Tensor) -> None:
        """Goes on with `rows` only (int64 indices into the present ones)."""
        ...


class PolicyMask:
    """The tokens that another model keeps (its top-k, top-p, min-p set), as an `ActionMasker` that runs beside the decode loop.

    Args:
        backbone: the model that decides.
        rule: which tokens it keeps.
    """

    def __init__(self, backbone: Backbone, rule: TokenRule) -> None:
        if not rule.sampling.truncates:
            raise ValueError("`sampling` of a PolicyMask must leave something out: set top_k, top_p or min_p.")
        self._backbone = backbone
        self._rule = rule
        self._decoder: Decoder | None = None

    def start(self, prompt_ids: Tensor, prompt_lengths: Tensor, max_new_tokens: int, num_generations: int) -> Tensor:
        """See `ActionMasker`."""
        index = torch.arange(len(prompt_ids), device=prompt_ids.device).repeat_interleave(num_generations)
        self._decoder = None  # the next one can use its memory
        self._decoder = make_decoder(self._backbone, prompt_ids, prompt_lengths, index, max_new_tokens)
        return self._rule(self._decoder.logits)

    def step(self, tokens: Tensor) -> Tensor:
        """See `ActionMasker`."""
        assert self._decoder is not None, "the decode loop calls start first"
        return self._rule(self._decoder.step(tokens))

    def select(self, rows: Tensor) -> None:
        """See `ActionMasker`."""
        assert self._decoder is not None, "the decode loop calls start first"
        self._decoder.select(rows)
