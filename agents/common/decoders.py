"""Rows that grow by one token per model step: what a decode loop asks of the model."""

from typing import Protocol

import torch
from torch import Tensor

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.cached_decoder import ByLengthDecoder, CachedDecoder
from textgym.agents.common.captured_decoder import CapturedDecoder
from textgym.agents.common.captured_step import CAPTURES
from textgym.agents.common.trunk_decoder import TrunkDecoder
from textgym.agents.common.uncached_decoder import UncachedDecoder
from textgym.agents.common.ways import Decoding


class Decoder(Protocol):
    """Rows with a key-value cache.

    Attributes:
        logits: of the next token, (rows, V), in the model's dtype.
    """

    logits: Tensor

    def step(self, tokens: Tensor) -> Tensor:
        """Appends `tokens` (rows,) int64 and returns the logits after them, (rows, V)."""
        ...

    def select(self, rows: Tensor) -> None:
        """Goes on with `rows` only, (rows',) int64 indices into the present ones."""
        ...


def make_decoder(backbone: Backbone, prompt_ids: Tensor, prompt_lengths: Tensor, index: Tensor, max_new_tokens: int) -> Decoder:
    """Runs prompts, each once, and returns the rows that begin with them.

    Args:
        backbone: the model.
        prompt_ids: (B, P) int64, left-padded.
        prompt_lengths: (B,) int64.
        index: the prompt of each row, (rows,) int64.
        max_new_tokens: how many tokens may be appended to a row.
    """
    trunk = backbone.fast_trunk
    width = int(prompt_lengths.max())
    backbone.check_length(width + max_new_tokens, "Generation")
    # Without the columns that are padding in every row, and with ids that the model has in the rest.
    prompt_ids = prompt_ids[:, prompt_ids.shape[1] - width :]
    prompt_ids = prompt_ids.masked_fill(torch.arange(width, device=prompt_ids.device) < (width - prompt_lengths).unsqueeze(1), 0)
    if trunk is None:
        return decoder_of(_way(backbone, width + max_new_tokens), backbone, prompt_ids, prompt_lengths, index, max_new_tokens)
    captures = prompt_ids.device.type in CAPTURES and not backbone.kept_rows.failed
    return (CapturedDecoder if captures else TrunkDecoder)(backbone, trunk, prompt_ids, prompt_lengths, index, max_new_tokens)


def decoder_of(
    way: Decoding, backbone: Backbone, prompt_ids: Tensor, prompt_lengths: Tensor, index: Tensor, max_new_tokens: int
) -> Decoder:
    """Returns the decoder that runs transformers' forward in some way; the other arguments are those of `make_decoder`."""
    arguments = backbone, prompt_ids, prompt_lengths, index, max_new_tokens
    if way == "no cache":
        return UncachedDecoder(*arguments)
    if way == "by length":
        return ByLengthDecoder(*arguments)
    return CachedDecoder(*arguments, "ready-made" if way == "ready-made masks" else "the model's")


def _way(backbone: Backbone, tokens: int) -> Decoding:
    """Chooses the way for rows of so many tokens; the slow one is not taken in silence."""
    name, turn = type(backbone.model).__name__, backbone.turn
    if turn is not None and tokens > turn.length:
        backbone.say_once(
            "turn",
            f"{name} has rotary frequencies that depend on the length of a row beyond {turn.length} tokens, and rows here may have "
            f"{tokens}: every token takes a pass over its whole row, which is right and slow. Use shorter prompts or fewer new tokens.",
        )
        return "no cache"
    if backbone.ways.decoding == "no cache":
        backbone.say_once(
            "no cache",
            f"{name} gives other log-probs with a cache than in a plain pass: every token takes a pass over its whole row, which is right "
            "and slow. `TransformersEngine()` is an alternative where the model's own `generate` can be relied on.",
        )
    return backbone.ways.decoding
