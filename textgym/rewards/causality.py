"""Tells whether a dense reward is causal: whether what it pays for a token is the same before and after the later tokens exist."""

from typing import Any

import numpy as np

from textgym.errors import RewardError
from textgym.rewards.compose import RewardSet
from textgym.rewards.episodes import EpisodeBatch, describe_row


def check_causal(reward: Any, batch: EpisodeBatch, *, tolerance: float = 1e-6) -> None:
    """Raises a `RewardError` naming the first token that a dense reward pays differently as a prefix and in the whole completion.

    A reward that is not causal pays an agent that steps the environment something else than one that scores whole completions, and
    the sum of its payments is no longer the reward of the text. Passing shows causality on these completions only; give some of each
    kind that will occur.

    Args:
        reward: a function marked with `token_level` or `segment_level`, or anything else that `RewardSet.build` accepts; its dense parts
            are checked.
        batch: completions to check it on, taken as whole (`EpisodeBatch.from_texts` makes one of strings).
        tolerance: largest difference that counts as equal.
    """
    rewards = RewardSet.build(reward)
    if not rewards.has_dense:
        raise ValueError("`reward` has no dense part to check; mark functions with `token_level` or `segment_level`.")
    _, whole = rewards.dense_sequence(batch, np.ones(len(batch), dtype=bool))
    rows = [row for row, ids in enumerate(batch.completion_ids) for _ in ids]
    lengths = [t for ids in batch.completion_ids for t in range(1, len(ids) + 1)]
    prefixes = batch.select(rows, [batch.completion_ids[row][:t] for row, t in zip(rows, lengths, strict=True)])
    finished = np.array([t == len(batch.completion_ids[row]) for row, t in zip(rows, lengths, strict=True)], dtype=bool)
    _, stepped = rewards.dense_step(prefixes, finished)
    for name, paid in stepped.items():
        for row, t, as_prefix in zip(rows, lengths, paid, strict=True):
            in_whole = whole[name][row][t - 1]
            if abs(as_prefix - in_whole) > tolerance:
                raise RewardError(
                    f"reward `{name}` is not causal: token {t - 1} of {describe_row(batch, row)} is paid {as_prefix:g} when it is the last "
                    f"and {in_whole:g} in the whole completion; it must not depend on later tokens (nor on the other rows)."
                )
