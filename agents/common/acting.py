"""Acting one token at a time on observations, with a key-value cache that notices by itself what it can reuse."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.kv_cache import PreallocatedLayer, SlotCursor, SlotLayer, preallocated_cache, slot_cache


class ActingState:
    """What the model knows about the observations it saw last.

    Each new batch of observations is compared with the one before. A row that is the same costs nothing, a row with one more token costs
    one cached step, any other row (a new episode, another environment) is run from its start. So code that only ever hands over the
    latest observation pays for one token per step, and a wrong guess is impossible.

    Attributes:
        logits: of the next token at the latest observations, (B, V); None before the first.
    """

    def __init__(self) -> None:
        self.logits: Tensor | None = None
        self._ids: npt.NDArray[np.int64] = np.zeros((0, 0), np.int64)
        self._lengths: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._versions: tuple[int, ...] = ()
        self._cursor = SlotCursor()
        self._cache: Cache | None = None

    @torch.no_grad()
    def observe(self, backbone: Backbone, observation: Mapping[str, npt.NDArray[Any]]) -> Tensor:
        """Returns the logits of the next token at batched observations, (B, V).

        Args:
            backbone: the model; after an update of its parameters everything is run afresh.
            observation: `input_ids` and `attention_mask`, (B, L); the ones of each row's mask are one block.
        """
        backbone.without_dropout()
        ids, lengths = align_left(observation)
        backbone.check_length(int(lengths.max()), "The observation")
        versions = tuple(parameter._version for parameter in backbone.model.parameters())
        if not backbone.dense_mask or (backbone.turn is not None and int(lengths.max()) > backbone.turn.length):
            self._cache = None  # what it holds is of other observations from now on
            self.logits = last_logits(backbone, ids, lengths)
            return self.logits
        if self._cache is None or versions != self._versions or ids.shape != self._ids.shape:
            self._forget(backbone, ids.shape)
        # Compare what both have; a longer row of the same beginning has grown.
        before = np.arange(ids.shape[1]) < self._lengths[:, None]
        same = ((ids == self._ids) | ~before).all(1) & (self._lengths > 0)
        grown = same & (lengths == self._lengths + 1)
        afresh = ~grown & ~(same & (lengths == self._lengths))
        if grown.any():
            self._append(backbone, ids, grown)
        if afresh.any():
            self._prefill(backbone, ids, lengths, afresh)
        self._ids, self._lengths, self._versions = ids, lengths, versions
        assert self.logits is not None, "the first observation is run from its start"
        return self.logits

    def _forget(self, backbone: Backbone, shape: tuple[int, ...]) -> None:
        rows, width = shape
        self.logits = None
        self._ids = np.zeros((rows, width), np.int64)
        self._lengths = np.zeros(rows, np.int64)
        self._cursor.rows = torch.arange(rows, device=backbone.device)
        # One column more than an observation has: rows that do not grow need a place for the token they are stepped with.
        self._cache = slot_cache(backbone.num_layers, self._cursor, width + 1)

    def _append(self, backbone: Backbone, ids: npt.NDArray[np.int64], grown: npt.NDArray[np.bool_]) -> None:
        """Steps the whole batch; rows that have not grown write a column past their end, which is never seen."""
        assert self.logits is not None, "a row that has grown was seen before"
        cursor = self._cursor
        newest = ids[np.arange(len(ids)), np.minimum(self._lengths, ids.shape[1] - 1)]
        cursor.width = int(self._lengths.max()) + 1
        cursor.slots = torch.as_tensor(self._lengths, device=backbone.device)
        columns = torch.arange(cursor.width, device=backbone.device)
        visible = columns <= cursor.slots.unsqueeze(1)
        tokens = torch.as_tensor(np.where(grown, newest, 0), device=backbone.device)
        # A row that has not grown may stand at the end of a table of positions already.
        positions = torch.as_tensor(np.where(grown, self._lengths, 0), device=backbone.device)
        mask = backbone.attention(visible[:, None, None, :])
        features = backbone.features(tokens.unsqueeze(1), positions.unsqueeze(1), mask, self._cache)
        rows = torch.as_tensor(np.flatnonzero(grown), device=backbone.device)
        # A new tensor: whoever holds the logits of the step before keeps them.
        self.logits = self.logits.index_copy(0, rows, backbone.logits(features[rows, -1]))

    def _prefill(
        self, backbone: Backbone, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], afresh: npt.NDArray[np.bool_]
    ) -> None:
        assert self._cache is not None, "made before"
        width = int(lengths[afresh].max())
        tokens = torch.as_tensor(ids[afresh, :width], device=backbone.device)
        rows = torch.as_tensor(np.flatnonzero(afresh), device=backbone.device)
        prefilled = preallocated_cache(len(self._cache.layers), width)
        features = backbone.features(tokens, None, None, prefilled)
        for layer, source in zip(self._cache.layers, prefilled.layers, strict=True):
            assert isinstance(layer, SlotLayer) and isinstance(source, PreallocatedLayer), "made by slot_cache and preallocated_cache"
            layer.load(rows, source.keys, source.values, len(ids))
        ends = torch.as_tensor(lengths[afresh] - 1, device=backbone.device)
        logits = backbone.logits(features[torch.arange(len(ends), device=backbone.device), ends])
        if self.logits is None:
            self.logits = logits.new_zeros((len(ids), logits.shape[-1]))
        self.logits = self.logits.index_copy(0, rows, logits)


def align_left(observation: Mapping[str, npt.NDArray[Any]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Moves each row's tokens to column 0: (B, L) ids, 0 past the end, and lengths (B,), both int64."""
    mask = np.asarray(observation["attention_mask"]) != 0
    ids = np.asarray(observation["input_ids"])
    lengths = mask.sum(1)
    width = ids.shape[1]
    if width == 0 or not lengths.all():
        raise ValueError(f"`observation` has rows without a single token: {np.flatnonzero(lengths == 0).tolist()[:8]}.")
    start = mask.argmax(1)
    columns = np.arange(width)
    source = np.minimum(columns + start[:, None], width - 1)
    inside = columns < lengths[:, None]
    if not (np.take_along_axis(mask, source, 1) | ~inside).all():
        raise ValueError("`attention_mask` of an observation must be one block of ones per row (the prompt, then the completion).")
    return np.where(inside, np.take_along_axis(ids, source, 1), 0).astype(np.int64), lengths.astype(np.int64)


def last_logits(backbone: Backbone, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Tensor:
    """Logits after the last token of each row of `align_left`'s layout, (B, V), without a cache."""
    tokens = torch.as_tensor(ids[:, : int(lengths.max())], device=backbone.device)
    ends = torch.as_tensor(lengths, device=backbone.device)
    return backbone.logits(backbone.states_of(tokens, ends, torch.arange(len(ids), device=backbone.device), ends - 1)[0])
