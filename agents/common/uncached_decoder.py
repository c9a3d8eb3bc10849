"""Rows that grow by one token per model step, each time run from their start: for models whose caches cannot be relied on."""

import torch
from torch import Tensor

from textgym.agents.common.backbone import Backbone


class UncachedDecoder:
    """A `Decoder` that is right for every causal model, at the cost of a whole pass per token.

    Args:
        backbone: the model.
        prompt_ids: (B, P) int64, left-padded.
        prompt_lengths: (B,) int64.
        index: the prompt of each row, (rows,) int64.
        max_new_tokens: how many tokens may be appended.

    Attributes:
        logits: of the next token, (rows, V), in the model's dtype.
    """

    def __init__(self, backbone: Backbone, prompt_ids: Tensor, prompt_lengths: Tensor, index: Tensor, max_new_tokens: int) -> None:
        self._backbone = backbone
        width = prompt_ids.shape[1]
        columns = torch.arange(width + max_new_tokens, device=prompt_ids.device)
        source = columns + (width - prompt_lengths).unsqueeze(1)
        ids = prompt_ids.gather(1, source.clamp(max=width - 1)).masked_fill(source >= width, 0)
        self._ids, self._lengths = ids[index], prompt_lengths[index]
        self.logits = self._run(ids, prompt_lengths)[index]

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        self._ids[torch.arange(len(tokens), device=tokens.device), self._lengths] = tokens
        self._lengths = self._lengths + 1
        self.logits = self._run(self._ids, self._lengths)
        return self.logits

    def select(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self._ids, self._lengths, self.logits = self._ids[rows], self._lengths[rows], self.logits[rows]

    def _run(self, ids: Tensor, lengths: Tensor) -> Tensor:
        rows = torch.arange(len(ids), device=ids.device)
        features, _ = self._backbone.states_of(ids, lengths, rows, lengths - 1)
        return self._backbone.logits(features)
