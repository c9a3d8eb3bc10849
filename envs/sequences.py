"""Taking every row through a whole completion at once: the one-pass form of stepping."""

from typing import Any

import numpy as np

from textgym.envs.core import EpisodeRows, Phase
from textgym.envs.task import TextTask
from textgym.types import BoolArray, Info, IntArray, SequenceResult


def walk_sequences(rows: EpisodeRows, actions: Any, lengths: Any, max_episode_steps: int | None) -> SequenceResult:
    """Writes whole completions into freshly reset rows and pays them (see `TextGenVectorEnv.step_sequence`).

    Args:
        rows: the state, N rows.
        actions: (N, T') token ids.
        lengths: (N,) the steps that each row is to take.
        max_episode_steps: the outer time limit, None for none.
    """
    tokens, wanted = _check_shapes(actions, lengths, rows.num_rows)
    used, terminated = _steps_taken(rows.task, tokens, wanted, max_episode_steps)
    _check_range(rows.task.vocab_size, tokens, used)
    truncated = used == max_episode_steps if max_episode_steps is not None else np.zeros(rows.num_rows, dtype=np.bool_)
    rows.write_sequences(tokens, used)
    rows.phases[:] = Phase.NEEDS_RESET
    rewards = np.zeros(tokens.shape, dtype=np.float64)
    infos: list[Info] = [{} for _ in range(rows.num_rows)]
    stepped = np.flatnonzero(used)
    if rows.task.rewards.has_dense and len(stepped):
        paid, parts = rows.pay_dense_sequences(stepped, terminated[stepped])
        for place, row in enumerate(stepped.tolist()):
            rewards[row, : used[row]] = paid[place]
            infos[row]["dense_rewards"] = {name: float(values[place]) for name, values in parts.items()}
    finished = np.flatnonzero(terminated)
    if len(finished):
        totals, outcome = rows.pay_final(finished)
        rewards[finished, used[finished] - 1] += totals
        for row, info in zip(finished.tolist(), outcome.infos(), strict=True):
            infos[row] |= info
    return SequenceResult(rewards.astype(np.float32), terminated, truncated, used, infos)


def _check_shapes(actions: Any, lengths: Any, num_rows: int) -> tuple[IntArray, IntArray]:
    tokens, wanted = np.asarray(actions), np.asarray(lengths)
    if tokens.ndim != 2 or len(tokens) != num_rows or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"`actions` must be integer token ids of shape ({num_rows}, T), one row per environment, "
            f"got shape {tokens.shape} and dtype {tokens.dtype}."
        )
    if wanted.shape != (num_rows,) or wanted.dtype.kind not in "iu":
        raise ValueError(f"`lengths` must be {num_rows} integers, one per row, got shape {wanted.shape} and dtype {wanted.dtype}.")
    wrong = (wanted < 0) | (wanted > tokens.shape[1])
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"`lengths` must be from 0 to {tokens.shape[1]}, the columns of `actions`, got {wanted[row]} in row {row}.")
    return tokens.astype(np.int64, copy=False), wanted.astype(np.int64)


def _steps_taken(task: TextTask, tokens: IntArray, wanted: IntArray, max_episode_steps: int | None) -> tuple[IntArray, BoolArray]:
    """Returns how many of the wanted steps each row takes, and whether the environment terminates it with the last of them."""
    limit = min(task.max_new_tokens, max_episode_steps or task.max_new_tokens)
    columns = np.arange(tokens.shape[1])
    in_range = (tokens >= 0) & (tokens < task.vocab_size)
    ends = task.ends_episode[np.where(in_range, tokens, 0)] & in_range  # (N, T')
    first_end = np.where(ends, columns, tokens.shape[1]).min(axis=1, initial=tokens.shape[1])  # (N, T') -> (N,)
    used = np.minimum(np.minimum(wanted, limit), first_end + 1)
    return used, (used == task.max_new_tokens) | (used == first_end + 1)


def _check_range(vocab_size: int, tokens: IntArray, used: IntArray) -> None:
    wrong = ((tokens < 0) | (tokens >= vocab_size)) & (np.arange(tokens.shape[1]) < used[:, None])
    if wrong.any():
        row, step = (int(place) for place in np.argwhere(wrong)[0])
        raise ValueError(
            f"`actions` must be token ids from 0 to {vocab_size - 1} (`len(tokenizer) - 1`), "
            f"got {tokens[row, step]} in row {row}, step {step}."
        )
