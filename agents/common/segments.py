"""Segments of a marked text, as pieces that a reward model scores: where they end in tokens, and which spans touch them."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from textgym.agents.common.pieces import Piece
from textgym.agents.reward_model import RewardModel
from textgym.feedback.records import Span
from textgym.prompts import PromptText
from textgym.rewards.dense import Segmentation
from textgym.rewards.episodes import EpisodeBatch
from textgym.rewards.segmenters import Segmenter
from textgym.tokenizers import decode_completions


def segment_pieces(
    model: RewardModel, prompt: PromptText, completion: str, spans: Sequence[Span], segmenter: Segmenter
) -> tuple[list[Piece], npt.NDArray[np.bool_]]:
    """Cuts a completion into segments, as `segment_level` does when an environment pays for them.

    Of a model with one score per text a segment's score is that of the text up to its last token; of a per-token model it is the sum over
    its tokens.

    Args:
        model: the reward model.
        prompt: x.
        completion: the text.
        spans: what was marked in it, by characters.
        segmenter: says after each token whether a segment ends there.

    Returns:
        S pieces, and (S, C) bool: no span of output c's category touches segment s.
    """
    ids, offsets, begin = _tokens(model, prompt, completion)
    completion_ids = [ids[begin : begin + len(offsets)]]
    batch = EpisodeBatch([prompt], completion_ids, prompt_ids=[ids[:begin]], decode=partial(decode_completions, model.tokenizer))
    ends = [segment.end for segment in Segmentation(segmenter).all_segments(batch, [True])[0]]
    starts = [0, *ends[:-1]]
    pieces = [Piece(ids, begin + (start if model.per_token else end - 1), begin + end) for start, end in zip(starts, ends, strict=True)]
    clean = np.ones((len(pieces), model.num_outputs), dtype=np.bool_)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        first, last = offsets[start][0], offsets[end - 1][1]
        for span in spans:
            if span.start < last and span.end > first:
                clean[row, model.output_names.index(span.category)] = False
    return pieces, clean


def _tokens(model: RewardModel, prompt: PromptText, completion: str) -> tuple[list[int], list[tuple[int, int]], int]:
    """Returns the tokens of the whole text, the characters of `completion` that each of its tokens stands for, and the first of them."""
    if not model.tokenizer.is_fast:
        raise ValueError("has spans, which need a tokenizer that knows the characters of its tokens (a fast one)")
    if model.per_token:
        piece = model.encode([prompt], [completion])[0]
        own = model.tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        count, ids = piece.end - piece.start, own["input_ids"]  # an EOS behind the text stands for no character
        here = piece.ids[piece.start :]
        # A text on its own may begin with a space of the tokenizer's, which a completion behind its prompt has not (SentencePiece).
        spaced = here[: len(ids)] != ids and here[: len(ids) - 1] == ids[1:]
        offsets = [tuple(pair) for pair in own["offset_mapping"]][spaced:]
        return piece.ids, [*offsets, *[(len(completion),) * 2] * (count - len(offsets))][:count], piece.start
    text, special = model.reader.text(prompt, completion)
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
