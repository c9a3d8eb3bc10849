"""`TextGen-v0` for many episodes at once: one batched environment, which steps all rows with a handful of array operations."""

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from textgym.envs.attributes import TaskAttributes
from textgym.envs.core import EpisodeRows, Phase
from textgym.envs.options import check_autoreset_mode, check_mask, check_options, check_render_mode, check_seeds
from textgym.envs.rendering import render_row, row_frame
from textgym.envs.sequences import start_sequences
from textgym.envs.task import build_task, check_count
from textgym.envs.vector_infos import InfoBuilder
from textgym.errors import EpisodeEndedError
from textgym.pending import Pending
from textgym.prompts import Prompt
from textgym.types import BoolArray, Info, IntArray, Observation, SequenceResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Array = npt.NDArray[Any]
_NO_ROWS: IntArray = np.empty(0, dtype=np.int64)
_NO_PROMPTS: Mapping[int, Prompt] = MappingProxyType({})


class TextGenVectorEnv(TaskAttributes, VectorEnv[Observation, IntArray, Array]):
    """N texts written token by token, side by side, in one environment.

    ## Description
    The same episodes as `num_envs` environments of `TextGenEnv` in Gymnasium's `SyncVectorEnv`, for the same seeds and actions: the same
    observations, rewards, flags and infos, under each of the three autoreset modes. All rows that end in the same step are scored in one
    call of each reward function.

    ## Action Space
    `MultiDiscrete([V] * num_envs)`: the next token of each row. The action of a row that is being reset, or held, is ignored.

    >>> envs = gym.make_vec("TextGen-v0", num_envs=2, prompts=["a b", "b"], tokenizer=tokenizer, reward=reward, max_new_tokens=4)
    >>> envs.action_space
    MultiDiscrete([5 5])
    >>> envs.single_action_space
    Discrete(5)

    ## Observation Space
    The `Dict` of `TextGenEnv` with a first dimension of rows.

    >>> envs.observation_space
    Dict('attention_mask': Box(0, 1, (2, 6), int8), 'input_ids': Box(0, 4, (2, 6), int64))
    >>> envs.single_observation_space
    Dict('attention_mask': MultiBinary(6), 'input_ids': Box(0, 4, (6,), int64))

    ## Rewards
    As in `TextGenEnv`, (num_envs,) float64. The infos are in Gymnasium's vector form: an array per key, and under `_key` the mask of
    the rows that have it.

    ## Starting State
    As in `TextGenEnv`. `reset(seed=s)` seeds row i with `s + i`; a list gives one seed per row. `options` may hold `prompt_index` (a number
    for all rows or one per row), `prompt` (one for all rows or a list with one per row) and `reset_mask` (a bool array: the rows to
    reset). The attribute `next_prompt_index` (None, a number, or one per row) serves each row's next reset, an automatic one included.

    ## Episode End
    As in `TextGenEnv`: an end token and the `max_new_tokens`-th token terminate. `max_episode_steps`, an outer time limit, truncates.
    A row that has ended is reset by the next step (`NEXT_STEP`), by the same step (`SAME_STEP`, with `final_obs` and `final_info` in the
    infos) or by the user (`DISABLED`; stepping it is an error).
    `hold_rows(mask)` keeps rows as they are until their next `reset`. While the attribute `hold` is True, every row that has ended stays
    as it is, whatever the autoreset mode. `step_sequence` takes all rows through whole completions at once.

    ## Arguments
    Those of `TextGenEnv`, and

    - `num_envs`: the number of rows. Default: 1.
    - `autoreset_mode`: an `AutoresetMode` or its value. Default: `NEXT_STEP`.
    - `max_episode_steps`: steps until a row is truncated. Default: no limit.
    - `render_mode`: `"ansi"` (`render()` returns a text per row), `"human"` (each episode is printed when it ends) or `"rgb_array"` (a
      picture per row).

    ## Version History
    - v0: first version.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["ansi", "human", "rgb_array"],
        "render_fps": 30,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        prompts: Any = None,
        tokenizer: "PreTrainedTokenizerBase | str | os.PathLike[str] | None" = None,
        reward: Any = None,
        *,
        reward_weights: Sequence[float] | None = None,
        max_prompt_tokens: int | None = None,
        max_new_tokens: int = 32,
        eos_token_ids: int | Sequence[int] | None = None,
        truncate_prompts: bool = False,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.num_envs = check_count("num_envs", num_envs)
        self.autoreset_mode = check_autoreset_mode(autoreset_mode)
        # Gymnasium's own way of saying that there is no time limit is -1.
        self.max_episode_steps = None if max_episode_steps in (None, -1) else check_count("max_episode_steps", max_episode_steps)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}  # type: ignore[misc]
        self.render_mode = check_render_mode(render_mode, self.metadata)
        self._task = build_task(
            prompts,
            tokenizer,
            reward,
            reward_weights=reward_weights,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            truncate_prompts=truncate_prompts,
        )
        self.single_observation_space = self._task.observation_space()
        self.single_action_space = self._task.action_space()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.hold = False
        self._rows = EpisodeRows(self._task, self.num_envs)
        self._held: BoolArray = np.zeros(self.num_envs, dtype=np.bool_)
        self._generators: list[np.random.Generator | None] = [None] * self.num_envs
        self._seeds: list[int] = [-1] * self.num_envs
        self._next_prompt_index: list[int | None] = [None] * self.num_envs
        self._every_row: IntArray = np.arange(self.num_envs)
        self._any_held = False

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The random generator of each row, as in Gymnasium's `SyncVectorEnv`."""
        return tuple(self._generator(row) for row in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each row's generator."""
        return tuple(self._seeds[row] for row in range(self.num_envs) if self._generator(row))

    def _generator(self, row: int) -> np.random.Generator:
        generator = self._generators[row]
        return self._seed_row(row, None) if generator is None else generator

    def _seed_row(self, row: int, seed: int | None) -> np.random.Generator:
        self._generators[row], self._seeds[row] = generator, _ = seeding.np_random(seed)
        return generator

    @property
    def next_prompt_index(self) -> tuple[int | None, ...] | None:
        """Which prompt the next reset of each row takes; None for random ones. A reset sets its row back to None."""
        return tuple(self._next_prompt_index) if any(index is not None for index in self._next_prompt_index) else None

    @next_prompt_index.setter
    def next_prompt_index(self, index: int | Sequence[int | None] | IntArray | None) -> None:
        self._next_prompt_index = self._prompt_indices(index, self._every_row, "next_prompt_index")

    def _prompt_indices(self, index: Any, rows: Sequence[int] | IntArray, argument: str) -> list[int | None]:
        """Returns one checked prompt index, or None, for each of `rows`."""
        if not isinstance(index, Sequence | np.ndarray) or np.ndim(index) == 0:
            one = None if index is None else self._task.check_prompt_index(index, argument)
            return [one] * len(rows)
        if len(index) != self.num_envs:
            raise ValueError(f"`{argument}` must be one number or one per row: {self.num_envs} rows, got {len(index)} numbers.")
        if isinstance(index, np.ndarray) and index.dtype.kind in "iu":
            chosen = index[rows]
            if ((chosen >= 0) & (chosen < len(self._task.prompt_set))).all():
                return cast("list[int | None]", chosen.tolist())
        return [None if index[row] is None else self._task.check_prompt_index(index[row], f"{argument}[{row}]") for row in rows]

    def reset(self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        """Begins an episode in every row, or in the rows of `options["reset_mask"]`, and ends their holds.

        Args:
            seed: seeds the draws of prompts from here on: row i with `seed + i`, or with its entry in a list.
            options: any of `prompt_index`, `prompt` and `reset_mask`; left as it is.

        Returns:
            The observation of all rows, and `prompt_index` with its mask.
        """
        checked = check_options(options, ("prompt_index", "prompt", "reset_mask"))
        rows = self._every_row
        if "reset_mask" in checked:
            rows = np.flatnonzero(check_mask(checked["reset_mask"], self.num_envs, 'options["reset_mask"]'))
            if not len(rows):
                raise ValueError('`options["reset_mask"]` must have at least one True entry, got none.')
        seeds = check_seeds(seed, self.num_envs)
        free = self._free_prompts(checked, rows.tolist())
        if "prompt_index" in checked:
            for row, index in zip(rows, self._prompt_indices(checked["prompt_index"], rows, 'options["prompt_index"]'), strict=True):
                self._next_prompt_index[row] = index
        for row in rows.tolist():
            if seeds[row] is not None:
                self._seed_row(row, seeds[row])
        infos = InfoBuilder(self.num_envs)
        self._begin(rows, infos, free)
        self._held[rows] = False
        self._any_held = bool(self._held.any())
        return self._rows.observe(), infos.infos

    def _free_prompts(self, options: Mapping[str, Any], rows: list[int]) -> dict[int, Prompt]:
        """Returns the prompts of `options["prompt"]` by row."""
        if "prompt" not in options:
            return {}
        prompt = options["prompt"]
        if not isinstance(prompt, list | tuple) or all(isinstance(part, Mapping) and "role" in part for part in prompt):
            return dict.fromkeys(rows, self._task.free_prompt(prompt))
        if len(prompt) != self.num_envs:
            raise ValueError(
                f'`options["prompt"]` must be one prompt or a list of one per row: {self.num_envs} rows, got {len(prompt)} prompts.'
            )
        return {row: self._task.free_prompt(prompt[row]) for row in rows}

    def _begin(self, rows: IntArray, infos: InfoBuilder, free: Mapping[int, Prompt] = _NO_PROMPTS) -> None:
        """Begins an episode in each of `rows`: with its `free` prompt, else with its `next_prompt_index`, else with a random one."""
        indices = np.array([-1 if row in free else self._draw(row) for row in rows.tolist()], dtype=np.int64)
        if free:
            for row in free:
                self._rows.begin(row, free[row])
                self._next_prompt_index[row] = None
        else:
            self._rows.begin_many(rows, indices)
        infos.add_numbers("prompt_index", rows, indices)

    def _draw(self, row: int) -> int:
        index = self._next_prompt_index[row]
        if index is None:
            return int(self._generator(row).integers(self.num_prompts))
        self._next_prompt_index[row] = None
        return index

    def step(self, actions: IntArray) -> tuple[Observation, Array, Array, Array, Info]:
        """Appends a token to each row.

        Args:
            actions: (num_envs,) token ids. Those of rows that are being reset, or held, are ignored.

        Returns:
            Observations, rewards (num_envs,) float64, terminated and truncated (num_envs,) bool, and infos.
        """
        acting, beginning = self._sort_rows()
        tokens = self._check_actions(actions, acting)
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros((2, self.num_envs), dtype=np.bool_)
        infos = InfoBuilder(self.num_envs)
        infos.add_numbers("prompt_index", _NO_ROWS, _NO_ROWS)  # there at every step, as some clients need keys to be; masked
        if len(beginning):
            self._begin(beginning, infos)
        if len(acting):
            self._act(acting, tokens, rewards, terminated, truncated, infos)
        return self._rows.observe(), rewards, terminated, truncated, infos.infos

    def _sort_rows(self) -> tuple[IntArray, IntArray]:
        """Returns the rows that take their action in this step and those that begin an episode instead."""
        phases = self._rows.phases
        running = phases == Phase.RUNNING
        if not self._any_held and running.all():  # the usual case
            return self._every_row, _NO_ROWS
        idle = np.flatnonzero(~running & ~self._held)
        fresh = idle[phases[idle] == Phase.NEEDS_RESET]
        if len(fresh):
            raise EpisodeEndedError(
                f"`step` needs an episode in each row, and none has begun in rows {fresh.tolist()}; call `reset` first."
            )
        ended = _NO_ROWS if self.hold else idle
        if len(ended) and self.autoreset_mode != AutoresetMode.NEXT_STEP:
            raise EpisodeEndedError(
                f"`step` needs episodes that go on, and those of rows {ended.tolist()} have ended (autoreset mode "
                f'{self.autoreset_mode.value}); call `reset(options={{"reset_mask": ended}})` with a bool array first.'
            )
        return np.flatnonzero(running & ~self._held), ended

    def _check_actions(self, actions: Any, acting: IntArray) -> IntArray:
        """Returns the tokens of the rows that act, (K,), after checking shape, type and range."""
        array = np.asarray(actions)
        if array.shape != (self.num_envs,) or array.dtype.kind not in "iu":
            raise ValueError(
                f"`actions` must be {self.num_envs} integer token ids, one per row, got shape {array.shape} and dtype {array.dtype}."
            )
        tokens: IntArray = array[acting].astype(np.int64, copy=False)
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            place = int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
            raise ValueError(
                f"`actions` must be token ids from 0 to {self.vocab_size - 1} (`len(tokenizer) - 1`), "
                f"got {tokens[place]} in row {acting[place]}."
            )
        return tokens

    def _act(
        self, acting: IntArray, tokens: IntArray, rewards: Array, terminated: BoolArray, truncated: BoolArray, infos: InfoBuilder
    ) -> None:
        """Appends `tokens` to the rows `acting` and writes what comes of it into the arrays and infos of the step."""
        rows, dense = self._rows, self._task.rewards.has_dense
        ended = rows.append(acting, tokens)
        finished = acting[ended]
        terminated[finished] = True
        if self.max_episode_steps is not None:
            cut = acting[rows.lengths[acting] >= self.max_episode_steps]
            truncated[cut] = True
            rows.phases[cut] = Phase.ENDED
        over = terminated | truncated
        same_step = self.autoreset_mode == AutoresetMode.SAME_STEP
        final = InfoBuilder(self.num_envs) if same_step else infos  # where the infos of the episodes' last steps go
        if dense:
            rewards[acting], parts = rows.pay_dense(acting, ended)
            last = over[acting]
            for builder, which in ((final, last), (infos, ~last)):
                if which.any():
                    builder.add_named_numbers("dense_rewards", acting[which], {name: values[which] for name, values in parts.items()})
        if len(finished):
            totals, outcome = rows.pay_final(finished)
            rewards[finished] += totals
            final.add_outcome(finished, outcome)
            self._print(finished)
        if same_step and over.any():
            self._start_over(np.flatnonzero(over), final, infos)

    def _start_over(self, over: IntArray, final: InfoBuilder, infos: InfoBuilder) -> None:
        """Moves what the rows `over` ended with into the infos and begins their next episodes (mode SAME_STEP)."""
        infos.add_objects("final_obs", over, [self._rows.observe_row(row) for row in over.tolist()])
        infos.nest("final_info", over, final.infos)
        if not self.hold:
            self._begin(over, infos)

    @property
    def fresh(self) -> BoolArray:
        """The rows that have begun an episode, taken no step of it and are not held, (num_envs,) bool."""
        return self._rows.fresh() & ~self._held

    def require_reset(self) -> None:
        """Leaves all episodes and holds: from here on `step` is an error until the next `reset` of every row."""
        self.hold_rows(None)
        self._rows.phases[:] = Phase.NEEDS_RESET

    def hold_rows(self, mask: BoolArray | None) -> None:
        """Keeps rows as they are until their next `reset`.

        A held row ignores its action; it gets no reward, no end flag, no info and no automatic reset, and draws no random number.

        Args:
            mask: (num_envs,) bool, the rows to hold from now on; None lets all rows go.
        """
        self._held = np.zeros(self.num_envs, dtype=np.bool_) if mask is None else check_mask(mask, self.num_envs, "mask").copy()
        self._any_held = bool(self._held.any())

    def step_sequence(self, actions: IntArray, lengths: IntArray) -> SequenceResult:
        """Takes every row through a whole completion: what stepping would give, in one pass and with one call per reward function.

        All rows must be freshly reset, and all need a reset afterwards. No random number is drawn and no row is reset automatically.

        Args:
            actions: (num_envs, T') token ids; fillers from column `lengths[i]` of row i on, which are never looked at.
            lengths: (num_envs,) how many steps each row takes, 0 to T'; fewer where its episode ends before.

        Returns:
            Rewards (num_envs, T'), end flags and lengths per row, and the info of each row's last step.
        """
        return self.start_sequence(actions, lengths).result()

    def start_sequence(self, actions: IntArray, lengths: IntArray) -> Pending[SequenceResult]:
        """Begins a `step_sequence`: rewards that are async functions are waited for when the result is asked for.

        Rows may be reset before that.
        """
        if not self.fresh.all():
            raise EpisodeEndedError(
                f"`step_sequence` needs rows that are freshly reset and not held, and rows {np.flatnonzero(~self.fresh).tolist()} are not; "
                "call `reset` first."
            )
        started = start_sequences(self._rows, actions, lengths, self.max_episode_steps)
        if self.render_mode == "human":  # what is printed is what the rows hold
            self._print(np.flatnonzero(started.result().terminated))
        return started

    def render(self) -> tuple[Any, ...] | None:
        """Returns the episode of each row so far, as text in mode "ansi", as a picture in mode "rgb_array"; see `TextGenEnv.render`."""
        if self.render_mode in (None, "human"):
            render_row(self._rows, 0, self.render_mode)
            return None
        return tuple(render_row(self._rows, row, self.render_mode) for row in range(self.num_envs))

    def _print(self, ended: IntArray) -> None:
        """Prints the episodes of the rows `ended` in mode "human"."""
        if self.render_mode == "human":
            for row in ended.tolist():
                print(f"[{row}]\n{row_frame(self._rows, row)}", flush=True)
