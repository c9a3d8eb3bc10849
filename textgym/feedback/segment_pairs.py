"""Pairs of segments to compare, drawn from token sequences."""

from collections.abc import Sequence

import numpy as np

from textgym.feedback.records import Segment


def sample_segment_pairs(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    num_pairs: int,
    *,
    max_length: int | None = None,
    seed: int = 0,
) -> list[tuple[Segment, Segment]]:
    """Draws pairs of segments of equal length, with arbitrary starts, from completions.

    Each pair has a length that is drawn evenly from 1 to `max_length`, and two different segments drawn evenly from all of that length:
    single tokens are among them, without which only sums of rewards could be told apart (per-token rewards are identified up to a
    constant by segments of equal length with arbitrary starts).

    Args:
        prompt_ids: N prompts.
        completion_ids: their completions.
        num_pairs: how many pairs.
        max_length: longest segment, in tokens; at most, and by default, the longest of which there are two.
        seed: of the draws.

    Raises:
        ValueError: there are not two segments to be had.
    """
    if len(prompt_ids) != len(completion_ids):
        raise ValueError(f"`prompt_ids` must hold one prompt per completion: {len(completion_ids)} completions, {len(prompt_ids)} prompts.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"`max_length` must be at least 1 token, got {max_length}.")
    sizes = np.array([len(ids) for ids in completion_ids], dtype=np.int64)
    longest = int(sizes.max(initial=0))
    starts = {length: np.cumsum(np.maximum(sizes - length + 1, 0)) for length in range(1, min(longest, max_length or longest) + 1)}
    lengths = [length for length, ends in starts.items() if ends[-1] >= 2]
    if not lengths:
        raise ValueError("`completion_ids` must hold at least two tokens altogether, to make two segments of.")
    generator = np.random.default_rng(seed)

    def segment(length: int, number: int) -> Segment:
        ends = starts[length]
        row = int(np.searchsorted(ends, number, side="right"))
        start = number - (int(ends[row - 1]) if row else 0)
        prompt, completion = (tuple(int(token) for token in ids[row]) for ids in (prompt_ids, completion_ids))
        return Segment(prompt, completion[: start + length], start, start + length)

    found = []
    for length in generator.choice(lengths, size=num_pairs).tolist():
        first, second = generator.choice(int(starts[length][-1]), size=2, replace=False).tolist()
        found.append((segment(length, first), segment(length, second)))
    return found
