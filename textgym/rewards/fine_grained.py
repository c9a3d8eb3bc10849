"""Fine-grained rewards (Wu et al. 2023, arXiv:2306.01693): several reward models, each of which scores segments of its own length.

    r_t = Σ_k Σ_j 1[t = T_j^k] w_k R_k(x, y_≤t, j)

Objective k cuts the completion with its own segmenter, scores segment j from the prefix that ends with it, and the score is paid at that
segment's last token T_j^k. `textgym.rewards.dense` does the cutting and paying; here is how a list of objectives is written down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from textgym.rewards.calling import Parameters, RewardFunction, read_parameters, unique_names
from textgym.rewards.compose import RewardSet
from textgym.rewards.dense import dense_kind, segment_level
from textgym.rewards.episodes import as_completion
from textgym.rewards.resolve import loaded_reward, resolve_reward
from textgym.rewards.segmenters import Segmenter, find_segmenter

Seen = Literal["prefix", "segment"]
Paid = Literal["segment", "end"]


@dataclass(frozen=True)
class Objective:
    """One objective of a `FineGrainedReward`: what scores it, over which segments, and how much it counts.

    Args:
        reward: one reward of any form that an environment takes: a function, a name, a classifier, a reward model.
        segmenter: `"sentence"`, `"sub_sentence"`, `"whole"`, `TokenCount(n)` or a function (see `segment_level`). None: once, at the end of
            the completion; or, for a function marked with `token_level` or `segment_level`, as it is marked.
        weight: w_k, a finite number; can be changed later with `set_weights`.
        name: the name in `info` and logs; by default that of the reward.
        sees: what the reward gets as `completions` and `completion_ids`: `"prefix"`, the completion up to and including the segment, or
            `"segment"`, the segment alone, without white space around its text. A function may also ask for `segments`, `segment_ids` and
            `segment_index`.
        paid: `"segment"`: each score at the last token of its segment; `"end"`: all of them together at the completion's last token, which
            is the same reward with the same number of scores, and without the credit.

    Raises:
        ValueError: an argument breaks these rules.
    """

    reward: Any
    segmenter: str | Segmenter | None = None
    weight: float = 1.0
    name: str | None = None
    sees: Seen = "prefix"
    paid: Paid = "segment"

    def __post_init__(self) -> None:
        if self.sees not in get_args(Seen):
            raise ValueError(f"`sees` must be 'prefix' or 'segment', got {self.sees!r}.")
        if self.paid not in get_args(Paid):
            raise ValueError(f"`paid` must be 'segment' or 'end', got {self.paid!r}.")
        if self.segmenter is not None:
            find_segmenter(self.segmenter)
        elif (self.sees, self.paid) != ("prefix", "segment"):
            raise ValueError("`sees` and `paid` say what to do with segments, so a `segmenter` must be given too.")

    def part(self) -> tuple[str, RewardFunction]:
        """Returns the name and the function, marked with its segmenter."""
        name, function = resolve_reward(loaded_reward(self.reward))
        if self.segmenter is None:
            return self.name or name, function
        if dense_kind(function) is not None:
            raise ValueError(
                f"objective `{self.name or name}` is marked as dense already; leave `segmenter` away, or give the plain function."
            )
        # A new object each time: the mark is put on it, and one reward may serve several objectives.
        scorer: RewardFunction = _OnSegments(function, name) if self.sees == "segment" else partial(function)
        return self.name or name, segment_level(self.segmenter, at_end=self.paid == "end")(scorer)


class FineGrainedReward(RewardSet):
    """A reward of several objectives: `r_t = Σ_k Σ_j 1[t = T_j^k] w_k R_k(x, y_≤t, j)`.

    It is a `RewardSet`, to be given to an environment as `reward=`. What each objective pays stays visible before weighting: for every
    token in `info["dense_rewards"]`, summed over the episode in `info["rewards"]`; `set_weights` changes the weights.

    Args:
        objectives: at least one; names that occur twice get `_2`, `_3`, ...

    Raises:
        ValueError: there is none, or one of them breaks its rules.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        if not objectives or not all(isinstance(one, Objective) for one in objectives):
            raise ValueError(f"`objectives` must be a list of at least one `Objective`, got {objectives!r}.")
        names, functions = zip(*(one.part() for one in objectives), strict=True)
        super().__init__(unique_names(names), functions, [1.0] * len(objectives))
        self.set_weights([one.weight for one in objectives])


class _OnSegments:
    """A reward that is shown each segment as if that were the whole completion.

    Args:
        function: the reward.
        name: its name, for error messages.
    """

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function, self.__name__ = function, name
        self._parameters: Parameters = read_parameters(function, name)

    def __call__(self, prompts: list[Any], segments: list[str], segment_ids: list[list[int]], **further: Any) -> Any:
        alone = [as_completion(prompt, text.strip()) for prompt, text in zip(prompts, segments, strict=True)]
        shown = {"prompts": prompts, "segments": segments, "segment_ids": segment_ids}
        arguments = {**further, **shown, "completions": alone, "completion_ids": segment_ids}
        return self.function(**self._parameters.select(arguments, self.__name__))
