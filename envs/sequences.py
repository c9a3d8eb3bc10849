"""Taking every row through a whole completion at once: the one-pass form of stepping."""

from typing import Any

import numpy as np

from textgym.envs.core import EpisodeRows, Outcome, Phase
from textgym.envs.task import TextTask
from textgym.pending import Pending
from textgym.rewards.compose import Scores, TokenScores
from textgym.types import BoolArray, Info, IntArray, SequenceResult


def start_sequences(rows: EpisodeRows, actions: Any, lengths: Any, max_episode_steps: int | None) -> Pending[SequenceResult]:
    """Writes whole completions into freshly reset rows and asks for their rewards (see `TextGenVectorEnv.start_sequence`).

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
    reward, stepped, finished = rows.task.rewards, np.flatnonzero(used), np.flatnonzero(terminated)
    asked_dense = stepped if reward.has_dense else stepped[:0]
    with reward.start_dense_sequence(rows.batch(asked_dense), terminated[asked_dense]) as dense:
        ended = rows.batch(finished)
        final = reward.start_terminal(ended)
    reasons, episodes = rows.finish_reasons(finished), rows.episodes.copy()

    def result(paid: tuple[TokenScores, Scores]) -> SequenceResult:
        """Puts the payments where they belong; the rows may have begun other episodes meanwhile."""
        (dense_rewards, dense_parts), (totals, parts) = paid
        rewards = np.zeros(tokens.shape, dtype=np.float64)
        infos: list[Info] = [{} for _ in range(rows.num_rows)]
        for place, row in enumerate(asked_dense.tolist()):
            rewards[row, : used[row]] = dense_rewards[place]
            infos[row]["dense_rewards"] = {name: float(values[place][-1]) for name, values in dense_parts.items()}
        rewards[finished, used[finished] - 1] += totals
        of_finished = np.flatnonzero(terminated[asked_dense])
        sums = {name: np.array([values[place].sum() for place in of_finished]) for name, values in dense_parts.items()}
        outcome = Outcome(ended, reasons, reward.in_order(parts | sums))
        for row, info in zip(finished.tolist(), outcome.infos(), strict=True):
            infos[row] |= info
        same = rows.episodes == episodes
        rows.returns[same] = rewards.sum(axis=1)[same]
        rows.note(finished[same[finished]], outcome, np.flatnonzero(same[finished]))
        return SequenceResult(rewards.astype(np.float32), terminated, truncated, used, infos)

    return dense.beside(final).then(result)


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
