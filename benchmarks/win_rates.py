"""Who learns best from comparisons: SFT, DPO, REINFORCE, PPO, RLOO, REBEL, best-of-n, filtered SFT, by win rate over the data's texts.

    python benchmarks/win_rates.py [--agents NAME ...] [--seeds 5] [--jobs 2] [--out result.json] [--plot result.png]

The table of the RLOO and REBEL papers (win rate against human summaries on TL;DR) in miniature, on the bundled task, whose gold reward
is a rule. For each seed:

1. SFT: the bundled model, fine-tuned on the texts that the training prompts were cut from.
2. Comparisons: pairs of its completions of the training prompts, compared by Bradley–Terry from the gold reward.
3. DPO learns from them; so does a reward model, and from that, at equal reward queries, the online agents. Best-of-n and filtered SFT
   ask it too.
4. Everybody completes the held-out prompts; the gold reward says whether the completion or the data's own text is better, ties count
   half.

Settings were chosen on seed 100, on the training prompts, and are the same for all seeds. Means over seeds with Student's 95 % interval.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import common
import gymnasium as gym
import matplotlib.pyplot as plt
import torch
from common import interval
from default_task import EvaluateAndStop

import textgym  # noqa: F401  (registers the id)
from textgym import agents
from textgym.agents import DPO, SFT, BestOfN, CausalLMPolicy, RejectionSampling, RewardModel, compare_policies
from textgym.agents.common.rlhf_steps import fit_reward_model, sample_pairs
from textgym.agents.common.scored_completions import PromptRows
from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.feedback import SyntheticAnnotator, read_feedback, write_feedback

GOLD = "film-review-true"
TEMPERATURE = 0.25  # of the annotator, in gold reward
PAIRS = 4000
QUERIES = 8192
BETA = 0.2
NEW_TOKENS = 24
ROWS = 64
GENERATIONS = 8  # completions per held-out prompt
REWARD_MODEL = {"learning_rate": 1e-3, "n_epochs": 2, "batch_size": 32}


@dataclass(frozen=True)
class Prepared:
    """What all agents of one seed share, in a folder: the SFT model, the comparisons, the reward model."""

    folder: Path
    seed: int

    def policy(self) -> CausalLMPolicy:
        """Returns a fresh copy of the SFT model."""
        return CausalLMPolicy.from_pretrained(self.folder / "sft", device="cpu")

    def comparisons(self) -> list[Any]:
        """Returns what the annotator said."""
        return read_feedback(self.folder / "comparisons.jsonl").records

    def reward_model(self) -> RewardModel:
        """Returns the reward model that learned it."""
        return RewardModel.from_pretrained(self.folder / "reward-model", device="cpu")

    def environment(self, policy: CausalLMPolicy) -> Any:
        """Makes the training prompts an environment that pays by the reward model."""
        return gym.make_vec(
            "TextGen-v0",
            num_envs=ROWS,
            prompts=[row["prompt"] for row in bundled_prompts("train")],
            tokenizer=policy.tokenizer,
            reward=self.reward_model(),
            max_new_tokens=NEW_TOKENS,
        )


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Attributes:
        make: trains on what is prepared, and returns what writes.
        options: of it, as they were chosen.
    """

    make: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)


def sft(prepared: Prepared) -> CausalLMPolicy:
    return prepared.policy()


def dpo(prepared: Prepared, **options: Any) -> CausalLMPolicy:
    policy = prepared.policy()
    rate = options.pop("learning_rate")
    DPO(policy, prepared.comparisons(), learning_rate=lambda left: rate * left, seed=prepared.seed, **options).learn()
    return policy


def online(prepared: Prepared, algorithm: str, **options: Any) -> CausalLMPolicy:
    """One of the online agents, until it has asked for QUERIES rewards."""
    policy = prepared.policy()
    agent = getattr(agents, algorithm)(policy, prepared.environment(policy), **{"beta": BETA, "seed": prepared.seed, **options})
    with contextlib.suppress(StopIteration):
        agent.learn(10**9, callback=EvaluateAndStop(lambda asked: None, QUERIES))
    return policy


def best_of(prepared: Prepared, n: int) -> BestOfN:
    return BestOfN(prepared.policy(), prepared.reward_model(), n)


def filtered(prepared: Prepared, n: int, rounds: int, **options: Any) -> CausalLMPolicy:
    """Filtered SFT: fine-tuning on the best of n, in rounds."""
    policy = prepared.policy()
    prompts = [row["prompt"] for row in bundled_prompts("train")]
    per_round = QUERIES // (n * rounds)
    RejectionSampling(
        policy, prompts, prepared.reward_model(), n=n, prompts_per_round=per_round, max_new_tokens=NEW_TOKENS, seed=prepared.seed, **options
    ).learn(rounds)
    return policy


CANDIDATES = {
    "SFT": Candidate(sft),
    "DPO": Candidate(dpo, {"learning_rate": 5e-4, "beta": 0.6, "batch_size": 64, "n_epochs": 3}),
    "REINFORCE": Candidate(online, {"algorithm": "REINFORCE", "learning_rate": 5e-4}),
    "PPO": Candidate(online, {"algorithm": "PPO", "learning_rate": 5e-4, "n_epochs": 2, "batch_size": 32}),
    "RLOO k=2": Candidate(online, {"algorithm": "RLOO", "learning_rate": 5e-4, "num_generations": 2}),
    "RLOO k=4": Candidate(online, {"algorithm": "RLOO", "learning_rate": 5e-4, "num_generations": 4}),
    "REBEL": Candidate(online, {"algorithm": "REBEL", "learning_rate": 3e-4}),
    "best of 4": Candidate(best_of, {"n": 4}),
    "best of 16": Candidate(best_of, {"n": 16}),
    "filtered SFT, best of 8": Candidate(filtered, {"n": 8, "rounds": 4, "learning_rate": 1e-3, "n_epochs": 2}),
}


def prepare(seed: int, work: Path) -> dict[str, Any]:
    """Steps 1 and 2 of one seed, and its reward model; returns what that is worth on held-out comparisons."""
    prepared = Prepared(work / str(seed), seed)
    rows = bundled_prompts("train")
    policy = CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu")
    demonstrations = [{"prompt": row["prompt"], "completion": row["reference"]} for row in rows]
    SFT(policy, demonstrations, learning_rate=1e-4, seed=seed).learn()
    policy.save_pretrained(prepared.folder / "sft")
    prompts = PromptRows.read([row["prompt"] for row in rows])
    pairs = sample_pairs(policy, prompts, PAIRS, NEW_TOKENS, seed)
    annotator = SyntheticAnnotator(GOLD, temperature=TEMPERATURE, seed=seed)
    sides = [[pair["completions"][place] for pair in pairs] for place in (0, 1)]
    comparisons = annotator.compare([pair["prompt"] for pair in pairs], *sides)
    write_feedback(prepared.folder / "comparisons.jsonl", comparisons)
    model, report, *_ = fit_reward_model(policy, comparisons, prompts, NEW_TOKENS, seed, REWARD_MODEL)
    model.save_pretrained(prepared.folder / "reward-model")
    assert report is not None
    return {"seed": seed, **report.to_dict()}


def run(job: tuple[str, int], work: Path, prompts: str) -> dict[str, Any]:
    """Trains and measures one row with one seed."""
    name, seed = job
    prepared = Prepared(work / str(seed), seed)
    candidate = CANDIDATES[name]
    begin = time.perf_counter()
    writer = candidate.make(prepared, **candidate.options)
    seconds = time.perf_counter() - begin
    report = compare_policies(
        writer,
        [dict(row) for row in bundled_prompts(prompts)],
        "reference",
        reward=prepared.reward_model(),
        true_reward=GOLD,
        reference=prepared.policy(),
        max_new_tokens=NEW_TOKENS,
        num_generations=GENERATIONS,
        seed=seed,
        names=(name, "reference texts"),
    )
    side = report.sides[0]
    assert side.kl_per_sequence is not None
    return {
        "agent": name,
        "seed": seed,
        "win_rate": report.win_rates["true_reward"].rate,
        "gold": side.rewards["true_reward"].mean,
        "proxy": side.rewards["reward"].mean,
        "kl": side.kl_per_sequence.mean,
        "length": side.texts.tokens,
        "seconds": seconds,
    }


COLUMNS = {"win_rate": "win rate, %", "gold": "gold reward", "proxy": "proxy reward", "kl": "KL, nats", "length": "tokens"}


def table(results: list[dict[str, Any]]) -> str:
    """Means and intervals as a Markdown table, in order of the win rate."""
    lines = [f"| | {' | '.join(COLUMNS.values())} | seconds |", "|---" * (len(COLUMNS) + 2) + "|"]
    rows = []
    for name in dict.fromkeys(result["agent"] for result in results):
        own = [result for result in results if result["agent"] == name]
        cells = []
        for key in COLUMNS:
            scale = 100 if key == "win_rate" else 1
            mean, half = interval([scale * result[key] for result in own])
            cells.append(f"{mean:.1f} ± {half:.1f}" if scale == 100 or key == "length" else f"{mean:.3f} ± {half:.3f}")
        seconds = sorted(result["seconds"] for result in own)[len(own) // 2]
        rows.append((interval([result["win_rate"] for result in own])[0], f"| {name} | {' | '.join(cells)} | {seconds:.0f} |"))
    return "\n".join([*lines, *(line for _, line in sorted(rows))])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draws the win rates with their intervals, and every seed."""
    names = sorted({result["agent"] for result in results}, key=lambda name: interval(_of(results, name))[0])
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for place, name in enumerate(names):
        values = _of(results, name)
        mean, half = interval(values)
        axes.errorbar(mean, place, xerr=half, fmt="o", color="C0", capsize=4)
        axes.plot(values, [place] * len(values), "|", color="C1", markersize=12)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(50, color="grey", linewidth=0.8)
    axes.set_xlabel("win rate against the data's texts by the gold reward, %\n(mean and 95 % interval; seeds as strokes)")
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=150)


def _of(results: list[dict[str, Any]], name: str) -> list[float]:
    return [100 * result["win_rate"] for result in results if result["agent"] == name]


def main() -> int:
    options = parser().parse_args()
    torch.set_num_threads(1)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, common.each_in(options.jobs) as parallel:
        work = options.work or Path(folder)
        waiting = [seed for seed in seeds if not (work / str(seed) / "reward-model").exists()]
        models = []
        for report in parallel(partial(prepare, work=work), waiting):
            models.append(report)
            print(
                f"seed {report['seed']}: reward model right in {report['accuracy']['mean']:.1%} of held-out comparisons, the length alone "
                f"in {report['length_accuracy']['mean']:.1%}, calibration error {report['expected_calibration_error']:.3f}",
                flush=True,
            )
        jobs = [(name, seed) for seed in seeds for name in options.agents]
        results = []
        for result in parallel(partial(run, work=work, prompts=options.prompts), jobs):
            results.append(result)
            numbers = "  ".join(f"{key} {result[key]:7.3f}" for key in COLUMNS)
            print(f"{result['agent']:24} seed {result['seed']}  {numbers}  {result['seconds']:4.0f} s", flush=True)
    print("\n" + table(results))
    minutes = (time.perf_counter() - begin) / 60
    print(f"\n{minutes:.0f} minutes with {options.jobs} jobs")
    common.write(
        options.out,
        {
            "machine": common.machine(options.jobs),
            "minutes": minutes,
            "pairs": PAIRS,
            "queries": QUERIES,
            "beta": BETA,
            "settings": {name: CANDIDATES[name].options for name in options.agents},
            "reward_models": models,
            "runs": results,
        },
    )
    if options.plot:
        plot(results, options.plot)
    return 0


def parser() -> argparse.ArgumentParser:
    told = "Compare what learns from comparisons, by win rate on the bundled task."
    result = common.parser(told, seeds=5, first_seed=0, jobs=1, work=None, plot=None)
    result.add_argument("--agents", nargs="*", choices=list(CANDIDATES), default=list(CANDIDATES), help="default: all")
    result.add_argument("--prompts", choices=("eval", "train"), default="eval", help="what is completed in the end; default: eval")
    return result


if __name__ == "__main__":
    sys.exit(main())
