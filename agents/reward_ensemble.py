"""`RewardEnsemble`: several reward models as one, which is careful where they disagree.

A policy goes where its reward model is wrong in its favour. Members that were trained on different samples of the feedback are wrong in
different places (Christiano et al. 2017, arXiv:1706.03741, §2.2.3), so what they disagree on can be taken off the reward (Coste et al.
2023, arXiv:2310.02743), or be asked about (Christiano et al. 2017, §2.2.4).
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch

from textgym.agents.common.checks import check_choice, check_count, check_number
from textgym.agents.policy import CausalLMPolicy
from textgym.agents.reward_model import RewardModel
from textgym.agents.reward_model_trainer import RewardModelTrainer
from textgym.evaluation.calibration import sigmoid
from textgym.feedback.reading import read_feedback
from textgym.prompts import PromptText
from textgym.rewards.dense import token_level

Aggregate: TypeAlias = Literal["mean", "min"]
Floats: TypeAlias = npt.NDArray[np.float64]
MEMBER, SETTINGS_FILE = "member-{}", "ensemble.json"


class RewardEnsemble:
    """One reward out of several.

        r(x, y) = mean_m r_m(x, y) − λ std_m r_m(x, y),    or    min_m r_m(x, y)

    Coste et al. take the variance in the place of the standard deviation (UWO), and call the minimum worst-case optimisation. Comparisons
    fix the members' rewards up to a constant each: `normalise` them first, or the disagreement is one about levels.

    Args:
        models: at least two `RewardModel`s, all of them with a score per text or all with one per token; they may share weights or not.
        uncertainty_penalty: λ, at least 0; with "min" it has no meaning and must be 0.
        aggregate: "mean" or "min".

    Raises:
        ValueError: an argument breaks one of the rules above.
    """

    __name__ = "reward_ensemble"

    def __init__(self, models: Iterable[RewardModel], *, uncertainty_penalty: float = 0.0, aggregate: Aggregate = "mean") -> None:
        self.models = list(models)
        if len(self.models) < 2:
            raise ValueError(f"`models` must be at least two reward models, which can disagree, got {len(self.models)}.")
        for model in self.models:
            if not isinstance(model, RewardModel):
                raise ValueError(f"`models` must be RewardModels, got a {type(model).__name__}; load one with RewardModel.from_pretrained.")
        if len({model.per_token for model in self.models}) == 2:
            raise ValueError("`models` must all have a score per text, or all a score per token; some have the one and some the other.")
        check_number("uncertainty_penalty", uncertainty_penalty, 0)
        check_choice("aggregate", aggregate, get_args(Aggregate))
        if aggregate == "min" and uncertainty_penalty:
            raise ValueError(f"`uncertainty_penalty` must be 0 with `aggregate='min'`, which is the penalty, got {uncertainty_penalty}.")
        self.uncertainty_penalty, self.aggregate = uncertainty_penalty, aggregate
        if self.models[0].per_token:
            token_level(self)

    @classmethod
    def train(
        cls,
        start: CausalLMPolicy | Callable[[int], RewardModel],
        feedback: Any,
        learning_rate: Any = 1e-5,
        *,
        num_members: int = 4,
        bootstrap: bool = True,
        uncertainty_penalty: float = 0.0,
        aggregate: Aggregate = "mean",
        seed: int = 0,
        progress_bar: bool = False,
        **options: Any,
    ) -> Self:
        """Trains members that differ in their heads' first weights, in the order of the feedback, and in which of it they see.

        Args:
            start: the policy whose trunk each member copies; or a function of a member's seed that makes it.
            feedback: as of `RewardModelTrainer`.
            learning_rate: as of `RewardModelTrainer`.
            num_members: M, at least 2.
            bootstrap: each member gets as many records as there are, drawn with replacement.
            uncertainty_penalty: see the class.
            aggregate: see the class.
            seed: of the first member and of the draws; member m has `seed + m`.
            progress_bar: show one per member.
            **options: further arguments of `RewardModelTrainer`.
        """
        check_count("num_members", num_members, "reward models")
        records, rng, members = read_feedback(feedback).records, np.random.default_rng(seed), []
        for member in range(num_members):
            drawn = rng.integers(len(records), size=len(records)) if bootstrap else range(len(records))
            own_seed = seed + member
            model = RewardModel.from_policy(start, seed=own_seed) if isinstance(start, CausalLMPolicy) else start(own_seed)
            trainer = RewardModelTrainer(model, [records[place] for place in drawn], learning_rate, seed=own_seed, **options)
            members.append(trainer.learn(progress_bar=progress_bar).reward_model)
        return cls(members, uncertainty_penalty=uncertainty_penalty, aggregate=aggregate)

    # -- as a reward ------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[PromptText],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> Any:
        """Returns one reward per row, a list of floats; where the members score tokens, a list of floats per row.

        Args:
            prompts: strings or message lists.
            completions: the same.
            completion_ids: the tokens of the completions, see `RewardModel`.
            **columns: see `RewardModel`.
        """
        of_members = [model(prompts, completions, completion_ids, **columns) for model in self.models]
        if not self.models[0].per_token:
            return self.combine(np.array(of_members)).tolist()
        return [self.combine(np.array(rows)).tolist() for rows in zip(*of_members, strict=True)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns itself: Gymnasium copies the arguments of an environment several times."""
        return self

    def combine(self, scores: Floats) -> Floats:
        """Makes one reward of the members', (M, ...) to (...)."""
        if self.aggregate == "min":
            return np.asarray(scores.min(axis=0))
        return np.asarray(scores.mean(axis=0) - self.uncertainty_penalty * scores.std(axis=0))

    def member_scores(self, prompts: Sequence[PromptText], completions: Sequence[PromptText]) -> Floats:
        """Returns every member's reward of every text, (M, N)."""
        return np.stack([model.score_texts(prompts, completions)[:, model.reward_output] for model in self.models])

    def normalise(self, prompts: Sequence[PromptText], completions: Sequence[PromptText], *, unit_std: bool = True) -> None:
        """Brings every member to mean 0 (and variance 1) on given completions, those of the reference; see `RewardModel.normalise`.

        Args:
            prompts: prompts.
            completions: the reference's completions of them.
            unit_std: also divide by the standard deviation, as Christiano et al. do before they average.
        """
        for model in self.models:
            model.normalise(prompts, completions, unit_std=unit_std)

    # -- what to ask about ------------------------------------------------------------------------------------------

    def disagreement(self, prompts: Sequence[PromptText], first: Sequence[PromptText], second: Sequence[PromptText]) -> Floats:
        """Returns how much the members disagree on which of two completions is better, (N,) in [0, ½].

        It is the standard deviation over the members of σ(r_m(first) − r_m(second)): high where it is worth asking (§2.2.4).
        """
        return np.asarray(sigmoid(self.member_scores(prompts, first) - self.member_scores(prompts, second)).std(axis=0))

    def most_disputed(
        self, prompts: Sequence[PromptText], first: Sequence[PromptText], second: Sequence[PromptText], count: int
    ) -> list[int]:
        """Returns the places of the `count` pairs on which the members disagree most, the most disputed one first."""
        check_count("count", count, "pairs")
        return [int(place) for place in np.argsort(-self.disagreement(prompts, first, second), kind="stable")[:count]]

    # -- saving -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder with one of transformers' for each member, `member-0`, `member-1`, ..."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        for number, model in enumerate(self.models):
            model.save_pretrained(path / MEMBER.format(number))
        settings = {
            "uncertainty_penalty": self.uncertainty_penalty,
            "aggregate": self.aggregate,
            "members": [model.loading_arguments() for model in self.models],
        }
        (path / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, device: torch.device | str = "auto") -> Self:
        """Reads what `save_pretrained` wrote."""
        path = Path(folder)
        if not (path / SETTINGS_FILE).is_file():
            raise ValueError(f"`folder`: {str(path)!r} holds no ensemble: there is no {SETTINGS_FILE} in it.")
        settings = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))
        members = [
            RewardModel.from_pretrained(path / MEMBER.format(number), device=device, **{"dtype": "checkpoint", **arguments})
            for number, arguments in enumerate(settings["members"])
        ]
        return cls(members, uncertainty_penalty=settings["uncertainty_penalty"], aggregate=settings["aggregate"])
