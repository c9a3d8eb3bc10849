"""Rows that grow by one token per model step, and masks over the vocabulary that follow them."""

from typing import Protocol

import torch
from torch import Tensor

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.kv_cache import PreallocatedLayer, preallocated_cache
from textgym.agents.common.sampling import TokenRule


class CachedDecoder:
    """Left-padded rows that grow by one token per call, at the cost of one token per call.

    Args:
        backbone: the model.
        prompt_ids: (B, P) int64, left-padded.
        prompt_lengths: (B,) int64.
        max_new_tokens: how many tokens may be appended.
        repeats: copies of each prompt, prompt-major; the prompt itself is run once.

    Attributes:
        logits: of the next token, (B * repeats, V), in the model's dtype.
    """

    def __init__(self, backbone: Backbone, prompt_ids: Tensor, prompt_lengths: Tensor, max_new_tokens: int, repeats: int = 1) -> None:
        width = int(prompt_lengths.max())
        backbone.check_length(width + max_new_tokens, "Generation")
        prompt_ids = prompt_ids[:, prompt_ids.shape[1] - width :]
        columns = torch.arange(width, device=prompt_ids.device)
        padding = width - prompt_lengths  # (B,)
        valid = columns >= padding.unsqueeze(1)  # (B, width)
        prompt_ids = prompt_ids.masked_fill(~valid, 0)
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
        self._reorder(torch.arange(prompt_ids.shape[0], device=prompt_ids.device).repeat_interleave(repeats))

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


class ActionMasker(Protocol):
    """Says at every step which tokens are legal; follows the rows of a decode loop as they grow."""

    def start(self, prompt_ids: Tensor, prompt_lengths: Tensor, max_new_tokens: int, num_generations: int) -> Tensor:
        """Returns the legal first tokens, (B * num_generations, V) bool, for left-padded prompts (B, P)."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Returns the legal next tokens, (rows, V) bool, after `tokens` (rows,) were appended."""
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
        self._decoder: CachedDecoder | None = None

    def start(self, prompt_ids: Tensor, prompt_lengths: Tensor, max_new_tokens: int, num_generations: int) -> Tensor:
        """See `ActionMasker`."""
        self._decoder = CachedDecoder(self._backbone, prompt_ids, prompt_lengths, max_new_tokens, num_generations)
        return self._rule(self._decoder.logits)

    def step(self, tokens: Tensor) -> Tensor:
        """See `ActionMasker`."""
        assert self._decoder is not None, "the decode loop calls start first"
        return self._rule(self._decoder.step(tokens))

    def select(self, rows: Tensor) -> None:
        """See `ActionMasker`."""
        assert self._decoder is not None, "the decode loop calls start first"
        self._decoder.select(rows)
