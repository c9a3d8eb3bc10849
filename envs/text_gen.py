"""`TextGen-v0` for one episode at a time: the face of `textgym.envs.core` that Gymnasium calls an environment."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import numpy as np

from textgym.envs.attributes import TaskAttributes
from textgym.envs.core import EpisodeRows, Phase
from textgym.envs.options import check_options, check_render_mode, check_seed
from textgym.envs.rendering import Typewriter, render_row
from textgym.envs.task import build_task
from textgym.errors import EpisodeEndedError
from textgym.prompts import Prompt
from textgym.types import Info, Observation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_USUAL_TYPES = (int, np.int64)  # tried first: `isinstance` of an abstract number type is slow for every step


class TextGenEnv(TaskAttributes, gym.Env[Observation, np.int64]):
    """Writing a text token by token, as a Markov decision process.

    ## Description
    An episode begins with a prompt. Every action appends one token of the vocabulary to it, and the observation is the prompt with all
    tokens so far, so the state is Markov and the transition deterministic. When the completion ends it is scored by one or more reward
    functions. Without arguments the environment uses the prompts (opening words of film reviews), the tokenizer and the reward model
    that ship with textgym; nothing is ever downloaded.

    ## Action Space
    `Discrete(V)`: the id of the next token, `V = len(tokenizer)`. No token is banned, special tokens included.

    >>> env = gym.make("TextGen-v0", prompts=["a b", "b"], tokenizer=tokenizer, reward=reward, max_new_tokens=4)
    >>> env.action_space
    Discrete(5)

    ## Observation Space
    A flat `Dict` of `input_ids` and `attention_mask`, each of `L = max_prompt_tokens + max_new_tokens` columns. The prompt ends in column
    `max_prompt_tokens - 1` (it is left-padded) and token `t` of the completion, counted from 0, stands in column `max_prompt_tokens + t`.
    The mask is 1 where there is a token; the ids elsewhere mean nothing. `textgym.model_inputs(observation)` makes tensors for a
    transformers model.

    >>> env.observation_space
    Dict('attention_mask': MultiBinary(6), 'input_ids': Box(0, 4, (6,), int64))

    ## Rewards
    0 until the episode ends, then the weighted sum of the reward functions for the whole completion. A function is called by keyword as
    `reward(prompts, completions, completion_ids, **columns)`, where `completions` are texts without special tokens (message lists for a
    prompt given as messages) and `completion_ids` keep the end token; it returns a list with one number per completion, or None for a
    row that it does not apply to. Functions marked with `textgym.rewards.token_level` or `textgym.rewards.segment_level` pay at each token
    or at the last token of each segment; what they paid stands, unweighted, in `info["dense_rewards"]` of every step.
    At the end `info` holds `prompt` (as it was given), `completion` (a text, also after messages), `completion_ids`, `finish_reason`
    ("eos" or "length") and `rewards`: each named part before weighting (the sum over the episode for a dense one), without the parts that
    did not apply.

    ## Starting State
    A prompt drawn uniformly. `reset(options={"prompt_index": i})` takes prompt `i`; `options={"prompt": ...}` takes any other prompt
    (a string, messages, or a dict with `prompt` and the columns that the rewards ask for). So does the attribute `next_prompt_index`, for
    the next reset only, unless that one has options of its own. `info["prompt_index"]` says which prompt it is, -1 for one not of the set.

    ## Episode End
    The episode terminates with an end token (`eos_token_ids`) or with the `max_new_tokens`-th token: both are `terminated`, since the
    length limit is part of this MDP. It never truncates by itself; an outer time limit does.
    While the attribute `hold` is True, an episode that has ended stays as it is: `step` returns the same observation with reward 0 and
    no end flag, and `reset` without seed and options does nothing. So whole batches can be walked to their ends under any autoreset.

    ## Arguments
    - `prompts`: a list of strings or message lists, a list of dicts with a `prompt` column (the other columns reach the rewards), the path
      of a `.jsonl` or `.jsonl.gz` file, a `datasets.Dataset`, or a `textgym.prompts.PromptSet`. Default: the bundled training prompts.
      Messages go through the tokenizer's chat template.
    - `tokenizer`: a transformers tokenizer, or the path or id of one. Default: the bundled one.
    - `reward`: one reward function or a list of them; also a path or a model of a sequence classifier with one label, an object with a
      method `score`, or the name of a bundled reward. Default: the bundled reward model.
    - `reward_weights`: one number per reward function. Default: 1 each.
    - `max_prompt_tokens`: P, in tokens. Default: the longest prompt's.
    - `max_new_tokens`: T, in tokens. Default: 32.
    - `eos_token_ids`: the id or ids of the end tokens. Default: the tokenizer's, its chat template's, and those of the file
      `generation_config.json` beside it (`textgym.end_tokens`).
    - `truncate_prompts`: keep the last `max_prompt_tokens` tokens of a longer prompt, of the set or of `options`. By default such a prompt
      is an error.
    - `render_mode`: `"ansi"` (`render()` returns the episode as text), `"human"` (it is printed as it grows) or `"rgb_array"` (`render()`
      returns a picture of that text, always of one size, for videos).

    Every bad argument is a `ValueError` that says what to do.

    ## Version History
    - v0: first version.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["ansi", "human", "rgb_array"],
        "render_fps": 30,
    }

    def __init__(
        self,
        prompts: Any = None,
        tokenizer: "PreTrainedTokenizerBase | str | os.PathLike[str] | None" = None,
        reward: Any = None,
        *,
        reward_weights: Sequence[float] | None = None,
        max_prompt_tokens: int | None = None,
        max_new_tokens: int = 32,
        eos_token_ids: int | Sequence[int] | None = None,
        truncate_prompts: bool = False,
        render_mode: str | None = None,
    ) -> None:
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
        self.observation_space = self._task.observation_space()
        self.action_space = self._task.action_space()
        self.hold = False
        self._next_prompt_index: int | None = None
        self._rows = EpisodeRows(self._task, 1)
        self._typewriter = Typewriter() if render_mode == "human" else None

    @property
    def next_prompt_index(self) -> int | None:
        """Which prompt the next reset takes, None for a random one. That reset sets it back to None."""
        return self._next_prompt_index

    @next_prompt_index.setter
    def next_prompt_index(self, index: int | None) -> None:
        self._next_prompt_index = None if index is None else self._task.check_prompt_index(index, "next_prompt_index")

    @property
    def fresh(self) -> bool:
        """Has an episode begun of which no step was taken yet?"""
        return bool(self._rows.fresh()[0])

    def require_reset(self) -> None:
        """Leaves the episode: from here on `step` is an error until the next `reset`."""
        self._rows.phases[0] = Phase.NEEDS_RESET

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        """Begins an episode.

        Args:
            seed: seeds the draws of prompts from here on.
            options: `{"prompt_index": i}` or `{"prompt": ...}` to choose the prompt.

        Returns:
            The observation and `{"prompt_index": ...}`.
        """
        rows = self._rows
        if self.hold and seed is None and not options and rows.phases[0] != Phase.NEEDS_RESET:
            return rows.observe_row(0), {}
        checked = check_options(options, ("prompt_index", "prompt"))
        super().reset(seed=check_seed(seed))
        prompt = self._choose_prompt(checked)
        self._next_prompt_index = None
        rows.begin(0, prompt)
        if self._typewriter:
            self._typewriter.begin(prompt.text)
        return rows.observe_row(0), {"prompt_index": prompt.prompt_index}

    def _choose_prompt(self, options: dict[str, Any]) -> Prompt:
        if "prompt" in options:
            return self._task.free_prompt(options["prompt"])
        index = self._next_prompt_index
        if "prompt_index" in options:
            index = self._task.check_prompt_index(options["prompt_index"], 'options["prompt_index"]')
        return self._task.prompt_set[int(self.np_random.integers(self.num_prompts)) if index is None else index]

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, Info]:
        """Appends a token.

        Args:
            action: a token id, 0 <= action < V.

        Returns:
            Observation, reward, terminated, truncated (always False) and info, which is empty before the last step (apart from
            `dense_rewards` where there are dense rewards).
        """
        rows = self._rows
        if rows.phases[0] != Phase.RUNNING:
            return self._step_without_episode()
        ended = rows.append_one(0, self._check_action(action))
        reward = 0.0
        info: Info = {}
        if ended or self._task.rewards.has_dense:
            reward, info = self._pay(ended)
        if self._typewriter:
            self._typewriter.show(rows, 0)
        return rows.observe_row(0), reward, ended, False, info

    def _check_action(self, action: Any) -> int:
        if isinstance(action, np.ndarray) and action.shape == ():
            action = action[()]
        if type(action) not in _USUAL_TYPES and not isinstance(action, np.integer):
            raise ValueError(f"`action` must be one integer token id, got {action!r} of type {type(action).__name__}.")
        if not 0 <= action < self._task.vocab_size:
            raise ValueError(f"`action` must be a token id from 0 to {self._task.vocab_size - 1} (`len(tokenizer) - 1`), got {action}.")
        return int(action)

    def _step_without_episode(self) -> tuple[Observation, float, bool, bool, Info]:
        if self._rows.phases[0] == Phase.NEEDS_RESET:
            raise EpisodeEndedError("`step` needs an episode, and none has begun; call `reset` first.")
        if not self.hold:
            raise EpisodeEndedError("`step` needs an episode that goes on, and this one has ended; call `reset` first.")
        return self._rows.observe_row(0), 0.0, False, False, {}

    def _pay(self, ended: bool) -> tuple[float, Info]:
        """Returns the reward of this step and its info."""
        reward, row = 0.0, np.zeros(1, dtype=np.int64)
        info: Info = {}
        if self._task.rewards.has_dense:
            dense, parts = self._rows.pay_dense(row, np.array([ended]))
            reward += float(dense[0])
            info["dense_rewards"] = {name: float(values[0]) for name, values in parts.items()}
        if ended:
            final, outcome = self._rows.pay_final(row)
            reward += float(final[0])
            info |= outcome.infos()[0]
        return reward, info

    def render(self) -> Any:
        """Returns the episode so far as text in mode "ansi", as a picture in mode "rgb_array"; in mode "human" it was printed already."""
        return render_row(self._rows, 0, self.render_mode)
