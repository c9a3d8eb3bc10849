"""Measuring a policy on held-out prompts: reward, true reward, KL and sample texts."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.agents.common.evaluation import Evaluation, EvaluationResult, evaluate_policy
from textgym.prompts import PromptText

if TYPE_CHECKING:
    from textgym.agents.base import Agent

EPISODES = 200  # of the measurement before and after training: standard errors of a few hundredths
SEED = 20_000  # of those episodes: before and after see the same prompts in the same order


@dataclass(frozen=True)
class Measurement:
    """Means over held-out episodes.

    Attributes:
        reward: what is trained on, without the KL term.
        true_reward: what is only measured; None if nothing is.
        kl_per_sequence: KL to the reference, nats per completion.
        length: tokens per completion.
        ended: the share of completions that came to their end by EOS.
    """

    reward: float
    true_reward: float | None
    kl_per_sequence: float
    length: float
    ended: float


def true_rewards(result: EvaluationResult, true_name: str) -> float:
    """Returns the mean of the measured reward over the episodes for which it is not None."""
    return float(np.nanmean([info["rewards"][true_name] for info in result.infos]))


def measure(agent: "Agent", environment: Any, true_name: str | None) -> tuple[Measurement, list[dict[str, Any]]]:
    """Returns the means and one row per episode: prompt, completion, finish_reason, rewards and KL."""
    result = evaluate_policy(agent.policy, environment, agent.reference, episodes=EPISODES, seed=SEED)
    measurement = Measurement(
        reward=result.reward_mean,
        true_reward=None if true_name is None else true_rewards(result, true_name),
        kl_per_sequence=result.kl_mean,
        length=float(result.lengths.mean()),
        ended=float(np.mean([info["finish_reason"] == "eos" for info in result.infos])),
    )
    names = ("prompt", "completion", "finish_reason", "rewards")
    kls = result.kl_per_sequence.tolist()
    return measurement, [{**{name: info[name] for name in names}, "kl": kl} for info, kl in zip(result.infos, kls, strict=True)]


class MeasuredEvaluation(Evaluation):
    """The agent's evaluation at intervals, which also logs the true reward, as `eval/true_reward_mean`.

    Args:
        env: over held-out prompts; its rewards hold the true one at weight 0.
        true_name: the name of that; None if there is none.
        interval: iterations between two evaluations.
        best_model_path: folder for the best model by reward.
        max_kl: the KL a model may have to count, nats per sequence; None is no bound.
    """

    def __init__(self, env: Any, true_name: str | None, interval: int, best_model_path: Path, max_kl: float | None) -> None:
        super().__init__(env, interval=interval, best_model_path=best_model_path, max_kl=max_kl)
        self.true_name = true_name

    def run(self, agent: "Agent") -> EvaluationResult:
        """Evaluates now, and logs."""
        result = super().run(agent)
        if self.true_name is not None:
            agent.logger.record("eval/true_reward_mean", true_rewards(result, self.true_name))
        return result


def text_of(prompt: PromptText) -> str:
    """Returns a prompt as one string: of a conversation, its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
