"""What a text environment generates and how it is paid: prompts, tokenizer, rewards and sizes, shared by every copy of the environment."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from gymnasium import spaces

from textgym.prompts import Prompt, PromptSet, encode_prompts, split_row
from textgym.rewards.compose import RewardSet
from textgym.rewards.episodes import RESERVED_COLUMNS
from textgym.tokenizers import SharedTokenizer, end_token_ids, filler_token_id, load_tokenizer
from textgym.types import BoolArray, Observation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_REWARD = "film-review"


@dataclass(frozen=True, eq=False)
class TextTask:
    """Everything about a text environment that does not change: `copy.deepcopy` returns the object itself.

    Attributes:
        tokenizer: a transformers tokenizer.
        prompts: the prompts as they were read, before they were fitted to `max_prompt_tokens`.
        prompt_set: the prompts that episodes begin with, none longer than `max_prompt_tokens`.
        rewards: the reward functions with their weights.
        max_prompt_tokens: P, tokens.
        max_new_tokens: T, tokens; reaching it terminates the episode.
        eos_token_ids: the tokens that terminate the episode.
        fill_token_id: the id in columns that hold no token.
        truncate_prompts: whether a longer prompt is cut to its end instead of being an error.
        vocab_size: V, `len(tokenizer)`.
        ends_episode: (V,) bool, True at `eos_token_ids`.
    """

    tokenizer: "PreTrainedTokenizerBase"
    prompts: PromptSet
    prompt_set: PromptSet
    rewards: RewardSet
    max_prompt_tokens: int
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    fill_token_id: int
    truncate_prompts: bool
    vocab_size: int
    ends_episode: BoolArray

    def __deepcopy__(self, memo: dict[int, Any]) -> "TextTask":
        return self

    @property
    def length(self) -> int:
        """L = P + T, columns of an observation."""
        return self.max_prompt_tokens + self.max_new_tokens

    def observation_space(self) -> spaces.Space[Observation]:
        """Returns the space of one observation."""
        ids, mask = spaces.Box(0, self.vocab_size - 1, (self.length,), np.int64), spaces.MultiBinary(self.length)
        return cast("spaces.Space[Observation]", spaces.Dict({"input_ids": ids, "attention_mask": mask}))

    def action_space(self) -> spaces.Discrete:
        """Returns the space of one action: the whole vocabulary."""
        return spaces.Discrete(self.vocab_size)

    def check_prompt_index(self, index: Any, argument: str) -> int:
        """Returns `index` as an int if it names a prompt of the set; otherwise a `ValueError` that calls it `argument`."""
        if isinstance(index, bool | np.bool_) or not isinstance(index, int | np.integer) or not 0 <= index < len(self.prompt_set):
            raise ValueError(
                f"`{argument}` must be an integer from 0 to {len(self.prompt_set) - 1} (there are {len(self.prompt_set)} prompts), "
                f"got {index!r}."
            )
        return int(index)

    def free_prompt(self, row: Any) -> Prompt:
        """Returns a prompt that is not of the set, from a string, messages, or a dict with `prompt` and other columns."""
        argument = '`options["prompt"]`'
        text, columns = split_row(row, argument)
        _check_columns(columns, argument)
        ids = encode_prompts(self.tokenizer, [text], argument, {name: [value] for name, value in columns.items()})[0]
        if len(ids) > self.max_prompt_tokens and not self.truncate_prompts:
            raise ValueError(
                f"{argument} must have at most `max_prompt_tokens` = {self.max_prompt_tokens} tokens, got {len(ids)}; "
                "make the environment with a larger `max_prompt_tokens` or with `truncate_prompts=True`."
            )
        return Prompt(-1, text, ids[-self.max_prompt_tokens :], columns)

    def shared_arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the keyword arguments of an environment with the heavy ones replaced by objects that copies share.

        Strings (paths, ids, names of bundled rewards) stay as they are, so that a spec made of them can still be written as JSON.
        """
        shared = {"prompts": self.prompts, "tokenizer": SharedTokenizer(self.tokenizer), "reward": self.rewards}
        replaced = {name for name in shared if kwargs.get(name) is not None and not isinstance(kwargs[name], str)}
        kept = {name: value for name, value in kwargs.items() if name != "reward_weights" or "reward" not in replaced}
        return kept | {name: shared[name] for name in replaced}  # a reward set holds its weights


def build_task(
    prompts: Any,
    tokenizer: Any,
    reward: Any,
    *,
    reward_weights: Sequence[float] | None,
    max_prompt_tokens: int | None,
    max_new_tokens: int,
    eos_token_ids: int | Sequence[int] | None,
    truncate_prompts: bool,
) -> TextTask:
    """Checks the arguments of an environment (its class documents them), fills in the bundled defaults and returns the task."""
    check_count("max_new_tokens", max_new_tokens)
    if max_prompt_tokens is not None:
        check_count("max_prompt_tokens", max_prompt_tokens)
    if not isinstance(truncate_prompts, bool):
        raise ValueError(f"`truncate_prompts` must be True or False, got {truncate_prompts!r}.")
    loaded = load_tokenizer(tokenizer) if tokenizer is not None else _bundled_tokenizer()
    read = _bundled_prompts(loaded) if prompts is None else PromptSet.build(prompts, loaded)
    _check_columns(read.columns, "`prompts`")
    limit = int(max_prompt_tokens) if max_prompt_tokens is not None else read.longest
    ends = end_token_ids(loaded, eos_token_ids)
    ends_episode = np.zeros(len(loaded), dtype=np.bool_)
    ends_episode[list(ends)] = True
    return TextTask(
        tokenizer=loaded,
        prompts=read,
        prompt_set=read.fit(limit, truncate=truncate_prompts),
        rewards=RewardSet.build(DEFAULT_REWARD if reward is None else reward, reward_weights),
        max_prompt_tokens=limit,
        max_new_tokens=int(max_new_tokens),
        eos_token_ids=ends,
        fill_token_id=filler_token_id(loaded, ends),
        truncate_prompts=truncate_prompts,
        vocab_size=len(loaded),
        ends_episode=ends_episode,
    )


def _check_columns(names: Iterable[str], where: str) -> None:
    taken = sorted(RESERVED_COLUMNS.intersection(names))
    if taken:
        raise ValueError(f"{where} must not have the columns {taken}, names that rewards use for something else; rename them.")


def check_count(argument: str, value: Any) -> int:
    """Returns `value` as an int if it is an integer of at least 1; otherwise a `ValueError` that calls it `argument`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"`{argument}` must be an integer of at least 1, got {value!r}.")
    return int(value)


@lru_cache(maxsize=1)
def _bundled_tokenizer() -> "PreTrainedTokenizerBase":
    from textgym.bundled import bundled_tokenizer_path

    return load_tokenizer(bundled_tokenizer_path())


@lru_cache(maxsize=4)
def _bundled_prompts(tokenizer: "PreTrainedTokenizerBase") -> PromptSet:
    from textgym.bundled import bundled_prompts

    return PromptSet(bundled_prompts("train"), tokenizer)
