"""What users and agents read off a text environment: the same attributes on the single and on the vector environment."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.envs.registration import EnvSpec

from textgym.envs.task import TextTask
from textgym.prompts import PromptSet
from textgym.rewards.compose import RewardSet
from textgym.types import BoolArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextSpec(EnvSpec):
    """A specification whose `to_json` says which arguments cannot be written, and what to give instead."""

    def to_json(self) -> str:
        """Returns the specification as JSON.

        Raises:
            ValueError: an argument is an object in memory.
        """
        cures = [f"`{name}` as {_AS_JSON.get(name, 'plain JSON')}" for name, value in self.kwargs.items() if not _is_json(value)]
        if cures:
            raise ValueError(
                "an environment can be written as JSON when its arguments can: this one has objects in memory. "
                f"Make it with {', '.join(cures)}."
            )
        return super().to_json()


_AS_JSON = {
    "prompts": "the path of a .jsonl file",
    "tokenizer": "the folder or id of a tokenizer",
    "reward": "the name of a reward, 'module:function' or the folder of a classifier",
}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


class TaskAttributes:
    """The read-only attributes of a text environment, taken from its task, and its Gymnasium spec."""

    _task: TextTask
    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """How Gymnasium makes this environment again. Environments made from it share prompts, tokenizer and rewards with this one."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None:
            spec = TextSpec(**{field.name: getattr(spec, field.name) for field in fields(spec) if field.init})
            spec.kwargs = self._task.shared_arguments(spec.kwargs)
        self._spec = spec

    def action_masks(self) -> BoolArray:
        """Returns which actions are legal, (V,) bool, of a vector environment (num_envs, V): all of them.

        sb3-contrib's `MaskablePPO` asks for this; a wrapper that forbids tokens has a method of the same name.
        """
        rows = getattr(self, "num_envs", None)
        return np.ones(self.vocab_size if rows is None else (rows, self.vocab_size), dtype=np.bool_)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The transformers tokenizer."""
        return self._task.tokenizer

    @property
    def vocab_size(self) -> int:
        """V, the number of actions."""
        return self._task.vocab_size

    @property
    def max_prompt_tokens(self) -> int:
        """P: token t of a completion stands in column P + t of an observation."""
        return self._task.max_prompt_tokens

    @property
    def max_new_tokens(self) -> int:
        """T: an episode ends with its T-th token at the latest."""
        return self._task.max_new_tokens

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an episode."""
        return self._task.eos_token_ids

    @property
    def fill_token_id(self) -> int:
        """The id in columns without a token. Nothing depends on which it is."""
        return self._task.fill_token_id

    @property
    def prompt_set(self) -> PromptSet:
        """The prompts that episodes begin with."""
        return self._task.prompt_set

    @property
    def reward_set(self) -> RewardSet:
        """What scores completions; it counts its calls and keeps what reward functions log."""
        return self._task.rewards

    @property
    def reward_weights(self) -> tuple[float, ...]:
        """The weights of the rewards, in the order of `reward_set.names`; settable, see `set_reward_weights`."""
        return self._task.rewards.weights

    @reward_weights.setter
    def reward_weights(self, weights: Sequence[float] | Mapping[str, float]) -> None:
        self._task.rewards.set_weights(weights)

    def set_reward_weights(self, weights: Sequence[float] | Mapping[str, float]) -> None:
        """Changes the weights from the next payment on, in every environment that shares these rewards (see `RewardSet.set_weights`).

        Args:
            weights: one finite number per reward, or a mapping of names to numbers.
        """
        self._task.rewards.set_weights(weights)

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return len(self._task.prompt_set)
