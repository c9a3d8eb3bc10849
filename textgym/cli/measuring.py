"""Measuring a policy on held-out prompts: reward, true reward, KL and sample texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.agents.common.environments import attribute
from textgym.agents.common.evaluation import Evaluation, EvaluationResult, evaluate_policy
from textgym.prompts import PromptText

if TYPE_CHECKING:
    from textgym.agents.base import Agent

EPISODES = 200  # of the measurement before and after training: standard errors of a few hundredths
FEWER_EPISODES = ((1_000_000_000, 32), (10_000_000, 64))  # of models above so many parameters, whose completions take their time
SEED = 20_000  # of those episodes: before and after see the same prompts in the same order


@dataclass(frozen=True)
class Measurement:
    """Means over held-out episodes.

    Attributes:
        reward: what is trained on, without the KL term; what `--reward` names where examples are trained on, None where it names nothing.
        true_reward: what is only measured; None if nothing is.
        kl_per_sequence: KL to the reference, nats per completion.
        length: tokens per completion.
        ended: the share of completions that came to their end by EOS.
        loss: of an offline algorithm on held-out examples.
        accuracy: of DPO on held-out preferences: the share in whose order the implicit rewards are.
        completions: how many completions the means are over.
    """

    reward: float | None
    true_reward: float | None
    kl_per_sequence: float
    length: float
    ended: float
    loss: float | None = None
    accuracy: float | None = None
    completions: int = 0


def default_completions(policy: Any) -> int:
    """Returns how many completions of a policy are measured where nobody says it: fewer of larger models."""
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    return min([count for least, count in FEWER_EPISODES if parameters > least], default=EPISODES)


def true_rewards(result: EvaluationResult, true_name: str) -> float:
    """Returns the mean of the measured reward over the episodes for which it is not None."""
    return float(np.nanmean([info["rewards"][true_name] for info in result.infos]))


def measure(
    agent: Any, environment: Any, true_name: str | None, completions: int, on_walk: Callable[[EvaluationResult], None] | None = None
) -> tuple[Measurement, list[dict[str, Any]]]:
    """Returns the means and one row per episode: prompt, completion, finish_reason, rewards and KL.

    Args:
        agent: whose policy is measured.
        environment: over held-out prompts.
        true_name: the name of the reward that is only measured.
        completions: how many are sampled.
        on_walk: see `evaluate_policy`.
    """
    result = evaluate_policy(agent.policy, environment, agent.reference, episodes=completions, seed=SEED, on_walk=on_walk)
    held_out = agent.evaluation.held_out_numbers(agent) if isinstance(agent.evaluation, OfflineEvaluation) else {}
    return summarise(result, true_name, held_out)


def summarise(result: EvaluationResult, true_name: str | None, held_out: Mapping[str, float]) -> tuple[Measurement, list[dict[str, Any]]]:
    """Returns the means and the rows of what was sampled; `held_out` are the numbers of an offline algorithm on held-out examples."""
    measurement = Measurement(
        reward=None if UNMEASURED in result.infos[0]["rewards"] else result.reward_mean,
        true_reward=None if true_name is None else true_rewards(result, true_name),
        kl_per_sequence=result.kl_mean,
        length=float(result.lengths.mean()),
        ended=float(np.mean([info["finish_reason"] == "eos" for info in result.infos])),
        loss=held_out.get("eval/loss"),
        accuracy=held_out.get("eval/accuracy"),
        completions=len(result.infos),
    )
    names = ("prompt", "completion", "finish_reason", "rewards")
    kls = result.kl_per_sequence.tolist()
    rows = [{**{name: info[name] for name in names}, "kl": kl} for info, kl in zip(result.infos, kls, strict=True)]
    for row in rows:
        row["rewards"] = {name: value for name, value in row["rewards"].items() if name != UNMEASURED}
    return measurement, rows


class MeasuredEvaluation(Evaluation):
    """The agent's evaluation at intervals, which also logs the true reward, as `eval/true_reward_mean`.

    Args:
        env: over held-out prompts; its rewards hold the true one at weight 0.
        true_name: the name of that; None if there is none.
        interval: iterations between two evaluations.
        best_model_path: folder for the best model by reward; None keeps none.
        max_kl: the KL a model may have to count, nats per sequence; None is no bound.
    """

    def __init__(self, env: Any, true_name: str | None, interval: int, best_model_path: Path | None, max_kl: float | None) -> None:
        super().__init__(env, interval=interval, best_model_path=best_model_path, max_kl=max_kl)
        self.true_name = true_name

    def at_most(self, completions: int) -> None:
        """Measures one completion of each prompt, but of so many prompts at most."""
        prompts = attribute(self.env, "num_prompts")
        self.episodes = completions if prompts is None else min(int(prompts), completions)

    def run(self, agent: "Agent") -> EvaluationResult:
        """Evaluates now, and logs."""
        result = super().run(agent)
        if self.true_name is not None:
            agent.logger.record("eval/true_reward_mean", true_rewards(result, self.true_name))
        return result


class OfflineEvaluation(MeasuredEvaluation):
    """The same for an agent that learns from examples: also its loss on held-out ones, as `eval/loss`, and DPO's `eval/accuracy`.

    Args:
        held_out: the held-out examples.
        rewarded: whether `env` has a reward; without one only the examples are looked at, and there is no best model.
        env: see `MeasuredEvaluation`.
        true_name: see `MeasuredEvaluation`.
        interval: optimiser steps between two evaluations.
        best_model_path: see `MeasuredEvaluation`.
        max_kl: see `MeasuredEvaluation`.
    """

    def __init__(
        self, held_out: Any, rewarded: bool, env: Any, true_name: str | None, interval: int, best_model_path: Path, max_kl: float | None
    ) -> None:
        super().__init__(env, true_name, interval, best_model_path, max_kl)
        self.held_out, self.rewarded = held_out, rewarded

    def after_iteration(self, agent: "Agent") -> bool:
        """See `Evaluation`."""
        self.iterations += 1
        if self.iterations % self.interval:
            return False
        if self.rewarded:
            self.run(agent)
        for name, value in self.held_out_numbers(agent).items():
            agent.logger.record(name, value)
        return False

    def held_out_numbers(self, agent: Any) -> dict[str, float]:
        """Returns loss and accuracy on the held-out examples, by log key."""
        self.held_out = agent.read(self.held_out) if isinstance(self.held_out, list) else self.held_out
        names = {"train/loss": "eval/loss", "rewards/accuracies": "eval/accuracy"}
        return {names[name]: value for name, value in agent.evaluate(self.held_out).items() if name in names}


UNMEASURED = "unmeasured"


def unmeasured(completions: Sequence[Any], **columns: Any) -> list[float]:
    """The reward of an environment that only shows samples."""
    return [0.0] * len(completions)


def text_of(prompt: PromptText) -> str:
    """Returns a prompt as one string: of a conversation, its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
