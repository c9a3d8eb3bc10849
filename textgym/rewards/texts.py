"""Scoring texts with a reward outside of any environment: given completions, one number each."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from textgym.rewards.calling import Float64Array
from textgym.rewards.compose import RewardSet
from textgym.rewards.episodes import EpisodeBatch, Prompt, completion_text


class _NoIds(list[list[int]]):
    """The `completion_ids` of texts: as many as there are texts, and none that could be read."""

    def __init__(self, count: int) -> None:
        super().__init__([] for _ in range(count))

    def __iter__(self) -> Iterator[list[int]]:
        raise _no_ids()

    def __getitem__(self, index: Any) -> Any:
        raise _no_ids()


def _no_ids() -> ValueError:
    return ValueError("This reward reads `completion_ids`, and it was given texts; `score_texts` takes `completion_ids=` too.")


def score_texts(
    reward: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[Prompt],
    completion_ids: Sequence[Sequence[int]] | None = None,
    **columns: list[Any],
) -> Float64Array:
    """Returns what a reward gives to completions.

    Args:
        reward: anything that `RewardSet.build` takes, with at least one reward of whole completions and no dense one.
        prompts: N strings or message lists.
        completions: N strings, or assistant messages.
        completion_ids: their N id lists, for rewards that read them.
        **columns: further columns, N values each.

    Returns:
        (N,) float64, the weighted sums of the parts.

    Raises:
        ValueError: the numbers of prompts, completions and values differ; the reward is dense, or reads ids that were not given.
    """
    rewards = RewardSet.build(reward)
    if rewards.has_dense:
        raise ValueError(f"`reward` must score whole completions, got one of tokens or segments among {', '.join(rewards.names)}.")
    if len(prompts) != len(completions):
        raise ValueError(f"`prompts` must hold one prompt per completion: {len(completions)} completions, {len(prompts)} prompts.")
    texts = [completion_text(one) for one in completions]
    ids = _NoIds(len(texts)) if completion_ids is None else [list(one) for one in completion_ids]
    if len(ids) != len(texts):
        raise ValueError(f"`completion_ids` must hold one list per completion: {len(texts)} completions, {len(ids)} lists.")
    return np.asarray(rewards.terminal(EpisodeBatch(prompts, ids, columns, decode=lambda *_: texts))[0])
