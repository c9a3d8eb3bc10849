"""Rows that grow by one token per model step, run by transformers' own forward."""

import torch
from torch import Tensor

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.kv_cache import PreallocatedLayer, preallocated_cache


class CachedDecoder:
    """Left-padded rows that grow by one token per call, at the cost of one token per call. A `Decoder` for every causal model.

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
        width = prompt_ids.shape[1]
        columns = torch.arange(width, device=prompt_ids.device)
        padding = width - prompt_lengths  # (B,)
        valid = columns >= padding.unsqueeze(1)  # (B, width)
        positions = (columns - padding.unsqueeze(1)).clamp_(min=0)
        self._backbone = backbone
        self._capacity = width + max_new_tokens
        self._filled = width
        self._cache = preallocated_cache(backbone.config.num_hidden_layers, width) if backbone.dense_mask else backbone.new_cache()
        features = backbone.features(prompt_ids, positions, self._prefill_mask(valid), self._cache)
        self.logits = backbone.logits(features[:, -1])
        # Columns past the prompt are seen as soon as they are filled, so they can be True from the start.
        self._visible = torch.nn.functional.pad(valid, (0, max_new_tokens), value=True)
        self._next_position = prompt_lengths.unsqueeze(1).clone()
        self._reorder(index)

    def step(self, tokens: Tensor) -> Tensor:
        """Appends `tokens` (rows,) int64 and returns the logits after them, (rows, V)."""
        self._filled += 1
        mask = self._attention[..., : self._filled]
        features = self._backbone.features(tokens.unsqueeze(1), self._next_position, mask, self._cache)
        self._next_position = self._next_position + 1
        self.logits = self._backbone.logits(features[:, -1])
        return self.logits

    def select(self, rows: Tensor) -> None:
        """Goes on with `rows` only, (rows,) int64 indices into the present ones."""
        self._reorder(rows)

    def _prefill_mask(self, valid: Tensor) -> Tensor:
        if not self._backbone.dense_mask:
            return valid
        width = valid.shape[1]
        causal = torch.ones((width, width), dtype=torch.bool, device=valid.device).tril()
        # A padding position sees itself: a row that sees nothing is NaN in some kernels, and 0 * NaN would reach the others.
        itself = torch.eye(width, dtype=torch.bool, device=valid.device)
        return self._backbone.attention((causal & valid[:, None, None, :]) | itself)

    def _reorder(self, rows: Tensor) -> None:
        if self._backbone.dense_mask:
            for layer in self._cache.layers:
                assert isinstance(layer, PreallocatedLayer), "preallocated_cache makes nothing else"
                layer.select(rows, self._capacity)
        else:
            self._cache.batch_select_indices(rows)
        self.logits = self.logits.index_select(0, rows)
        self._visible = self._visible.index_select(0, rows)
        self._next_position = self._next_position.index_select(0, rows)
        self._attention = self._backbone.attention(self._visible[:, None, None, :]) if self._backbone.dense_mask else self._visible
