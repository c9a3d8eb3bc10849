"""Rows that grow by one token per model step, run by transformers' own forward with a key-value cache."""

from typing import Literal

import torch
from torch import Tensor

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.kv_cache import PreallocatedLayer, preallocated_cache


class CachedDecoder:
    """Left-padded rows that grow by one token per call, at the cost of one token per call. A `Decoder`.

    Args:
        backbone: the model.
        prompt_ids: (B, P) int64, left-padded.
        prompt_lengths: (B,) int64.
        index: the prompt of each row, (rows,) int64.
        max_new_tokens: how many tokens may be appended.
        masks: "ready-made", on a preallocated cache, where the model takes them; "the model's", made from where padding is, on
            transformers' cache; "none" where there is no padding, since all prompts are of one length.

    Attributes:
        logits: of the next token, (rows, V), in the model's dtype.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        index: Tensor,
        max_new_tokens: int,
        masks: Literal["ready-made", "the model's", "none"],
    ) -> None:
        width = prompt_ids.shape[1]
        columns = torch.arange(width, device=prompt_ids.device)
        padding = width - prompt_lengths  # (B,)
        valid = columns >= padding.unsqueeze(1)  # (B, width)
        positions = (columns - padding.unsqueeze(1)).clamp_(min=0)
        self._backbone, self._masks = backbone, masks
        self._capacity = width + max_new_tokens
        self._filled = width
        self._cache = preallocated_cache(backbone.num_layers, width) if masks == "ready-made" else backbone.new_cache()
        features = backbone.features(prompt_ids, positions, self._prefill_mask(valid), self._cache)
        self.logits = backbone.logits(features[:, -1])
        # Columns past the prompt are seen as soon as they are filled, so they can be True from the start.
        self._visible = torch.nn.functional.pad(valid, (0, max_new_tokens), value=True)
        self._next_position = prompt_lengths.unsqueeze(1).clone()
        self._attention: Tensor | None
        self._reorder(index)

    def step(self, tokens: Tensor) -> Tensor:
        """Appends `tokens` (rows,) int64 and returns the logits after them, (rows, V)."""
        self._filled += 1
        mask = None if self._attention is None else self._attention[..., : self._filled]
        features = self._backbone.features(tokens.unsqueeze(1), self._next_position, mask, self._cache)
        self._next_position = self._next_position + 1
        self.logits = self._backbone.logits(features[:, -1])
        return self.logits

    def select(self, rows: Tensor) -> None:
        """Goes on with `rows` only, (rows,) int64 indices into the present ones."""
        self._reorder(rows)

    def _prefill_mask(self, valid: Tensor) -> Tensor | None:
        if self._masks != "ready-made":
            return valid if self._masks == "the model's" else None
        width = valid.shape[1]
        causal = torch.ones((width, width), dtype=torch.bool, device=valid.device).tril()
        # A padding position sees itself: a row that sees nothing is NaN in some kernels, and 0 * NaN would reach the others.
        itself = torch.eye(width, dtype=torch.bool, device=valid.device)
        return self._backbone.attention((causal & valid[:, None, None, :]) | itself)

    def _reorder(self, rows: Tensor) -> None:
        if self._masks == "ready-made":
            for layer in self._cache.layers:
                assert isinstance(layer, PreallocatedLayer), "preallocated_cache makes nothing else"
                layer.select(rows, self._capacity)
        else:
            # Every kind of layer has it, those with states of recurrences and convolutions included.
            self._cache.reorder_cache(rows)  # type: ignore[arg-type]
        self.logits = self.logits.index_select(0, rows)
        self._visible = self._visible.index_select(0, rows)
        self._next_position = self._next_position.index_select(0, rows)
        if self._masks == "ready-made":
            self._attention = self._backbone.attention(self._visible[:, None, None, :])
        else:
            self._attention = self._visible if self._masks == "the model's" else None


class ByLengthDecoder:
    """A `Decoder` for models that cannot do with padding: rows whose prompts are of one length share a `CachedDecoder`.

    Arguments and attributes are those of `CachedDecoder`.
    """

    def __init__(self, backbone: Backbone, prompt_ids: Tensor, prompt_lengths: Tensor, index: Tensor, max_new_tokens: int) -> None:
        lengths = prompt_lengths[index]
        self._decoders: list[CachedDecoder] = []
        self._rows: list[Tensor] = []  # those of each decoder
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(1)
            prompts, own = index[rows].unique(return_inverse=True)
            ids = prompt_ids[prompts, prompt_ids.shape[1] - length :]
            self._decoders.append(CachedDecoder(backbone, ids, prompt_lengths[prompts], own, max_new_tokens, "none"))
            self._rows.append(rows)
        self.logits = self._gather()

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        for decoder, rows in zip(self._decoders, self._rows, strict=True):
            decoder.step(tokens[rows])
        self.logits = self._gather()
        return self.logits

    def select(self, rows: Tensor) -> None:
        """See `Decoder`."""
        kept = []
        for decoder, own in zip(self._decoders, self._rows, strict=True):
            place = torch.full((len(self.logits),), -1, device=rows.device)
            place[own] = torch.arange(len(own), device=rows.device)
            wanted = (place[rows] >= 0).nonzero().squeeze(1)
            if len(wanted):
                decoder.select(place[rows[wanted]])
                kept.append((decoder, wanted))
        self._decoders, self._rows = [decoder for decoder, _ in kept], [wanted for _, wanted in kept]
        self.logits = self._gather()

    def _gather(self) -> Tensor:
        logits = torch.cat([decoder.logits for decoder in self._decoders])
        return logits[torch.cat(self._rows).argsort()]
