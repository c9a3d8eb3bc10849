"""Evaluation on held-out prompts during training: reward and KL of fresh samples, and the best model so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from textgym.agents.common.batches import RolloutBatch
from textgym.agents.common.environments import as_vector_env, attribute
from textgym.agents.common.rollouts import RolloutCollector
from textgym.agents.common.shaping import ensure_kl_shaping
from textgym.agents.policy import CausalLMPolicy
from textgym.types import Info
from textgym.wrappers.finding import find_kl_shaping

if TYPE_CHECKING:
    from textgym.agents.base import Agent


@dataclass(frozen=True)
class EvaluationResult:
    """What a policy's samples are worth; one entry per episode.

    Attributes:
        rewards: (N,) unshaped returns.
        kl_per_sequence: (N,) Σ_t log π − log π_ref, nats.
        lengths: (N,) tokens.
        infos: the final info of each episode: prompt, completion, finish_reason, rewards.
    """

    rewards: np.ndarray
    kl_per_sequence: np.ndarray
    lengths: np.ndarray
    infos: list[Info]

    @property
    def reward_mean(self) -> float:
        """The mean unshaped return."""
        return float(self.rewards.mean())

    @property
    def kl_mean(self) -> float:
        """The mean KL in nats per sequence; NaN where there is no reference."""
        measured = self.kl_per_sequence[~np.isnan(self.kl_per_sequence)]
        return float(measured.mean()) if len(measured) else float("nan")


def evaluate_policy(
    policy: CausalLMPolicy,
    env: Any,
    reference: Any,
    *,
    episodes: int | None = None,
    seed: int = 0,
    on_walk: Callable[[EvaluationResult], None] | None = None,
) -> EvaluationResult:
    """Samples completions of an environment's prompts, in their order, and measures reward and KL.

    Args:
        policy: who is evaluated.
        env: as for an agent; its reward counts unshaped.
        reference: the policy that KL is measured to; None measures none.
        episodes: how many (default: one per prompt, or one per row where the environment does not say how many prompts it has).
        seed: of sampling; the same seed gives the same noise, so two policies can be compared pairwise.
        on_walk: called after each walk of the environment's rows with what has been measured so far.
    """
    vector_env = as_vector_env(env)
    if reference is not None and not find_kl_shaping(vector_env):
        vector_env, _ = ensure_kl_shaping(vector_env, policy, reference, 0.0)
    rows, num_prompts = vector_env.num_envs, attribute(vector_env, "num_prompts")
    count = episodes or (int(num_prompts) if num_prompts is not None else rows)
    collector = RolloutCollector(policy, vector_env)
    generator = torch.Generator(device=policy.device)
    generator.manual_seed(seed)
    firsts = range(0, count, rows)
    indices = (None if num_prompts is None else np.arange(first, first + rows) % int(num_prompts) for first in firsts)
    seeds = (seed if first == 0 else None for first in firsts)
    walks: list[RolloutBatch] = []
    for walk in collector.take_walks(zip(indices, seeds, strict=True), generator):
        walks.append(walk)
        if on_walk is not None:
            on_walk(_result(walks, count))
    return _result(walks, count)


def _result(walks: Sequence[RolloutBatch], count: int) -> EvaluationResult:
    def column(name: str) -> np.ndarray:
        return torch.cat([getattr(walk, name) for walk in walks]).cpu().numpy()[:count]

    infos = [info for walk in walks for info in walk.infos][:count]
    return EvaluationResult(column("unshaped_returns"), column("kl_per_sequence"), column("lengths"), infos)


class Evaluation:
    """Evaluates an agent at intervals, logs it, and keeps the best model by reward at bounded KL.

    Logged: `eval/reward_mean`, `eval/reward_std`, `eval/kl_per_sequence`, `eval/length_mean`, `eval/best_reward_mean`.

    Args:
        env: an environment over held-out prompts.
        interval: iterations between two evaluations.
        episodes: per evaluation (default: one per prompt).
        best_model_path: folder for the best model so far, readable by transformers; None keeps none.
        max_kl: a model counts as best only if its KL to the reference is at most this, in nats per sequence; None is no bound. An
            agent without a reference has no KL, and with a bound no best model.
        seed: of sampling, the same at each evaluation.
    """

    def __init__(
        self,
        env: Any,
        *,
        interval: int = 10,
        episodes: int | None = None,
        best_model_path: str | Path | None = None,
        max_kl: float | None = None,
        seed: int = 0,
    ) -> None:
        if interval < 1:
            raise ValueError(f"`interval` must be at least 1 iteration, got {interval}.")
        self.env, self.interval, self.episodes, self.seed = as_vector_env(env), interval, episodes, seed
        self.best_model_path = None if best_model_path is None else Path(best_model_path)
        self.max_kl = max_kl
        self.best_reward: float | None = None
        self.iterations = 0
        self.last: EvaluationResult | None = None

    def after_iteration(self, agent: "Agent") -> bool:
        """Called by the agent after each of its iterations; returns whether training shall stop, which this one never wants."""
        self.iterations += 1
        if self.iterations % self.interval == 0:
            self.run(agent)
        return False

    def run(self, agent: Any) -> EvaluationResult:
        """Evaluates now, logs, and saves the model if it is the best so far."""
        result = evaluate_policy(agent.policy, self.env, agent.reference, episodes=self.episodes, seed=self.seed)
        self.last = result
        within = self.max_kl is None or result.kl_mean <= self.max_kl
        if within and (self.best_reward is None or result.reward_mean > self.best_reward):
            self.best_reward = result.reward_mean
            if self.best_model_path is not None:
                agent.policy.save_pretrained(self.best_model_path)
        agent.logger.record("eval/reward_mean", result.reward_mean)
        agent.logger.record("eval/reward_std", float(result.rewards.std()))
        if agent.reference is not None:
            agent.logger.record("eval/kl_per_sequence", result.kl_mean)
        agent.logger.record("eval/length_mean", float(result.lengths.mean()))
        if self.best_reward is not None:
            agent.logger.record("eval/best_reward_mean", self.best_reward)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as JSON types."""
        return {"best_reward": self.best_reward, "iterations": self.iterations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.best_reward, self.iterations = state["best_reward"], state["iterations"]
