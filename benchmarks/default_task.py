"""All agents on the bundled task at equal reward queries: true reward, proxy reward and KL on held-out prompts.

    python benchmarks/default_task.py [--agents NAME ...] [--seeds 5] [--queries 4096] [--jobs 2] [--out result.json] [--plot result.png]

A reward query is one completion scored by the reward model, whoever asks: online agents pay one per sampled completion; the offline ones
learn from completions of the reference that the reward model has judged, in pairs (DPO), by thumb (KTO) or by keeping the best quarter
(SFT). The settings of each agent are in `CANDIDATES`: learning rates were chosen on seed 100 and are the same for all seeds. Means over the
seeds with the 95 % interval of Student's t.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import common
import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
from common import interval
from stable_baselines3.common.callbacks import BaseCallback

import textgym  # noqa: F401  (registers the id)
from textgym import agents
from textgym.agents import CausalLMPolicy, evaluate_policy
from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.rewards import RewardSet
from textgym.rewards.resolve import resolve_reward

BETA = 0.2
NEW_TOKENS = 24
ROWS = 64
EPISODES = 256  # of each evaluation
POINTS = 8  # evaluations of an online run
REWARDS = ("film-review", "film-review-true")


@dataclass(frozen=True)
class Candidate:
    """An agent and its setting.

    Attributes:
        algorithm: name of the class in `textgym.agents`.
        learning_rate: constant.
        options: further arguments.
        data: for an offline agent, how its examples are made of judged completions.
    """

    algorithm: str
    learning_rate: float
    options: dict[str, Any] = field(default_factory=dict)
    data: Callable[["Judged"], list[dict[str, Any]]] | None = None


@dataclass(frozen=True)
class Judged:
    """Completions of the reference with their rewards, two of each prompt next to each other.

    Attributes:
        prompts: (N,) texts.
        completions: (N,) texts.
        rewards: (N,) of the reward model.
        seed: for labels that are drawn.
    """

    prompts: list[str]
    completions: list[str]
    rewards: np.ndarray
    seed: int


def preferences(judged: Judged) -> list[dict[str, Any]]:
    """Pairs with a label drawn by Bradley–Terry from the reward."""
    rng = np.random.default_rng(judged.seed)
    pairs = []
    for i in range(0, len(judged.prompts), 2):
        first_wins = rng.random() < 1 / (1 + np.exp(judged.rewards[i + 1] - judged.rewards[i]))
        chosen, rejected = (i, i + 1) if first_wins else (i + 1, i)
        pairs.append(
            {"prompt": judged.prompts[i], "chosen": judged.completions[chosen], "rejected": judged.completions[rejected]},
        )
    return pairs


def thumbs(judged: Judged) -> list[dict[str, Any]]:
    """Thumbs up for what is above the mean reward."""
    up = judged.rewards > judged.rewards.mean()
    return [
        {"prompt": prompt, "completion": completion, "label": bool(label)}
        for prompt, completion, label in zip(judged.prompts, judged.completions, up, strict=True)
    ]


def best_quarter(judged: Judged) -> list[dict[str, Any]]:
    """The quarter of the completions with the highest reward."""
    best = np.argsort(-judged.rewards)[: len(judged.rewards) // 4]
    return [{"prompt": judged.prompts[i], "completion": judged.completions[i]} for i in best]


CANDIDATES = {
    "PPO": Candidate("PPO", 5e-4, {"n_epochs": 2, "batch_size": 32}),
    "REINFORCE": Candidate("REINFORCE", 5e-4),
    "RLOO k=4": Candidate("RLOO", 5e-4),
    "GRPO G=8": Candidate("GRPO", 5e-4),
    "REBEL": Candidate("REBEL", 3e-4),
    "NLPO": Candidate("NLPO", 5e-4, {"n_epochs": 2, "batch_size": 32}),
    "soft DQN": Candidate("DQN", 5e-4, {"gradient_steps": 4, "batch_size": 64, "critic_learning_rate": 2e-3}),
    "DPO": Candidate("DPO", 1e-4, {"beta": BETA, "batch_size": 32}, preferences),
    "KTO": Candidate("KTO", 2e-4, {"beta": BETA, "batch_size": 32}, thumbs),
    "SFT, best quarter": Candidate("SFT", 1e-3, {"n_epochs": 2, "batch_size": 32}, best_quarter),
}


class Point(dict[str, float]):
    """One evaluation: queries, true_reward, reward, kl, length."""


class EvaluateAndStop(BaseCallback):
    """Evaluates at equal steps of reward queries, and stops at the last one."""

    def __init__(self, evaluate: Callable[[int], None], queries: int) -> None:
        super().__init__()
        self.evaluate, self.queries, self.asked, self.done = evaluate, queries, 0, 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.asked >= (self.done + 1) * self.queries // POINTS:
            self.done += 1
            self.evaluate(self.asked)
        if self.asked >= self.queries:
            raise StopIteration
        self.asked += ROWS


def measure(agent: Any, held_out: Any, queries: int) -> Point:
    """Evaluates the agent on held-out prompts."""
    result = evaluate_policy(agent.policy, held_out, agent.reference, episodes=EPISODES, seed=7)
    parts = {name: float(np.mean([info["rewards"][name] for info in result.infos])) for name in REWARDS}
    return Point(
        queries=queries,
        true_reward=parts["film-review-true"],
        reward=parts["film-review"],
        kl=result.kl_mean,
        length=float(result.lengths.mean()),
    )


def environment(prompts: str, rows: int, weights: list[float], policy: CausalLMPolicy) -> Any:
    """Makes the bundled task with both rewards, of which `weights` count."""
    kept = [(name, weight) for name, weight in zip(REWARDS, weights, strict=True) if weight or prompts == "eval"]
    reward = RewardSet.build([name for name, _ in kept], [weight for _, weight in kept], [name for name, _ in kept])
    rows_of = [dict(row) for row in bundled_prompts(prompts)]
    return gym.make_vec("TextGen-v0", num_envs=rows, prompts=rows_of, tokenizer=policy.tokenizer, reward=reward, max_new_tokens=NEW_TOKENS)


def judge(policy: CausalLMPolicy, count: int, seed: int) -> Judged:
    """Samples `count` completions of the training prompts, two of each, and asks the reward model."""
    prompts = [row["prompt"] for row in bundled_prompts("train")]
    order = np.random.default_rng(seed).permutation(max(len(prompts), count // 2))[: count // 2] % len(prompts)
    chosen = [prompts[i] for i in order]
    generation = policy.generate(chosen, NEW_TOKENS, num_generations=2, seed=seed)
    repeated = [prompt for prompt in chosen for _ in range(2)]
    _, reward = resolve_reward("film-review")
    scores = reward(prompts=repeated, completions=generation.texts)
    return Judged(repeated, generation.texts, np.asarray(scores, dtype=float), seed)


def run(job: tuple[str, int], queries: int) -> dict[str, Any]:
    """Trains one agent with one seed; returns its points."""
    name, seed = job
    candidate = CANDIDATES[name]
    policy = CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu")
    held_out = environment("eval", 64, [1.0, 0.0], policy)
    agent_class = getattr(agents, candidate.algorithm)
    begin = time.perf_counter()
    points: list[Point] = []
    if candidate.data is None:
        envs = environment("train", ROWS, [1.0, 0.0], policy)
        agent = agent_class(policy, envs, learning_rate=candidate.learning_rate, beta=BETA, seed=seed, **candidate.options)
        points.append(measure(agent, held_out, 0))
        with contextlib.suppress(StopIteration):
            agent.learn(10**9, callback=EvaluateAndStop(lambda asked: points.append(measure(agent, held_out, asked)), queries))
    else:
        examples = candidate.data(judge(policy, queries, seed))
        agent = agent_class(policy, examples, learning_rate=candidate.learning_rate, seed=seed, **candidate.options)
        if agent.reference is None:
            agent.reference = policy.reference()
        points.append(measure(agent, held_out, 0))
        agent.learn()
        points.append(measure(agent, held_out, queries))
    return {"agent": name, "seed": seed, "seconds": time.perf_counter() - begin, "points": points}


def table(results: list[dict[str, Any]]) -> str:
    """The final figures as a Markdown table, agents in order of the true reward."""
    names = list(dict.fromkeys(result["agent"] for result in results))
    rows = []
    for name in names:
        own = [result for result in results if result["agent"] == name]
        last = [result["points"][-1] for result in own]
        columns = {key: interval([point[key] for point in last]) for key in ("true_reward", "reward", "kl", "length")}
        columns["objective"] = interval([point["reward"] - BETA * point["kl"] for point in last])
        seconds = float(np.median([result["seconds"] for result in own]))
        rows.append((columns, name, seconds))
    start = results[0]["points"][0]
    lines = [
        "| agent | true reward | proxy reward | KL, nats | J = proxy − β KL | tokens | seconds |",
        "|---|---|---|---|---|---|---|",
        f"| (start) | {start['true_reward']:.3f} | {start['reward']:.3f} | 0 | {start['reward']:.3f} | {start['length']:.1f} | |",
    ]
    for columns, name, seconds in sorted(rows, key=lambda row: -row[0]["true_reward"][0]):
        cells = [f"{mean:.3f} ± {half:.3f}" for mean, half in (columns[key] for key in ("true_reward", "reward", "kl", "objective"))]
        lines.append(f"| {name} | {' | '.join(cells)} | {columns['length'][0]:.1f} | {seconds:.0f} |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draws the three figures over reward queries: the mean of the seeds, and its interval as a band."""
    names = list(dict.fromkeys(result["agent"] for result in results))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for index, name in enumerate(names):
        own = [result["points"] for result in results if result["agent"] == name]
        queries = [point["queries"] for point in own[0]]
        colour = colours[index % len(colours)]
        for axis, key in zip(axes, ("true_reward", "reward", "kl"), strict=True):
            means, halves = zip(*[interval([run[i][key] for run in own]) for i in range(len(queries))], strict=True)
            if len(queries) > 2:
                axis.plot(queries, means, color=colour, label=name, linewidth=1.6)
                axis.fill_between(queries, np.subtract(means, halves), np.add(means, halves), color=colour, alpha=0.15, linewidth=0)
            else:  # an offline agent has no curve over queries
                axis.errorbar(queries[-1], means[-1], halves[-1], color=colour, marker="o", capsize=3, label=name)
    for axis, title in zip(axes, ("true reward", "proxy reward (trained on)", "KL to the reference, nats per completion"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("completions scored by the reward model")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    jobs = [(name, seed) for seed in range(options.first_seed, options.first_seed + options.seeds) for name in options.agents]
    results = []
    with common.each_in(options.jobs) as parallel:
        for result in parallel(partial(run, queries=options.queries), jobs):
            results.append(result)
            last = result["points"][-1]
            print(
                f"{result['agent']:14} seed {result['seed']}  true {last['true_reward']:6.3f}  proxy {last['reward']:6.3f}"
                f"  KL {last['kl']:6.2f}  {result['seconds']:4.0f} s",
                flush=True,
            )
    results.sort(key=lambda result: options.agents.index(result["agent"]))
    print("\n" + table(results))
    common.write(
        options.out,
        {
            "machine": common.machine(options.jobs),
            "queries": options.queries,
            "beta": BETA,
            "settings": {name: {k: v for k, v in asdict(CANDIDATES[name]).items() if k != "data"} for name in options.agents},
            "runs": results,
        },
    )
    if options.plot:
        plot(results, options.plot)
    return 0


def parser() -> argparse.ArgumentParser:
    result = common.parser("Compare all agents on the bundled task at equal reward queries.", seeds=5, first_seed=0, jobs=1, plot=None)
    result.add_argument("--agents", nargs="*", choices=list(CANDIDATES), default=list(CANDIDATES), help="default: all")
    result.add_argument("--queries", type=int, default=4096, help="completions that the reward model scores in each run; default: 4096")
    return result


if __name__ == "__main__":
    sys.exit(main())
