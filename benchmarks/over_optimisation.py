"""Over-optimisation: gold and proxy reward over √KL, for reward models of three amounts of comparisons, and what β changes.

    python benchmarks/over_optimisation.py [--seeds 3] [--jobs 1] [--out result.json] [--plot result.png]

The experiment of Gao, Schulman & Hilton 2022 (arXiv:2210.10760) in miniature, on the bundled task, whose gold reward is a rule. For each
seed, from the SFT model and the comparisons of `win_rates.py`:

1. A reward model learns the first 500, 1,400 or 4,000 comparisons.
2. RLOO maximises it, without a KL term and, for one of the amounts, with several β. Every so often the policy completes the held-out
   prompts: proxy reward, gold reward, KL to the SFT model.
3. Best-of-n of the SFT model, n = 1 .. 64, by the same reward models.

Rewards are gains over the SFT model. A reward model learns gold reward / temperature of the annotator, up to a shift: its gains times the
temperature are in units of the gold reward, and the two curves would be one if it were right everywhere.
"""

import argparse
import contextlib
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from certify import each_in
from default_task import interval
from stable_baselines3.common.callbacks import BaseCallback
from win_rates import GOLD, NEW_TOKENS, PAIRS, REWARD_MODEL, ROWS, TEMPERATURE, Prepared, prepare

from textgym.agents import RLOO, RewardModel, RewardModelTrainer, compare_policies
from textgym.agents.common.rlhf_steps import HELD_OUT, fit_reward_model, sample_completions, split_by_prompt
from textgym.agents.common.scored_completions import PromptRows
from textgym.bundled import bundled_prompts, true_reward
from textgym.evaluation import rank_correlation
from textgym.kl import best_of_n_kl

AMOUNTS = (500, 1400, PAIRS)
BETAS = (0.0, 0.05, 0.2)  # in proxy reward per nat; all but 0 for one amount only
AMOUNT_OF_BETAS = 1400
LEARNING_RATE = 5e-4
GENERATIONS = 4  # completions per held-out prompt
MEASURED_AT = (0, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144)  # reward queries
NS = (1, 2, 4, 8, 16, 32, 64)
DRAWN = 128  # completions per held-out prompt for best-of-n


@dataclass(frozen=True)
class Amount(Prepared):
    """One seed with the reward model of its first `pairs` comparisons."""

    pairs: int

    @property
    def reward_model_folder(self) -> Path:
        return self.folder / f"reward-model-{self.pairs}"

    def reward_model(self) -> RewardModel:
        return RewardModel.from_pretrained(self.reward_model_folder, device="cpu")


class MeasureAndStop(BaseCallback):
    """Measures after given numbers of reward queries, and stops after the last."""

    def __init__(self, measure: Callable[[int], None]) -> None:
        super().__init__()
        self.measure, self.asked, self.waiting = measure, 0, list(MEASURED_AT)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.asked >= self.waiting[0]:
            self.measure(self.asked)
            del self.waiting[0]
        if not self.waiting:
            raise StopIteration
        self.asked += ROWS


def fit(seed: int, work: Path) -> list[dict[str, Any]]:
    """Prepares one seed and its reward models; returns what each is worth on the same held-out comparisons."""
    prepared = Prepared(work / str(seed), seed)
    if not (prepared.folder / "reward-model").exists():
        prepare(seed, work)
    comparisons, policy = prepared.comparisons(), prepared.policy()
    prompts = PromptRows.read([row["prompt"] for row in bundled_prompts("train")])
    # The first comparisons are of all prompts, so that the split holds out the same prompts, whatever the amount.
    held_out = split_by_prompt(comparisons, HELD_OUT, seed)[1]
    found = []
    for pairs in AMOUNTS:
        amount = Amount(prepared.folder, seed, pairs)
        if amount.reward_model_folder.exists():
            model = amount.reward_model()
        elif pairs == PAIRS:
            model = prepared.reward_model()
        else:
            model, _ = fit_reward_model(policy, comparisons[:pairs], prompts, NEW_TOKENS, seed, REWARD_MODEL)
        model.save_pretrained(amount.reward_model_folder)
        report = RewardModelTrainer(model, None).evaluate(held_out)
        found.append({"seed": seed, "pairs": pairs, **report.to_json()})
    return found


def train(job: tuple[int, int, float], work: Path) -> dict[str, Any]:
    """Trains against one reward model with one β; returns a point for each measurement, and the verdict on the last policy."""
    seed, pairs, beta = job
    amount = Amount(work / str(seed), seed, pairs)
    policy, start = amount.policy(), amount.policy()
    reward = amount.reward_model()
    agent = RLOO(policy, amount.environment(policy), LEARNING_RATE, beta=beta, num_generations=4, seed=seed)
    points: list[dict[str, float]] = []
    verdicts: list[Any] = []

    def measure(queries: int) -> None:
        last = queries == MEASURED_AT[-1]
        report = compare_policies(
            policy,
            bundled_prompts("eval"),
            start if last else None,
            reward=reward,
            true_reward=GOLD,
            reference=start,
            max_new_tokens=NEW_TOKENS,
            num_generations=GENERATIONS,
            seed=7,
        )
        side = report.sides[0]
        assert side.kl_per_sequence is not None
        points.append(
            {
                "queries": queries,
                "gold": side.rewards["true_reward"].mean,
                "proxy": side.rewards["reward"].mean,
                "kl": max(side.kl_per_sequence.mean, 0.0),
                "length": side.texts.tokens,
                "repetition": side.texts.repetition,
                "distinct_2": side.texts.distinct_2,
            }
        )
        verdicts.append(report.over_optimisation)

    begin = time.perf_counter()
    with contextlib.suppress(StopIteration):
        agent.learn(10**9, callback=MeasureAndStop(measure))
    seconds = time.perf_counter() - begin
    verdict = verdicts[-1]
    return {"seed": seed, "pairs": pairs, "beta": beta, "seconds": seconds, "points": points, "verdict": verdict.to_dict()}


def best_of(seed: int, work: Path) -> list[dict[str, Any]]:
    """Best-of-n of one seed's SFT model by each of its reward models."""
    prepared = Prepared(work / str(seed), seed)
    prompts = [row["prompt"] for row in bundled_prompts("eval")]
    texts = sample_completions(prepared.policy(), prompts, NEW_TOKENS, seed, DRAWN)
    owners = [prompt for prompt in prompts for _ in range(DRAWN)]
    gold = np.asarray(true_reward(owners, texts)).reshape(-1, DRAWN)
    curves = []
    for pairs in AMOUNTS:
        proxy = np.asarray(Amount(prepared.folder, seed, pairs).reward_model()(owners, texts)).reshape(-1, DRAWN)
        points = []
        for n in NS:
            weights = chances_of_best(n, DRAWN)[np.argsort(np.argsort(proxy, axis=1), axis=1)]
            points.append(
                {
                    "n": n,
                    "kl": best_of_n_kl(n),
                    "gold": float((weights * gold).sum(axis=1).mean()),
                    "proxy": float((weights * proxy).sum(axis=1).mean()),
                }
            )
        within = [rank_correlation(*rows) for rows in zip(proxy, gold, strict=True)]
        correlation = float(np.mean([one for one in within if one is not None]))
        curves.append({"seed": seed, "pairs": pairs, "rank_correlation": correlation, "points": points})
    return curves


def chances_of_best(n: int, drawn: int) -> np.ndarray:
    """Returns the chance of each of `drawn` samples, worst first, to be the best of n of them: C(i, n − 1) / C(drawn, n), i = 0, 1, ...

    Its mean over subsets is the unbiased estimate that Nakano et al. 2021 (arXiv:2112.09332, appendix I) use.
    """
    return np.array([math.comb(place, n - 1) / math.comb(drawn, n) for place in range(drawn)])


def gains(points: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """Returns √KL and the gains of both rewards over the first point, in units of the gold reward."""
    column = {key: np.array([point[key] for point in points]) for key in ("kl", "gold", "proxy")}
    return {
        "distance": np.sqrt(column["kl"]),
        "gold": column["gold"] - column["gold"][0],
        "proxy": TEMPERATURE * (column["proxy"] - column["proxy"][0]),
    }
