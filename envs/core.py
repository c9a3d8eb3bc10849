"""The one core of the text environments: the state of N rows of tokens.

`TextGenEnv` is its face for one row, `TextGenVectorEnv` its face for many.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from textgym.envs.task import TextTask
from textgym.prompts import Prompt, PromptText, copy_prompt
from textgym.rewards.compose import EpisodeBatch
from textgym.tokenizers import decode_completions, prompt_ends
from textgym.types import BoolArray, FinishReason, Info, IntArray, Observation

Float64Array = npt.NDArray[np.float64]


class Phase:
    """Where a row stands. Plain numbers: comparing a numpy scalar with an `Enum` takes longer than a whole step."""

    NEEDS_RESET: Final = 0
    """It was never reset, or a whole sequence was taken through it."""
    RUNNING: Final = 1
    """Its episode goes on."""
    ENDED: Final = 2
    """Its episode has ended and it was not reset since."""


@dataclass
class Outcome:
    """What came of K episodes that ended together.

    Attributes:
        batch: the episodes as the rewards saw them.
        finish_reasons: K reasons.
        parts: the unweighted rewards by name, (K,) each, NaN where a part did not apply to the row.
    """

    batch: EpisodeBatch
    finish_reasons: list[FinishReason]
    parts: dict[str, Float64Array]

    def texts(self) -> dict[str, list[Any]]:
        """Returns the columns of the final info except `rewards`, K values each, every object new."""
        return {
            "prompt": [copy_prompt(prompt) for prompt in self.batch.prompts],
            "completion": self.batch.texts,
            "completion_ids": [list(ids) for ids in self.batch.completion_ids],
            "finish_reason": self.finish_reasons,
        }

    def infos(self) -> list[Info]:
        """Returns the final info of each of the K episodes."""
        parts = [(name, values.tolist()) for name, values in self.parts.items()]
        rewards = [{name: values[i] for name, values in parts if not math.isnan(values[i])} for i in range(len(self.finish_reasons))]
        columns = self.texts() | {"rewards": rewards}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def rewards(self, place: int) -> dict[str, float]:
        """Returns the unweighted rewards of one of the K episodes, without the parts that did not apply to it."""
        return {name: float(values[place]) for name, values in self.parts.items() if not math.isnan(values[place])}


class EpisodeRows:
    """The state of N token MDPs that share one task.

    A row holds its prompt in the columns before P, right-aligned, and token t of its completion in column P + t.

    Args:
        task: prompts, tokenizer, rewards and sizes.
        num_rows: N.

    Attributes:
        input_ids: (N, L) int64, `fill_token_id` where there is no token.
        attention_mask: (N, L) int8, 1 where there is a token.
        episodes: (N,) int64, how many each row has begun.
        lengths: (N,) int64, tokens of the completion so far.
        phases: (N,) int8, a `Phase` per row.
        returns: (N,) float64, the reward of the episode so far, kept for rendering.
        dense_sums: the unweighted dense rewards of the episode so far by name, (N,) each.
        prompt_indices: (N,) int64, the prompt of each row, -1 for one that is not of the set (and before the first reset).
        free_prompts: those prompts by row.
        outcomes: what came of each row's episode and its place there, None while the episode goes on (or when it was truncated).
    """

    def __init__(self, task: TextTask, num_rows: int) -> None:
        self.task = task
        self.num_rows = num_rows
        self.input_ids: IntArray = np.full((num_rows, task.length), task.fill_token_id, dtype=np.int64)
        self.attention_mask: npt.NDArray[np.int8] = np.zeros((num_rows, task.length), dtype=np.int8)
        self.episodes: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.lengths: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.phases: npt.NDArray[np.int8] = np.full(num_rows, Phase.NEEDS_RESET, dtype=np.int8)
        self.returns: Float64Array = np.zeros(num_rows)
        self.dense_sums: dict[str, Float64Array] = {}
        self.prompt_indices: IntArray = np.full(num_rows, -1, dtype=np.int64)
        self.free_prompts: dict[int, Prompt] = {}
        self.outcomes: list[tuple[Outcome, int] | None] = [None] * num_rows
        self._decode = partial(decode_completions, task.tokenizer)
        # Flat views and places: writing one token per row is several times faster through them than by row and column.
        self._flat_ids, self._flat_mask = self.input_ids.reshape(-1), self.attention_mask.reshape(-1)
        self._first_places: IntArray = np.arange(num_rows) * task.length + task.max_prompt_tokens

    def observe(self) -> Observation:
        """Returns the observation of all rows, (N, L), in new arrays."""
        return {"input_ids": self.input_ids.copy(), "attention_mask": self.attention_mask.copy()}

    def fresh(self) -> BoolArray:
        """Returns which rows have begun an episode and taken no step of it, (N,)."""
        fresh: BoolArray = (self.phases == Phase.RUNNING) & (self.lengths == 0)
        return fresh

    def observe_row(self, row: int) -> Observation:
        """Returns the observation of one row, (L,), in new arrays."""
        return {"input_ids": self.input_ids[row].copy(), "attention_mask": self.attention_mask[row].copy()}

    def begin(self, row: int, prompt: Prompt) -> None:
        """Begins an episode in a row."""
        columns = slice(self.task.max_prompt_tokens - len(prompt.ids), self.task.max_prompt_tokens)
        ids, mask = self.input_ids[row], self.attention_mask[row]
        ids.fill(self.task.fill_token_id)
        mask.fill(0)
        ids[columns] = prompt.ids
        mask[columns] = 1
        self.prompt_indices[row] = prompt.prompt_index
        if prompt.prompt_index < 0:
            self.free_prompts[row] = prompt
        self.episodes[row] += 1
        self.lengths[row] = 0
        self.phases[row] = Phase.RUNNING
        self.returns[row] = 0.0
        self.outcomes[row] = None
        for sums in self.dense_sums.values():
            sums[row] = 0.0

    def begin_many(self, rows: IntArray, indices: IntArray) -> None:
        """Begins an episode in each of `rows` (K,) with the prompts `indices` (K,) of the set. `begin` for many rows."""
        task = self.task
        ids, real = task.prompt_set.left_padded(indices, task.max_prompt_tokens, task.fill_token_id)
        self.input_ids[rows, task.max_prompt_tokens :] = task.fill_token_id
        self.attention_mask[rows, task.max_prompt_tokens :] = 0
        self.input_ids[rows, : task.max_prompt_tokens] = ids
        self.attention_mask[rows, : task.max_prompt_tokens] = real
        self.prompt_indices[rows] = indices
        self.episodes[rows] += 1
        self.lengths[rows] = 0
        self.phases[rows] = Phase.RUNNING
        self.returns[rows] = 0.0
        for row in rows.tolist():
            self.outcomes[row] = None
        for sums in self.dense_sums.values():
            sums[rows] = 0.0

    def append_one(self, row: int, token: int) -> bool:
        """Appends a token to one row and returns whether that ended its episode. `append` for a single row, without array work."""
        length = int(self.lengths[row])
        column = self.task.max_prompt_tokens + length
        self.input_ids[row, column] = token
        self.attention_mask[row, column] = 1
        self.lengths[row] = length + 1
        ended = length + 1 == self.task.max_new_tokens or bool(self.task.ends_episode[token])
        if ended:
            self.phases[row] = Phase.ENDED
        return ended

    def append(self, rows: IntArray, tokens: IntArray) -> BoolArray:
        """Appends one token to each of `rows` and returns which of them that ended.

        Args:
            rows: (K,) distinct row numbers.
            tokens: (K,) token ids.

        Returns:
            (K,) bool.
        """
        lengths = self.lengths[rows]
        places = self._first_places[rows] + lengths
        self._flat_ids[places] = tokens
        self._flat_mask[places] = 1
        lengths += 1
        self.lengths[rows] = lengths
        ended: BoolArray = self.task.ends_episode[tokens]
        ended |= lengths == self.task.max_new_tokens
        if ended.any():
            self.phases[rows[ended]] = Phase.ENDED
        return ended

    def write_sequences(self, actions: IntArray, lengths: IntArray) -> None:
        """Writes the first `lengths[i]` of row i's `actions` as its completion.

        Args:
            actions: (N, T') token ids.
            lengths: (N,), at most T' and T.
        """
        width = int(lengths.max(initial=0))
        start = self.task.max_prompt_tokens
        real = np.arange(width) < lengths[:, None]  # (N, width)
        self.input_ids[:, start : start + width][real] = actions[:, :width][real]
        self.attention_mask[:, start : start + width][real] = 1
        self.lengths[:] = lengths

    def batch(self, rows: Sequence[int] | IntArray) -> EpisodeBatch:
        """Returns the completions of `rows` so far with their prompts and columns, as rewards see them."""
        start = self.task.max_prompt_tokens
        lengths = self.lengths[rows].tolist()
        tokens = self.input_ids[rows, start : start + max(lengths, default=0)].tolist()
        prompts, columns = self._prompts_of(rows)
        return EpisodeBatch(
            prompts=prompts,
            completion_ids=[ids[:length] for ids, length in zip(tokens, lengths, strict=True)],
            columns=columns,
            prompt_ids=prompt_ends(self.task.tokenizer, self._prompt_ids(rows)),
            decode=self._decode,
        )

    def _prompt_ids(self, rows: Sequence[int] | IntArray) -> list[IntArray]:
        """Returns the tokens of the prompts of `rows`."""
        prompt_set, indices = self.task.prompt_set, self.prompt_indices[rows].tolist()
        return [prompt_set.ids[i] if i >= 0 else self.free_prompts[row].ids for row, i in zip(rows, indices, strict=True)]

    def _prompts_of(self, rows: Sequence[int] | IntArray) -> tuple[list[PromptText], dict[str, list[Any]]]:
        """Returns the prompts of `rows`, as objects of the caller's own, and their other columns."""
        prompt_set, indices = self.task.prompt_set, self.prompt_indices[rows].tolist()
        if min(indices, default=0) >= 0:
            columns = {name: [values[i] for i in indices] for name, values in prompt_set.columns.items()}
            return [copy_prompt(prompt_set.texts[i]) for i in indices], columns
        prompts = [prompt_set[i] if i >= 0 else self.free_prompts[row] for row, i in zip(rows, indices, strict=True)]
        names = dict.fromkeys([*prompt_set.columns, *(name for prompt in prompts for name in prompt.columns)])
        return [copy_prompt(prompt.text) for prompt in prompts], {name: [prompt.columns.get(name) for prompt in prompts] for name in names}

    def pay_dense(self, rows: IntArray, finished: BoolArray) -> tuple[Float64Array, dict[str, Float64Array]]:
        """Returns what the dense rewards pay for the last token of each of `rows`, weighted (K,) and by name (K,) unweighted."""
        rewards, parts = self.task.rewards.dense_step(self.batch(rows), finished)
        self.returns[rows] += rewards
        for name, values in parts.items():
            self._dense_sum(name)[rows] += values
        return rewards, parts

    def _dense_sum(self, name: str) -> Float64Array:
        if name not in self.dense_sums:
            self.dense_sums[name] = np.zeros(self.num_rows)
        return self.dense_sums[name]

    def pay_final(self, rows: IntArray) -> tuple[Float64Array, Outcome]:
        """Scores the episodes of `rows`, which have just ended, in one call per reward function.

        Returns:
            The weighted rewards of the last step, (K,), without the dense ones, and what came of the episodes.
        """
        batch = self.batch(rows)
        totals, parts = self.task.rewards.terminal(batch)
        self.returns[rows] += totals
        sums = {name: values[rows] for name, values in self.dense_sums.items()}
        outcome = Outcome(batch, self.finish_reasons(rows), self.task.rewards.in_order(parts | sums))
        self.note(rows, outcome)
        return totals, outcome

    def finish_reasons(self, rows: IntArray) -> list[FinishReason]:
        """Returns why the completions of `rows` (K,), which are over, are."""
        ends = self.task.ends_episode[self.input_ids[rows, self.task.max_prompt_tokens + self.lengths[rows] - 1]]
        return ["eos" if end else "length" for end in ends.tolist()]

    def note(self, rows: IntArray, outcome: Outcome, places: IntArray | None = None) -> None:
        """Keeps for rendering what came of the episodes of `rows` (K,), which stand at `places` (K,) of it; by default in its order."""
        for place, row in zip(range(len(rows)) if places is None else places.tolist(), rows.tolist(), strict=True):
            self.outcomes[row] = (outcome, place)
