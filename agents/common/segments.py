"""Segments of a marked text, as pieces that a reward model scores: where they end in tokens, and which spans touch them."""

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from textgym.agents.common.pieces import Piece
from textgym.agents.reward_model import RewardModel
from textgym.conversations import template_columns
from textgym.encoding import completion_offsets
from textgym.feedback.records import Marking
from textgym.rewards.dense import Segmentation
from textgym.rewards.episodes import EpisodeBatch, excerpt
from textgym.rewards.segmenters import Segmenter
from textgym.tokenizers import decode_completions

_ENDS = 3  # tokens that may stand behind a text: an end, and what a template writes before it


def segment_pieces(model: RewardModel, marking: Marking, segmenter: Segmenter) -> tuple[list[Piece], npt.NDArray[np.bool_]]:
    """Cuts a completion into segments, as `segment_level` does when an environment pays for them.

    Of a model with one score per text a segment's score is that of the text up to its last token; of a per-token model it is the sum over
    its tokens.

    Args:
        model: the reward model.
        marking: a text, and what was marked in it, by characters.
        segmenter: says after each token whether a segment ends there.

    Returns:
        S pieces, and (S, C) bool: no span of output c's category touches segment s.
    """
    ids, offsets, begin = _tokens(model, marking)
    completion_ids = [ids[begin : begin + len(offsets)]]
    batch = EpisodeBatch([marking.prompt], completion_ids, prompt_ids=[ids[:begin]], decode=partial(decode_completions, model.tokenizer))
    ends = [segment.end for segment in Segmentation(segmenter).all_segments(batch, [True])[0]]
    starts = [0, *ends[:-1]]
    pieces = [Piece(ids, begin + (start if model.per_token else end - 1), begin + end) for start, end in zip(starts, ends, strict=True)]
    clean = np.ones((len(pieces), model.num_outputs), dtype=np.bool_)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        first, last = offsets[start][0], offsets[end - 1][1]
        for span in marking.spans:
            if span.start < last and span.end > first:
                clean[row, model.output_names.index(span.category)] = False
    return pieces, clean


def _tokens(model: RewardModel, marking: Marking) -> tuple[list[int], list[tuple[int, int]], int]:
    """Returns the tokens of the whole text, the characters of the completion that each of its tokens stands for, and the first of them."""
    if not model.tokenizer.is_fast:
        raise ValueError("has spans, which need a tokenizer that knows the characters of its tokens (a fast one)")
    columns, completion = template_columns(marking.columns), marking.completion
    if model.per_token:
        piece = model.encode([marking.prompt], [completion], {name: [value] for name, value in columns.items()})[0]
        return piece.ids, _offsets(model.tokenizer, piece, completion), piece.start
    text, special = model.reader.text(marking.prompt, completion, columns)
    encoded = model.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    place = text.rfind(completion)
    inside = [
        index
        for index, (first, last) in enumerate(encoded["offset_mapping"])
        if last > max(first, place) and first < place + len(completion)
    ]
    if place < 0 or not inside:
        raise ValueError("has a completion without any token of its own in the text that the model reads")
    offsets = [(first - place, last - place) for first, last in encoded["offset_mapping"][inside[0] : inside[-1] + 1]]
    return list(encoded["input_ids"]), offsets, inside[0]


def _offsets(tokenizer: Any, piece: Piece, completion: str) -> list[tuple[int, int]]:
    """Returns the characters of a completion that the tokens of a piece stand for; an end behind the text stands for none."""
    prompt, own, behind = piece.ids[: piece.start], piece.ids[piece.start :], (len(completion),) * 2
    for count in range(len(own), max(len(own) - _ENDS, -1), -1):
        offsets = completion_offsets(tokenizer, prompt, completion, own[:count])
        if offsets is not None:
            return [*offsets, *[behind] * (len(own) - count)]
    # A chat template wrote something of its own before the text, or the tokenizer reads it differently there: what the tokens read then.
    read = decode_completions(tokenizer, [prompt] * (len(own) + 1), [own[:count] for count in range(len(own) + 1)])
    place = read[-1].rfind(completion)
    if place < 0:
        raise ValueError(f"has spans in a completion that reads {excerpt(read[-1])} in the tokens of the model, so that they have no place")
    borders = [min(max(len(text) - place, 0), len(completion)) for text in read]
    return list(pairwise(borders))
