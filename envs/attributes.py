"""What users and agents read off a text environment: the same attributes on the single and on the vector environment."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gymnasium.envs.registration import EnvSpec

from textgym.envs.task import TextTask
from textgym.prompts import PromptSet
from textgym.rewards.compose import RewardSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
            spec.kwargs = self._task.shared_arguments(spec.kwargs)
        self._spec = spec

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
