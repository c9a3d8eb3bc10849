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

import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
from common import interval
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
LEARNING_RATE = 1e-4
GENERATIONS = 4  # completions per held-out prompt
MEASURED_AT = (0, 256, *range(512, 8193, 512))  # reward queries
AT_NATS = 3  # where the table compares the curves at equal KL
NS = (1, 2, 4, 8, 16, 32, 64)
DRAWN = 128  # completions per held-out prompt for best-of-n


@dataclass(frozen=True)
class Amount(Prepared):
    """One seed with the reward model of its first `pairs` comparisons."""

    pairs: int

    @property
    def reward_model_folder(self) -> Path:
        """Where it lies."""
        return self.folder / f"reward-model-{self.pairs}"

    def reward_model(self) -> RewardModel:
        """Returns it."""
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
            model = fit_reward_model(policy, comparisons[:pairs], prompts, NEW_TOKENS, seed, REWARD_MODEL).model
        model.save_pretrained(amount.reward_model_folder)
        report = RewardModelTrainer(model, None).evaluate(held_out)
        found.append({"seed": seed, "pairs": pairs, **report.to_dict()})
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

    A sum with these weights is the mean over all subsets of n, the unbiased estimate of Nakano et al. 2021 (arXiv:2112.09332).
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


def label(pairs: int, beta: float) -> str:
    """What a row of the table is called."""
    return f"{pairs:,} pairs, β = {beta:g}"


def cell(values: list[float], digits: int = 2) -> str:
    """Mean and interval over seeds; nothing where a seed has no value, and no interval of a single seed."""
    mean, half = interval(values)
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def gain_at(curve: dict[str, np.ndarray], reward: str, nats: float) -> float:
    """The gain where the KL first reaches `nats`, between the measurements around it; NaN where it never does."""
    kl = curve["distance"] ** 2
    if kl.max() < nats:
        return math.nan
    place = int((kl >= nats).argmax())
    return float(np.interp(nats, kl[place - 1 : place + 1], curve[reward][place - 1 : place + 1]))


def summary(curves: list[dict[str, np.ndarray]]) -> list[str]:
    """The cells that RLOO and best-of-n have in common."""
    peaks = [int(curve["gold"].argmax()) for curve in curves]
    return [
        cell([curve["gold"][peak] for curve, peak in zip(curves, peaks, strict=True)]),
        cell([curve["distance"][peak] ** 2 for curve, peak in zip(curves, peaks, strict=True)], 1),
        *(cell([gain_at(curve, reward, AT_NATS) for curve in curves]) for reward in ("gold", "proxy")),
        cell([curve["gold"][-1] for curve in curves]),
        cell([curve["proxy"][-1] for curve in curves]),
        cell([curve["distance"][-1] ** 2 for curve in curves], 1),
    ]


def table(runs: list[dict[str, Any]], bests: list[dict[str, Any]]) -> str:
    """The peak and the end of every curve as a Markdown table, means over seeds with Student's 95 % interval."""
    columns = (
        *("", "peak of gold", "KL there, nats", f"gold at {AT_NATS} nats", f"proxy at {AT_NATS} nats"),
        *("gold at the end", "proxy at the end", "KL at the end", "tokens", "repeated 3-grams", "verdicts"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for pairs, beta in dict.fromkeys((run["pairs"], run["beta"]) for run in runs):
        own = [run for run in runs if (run["pairs"], run["beta"]) == (pairs, beta)]
        verdicts = [run["verdict"]["verdict"] for run in own]
        cells = [
            *summary([gains(run["points"]) for run in own]),
            cell([run["points"][-1]["length"] for run in own], 1),
            cell([run["points"][-1]["repetition"] for run in own]),
            ", ".join(f"{verdicts.count(one)} {one}" for one in dict.fromkeys(verdicts)),
        ]
        lines.append(f"| RLOO, {label(pairs, beta)} | {' | '.join(cells)} |")
    for pairs in AMOUNTS:
        cells = summary([gains(best["points"]) for best in bests if best["pairs"] == pairs])
        lines.append(f"| best of 1 … {NS[-1]}, {pairs:,} pairs | {' | '.join(cells)} | | | |")
    return "\n".join(lines)


def reward_model_table(models: list[dict[str, Any]], bests: list[dict[str, Any]]) -> str:
    """What the reward models are worth, and Gao et al.'s form d (α_bon − β_bon d) of best-of-n, d = √KL, by least squares."""
    lines = ["| pairs | right, held-out comparisons, % | rank correlation with gold, per prompt | α_bon | β_bon | R² |", "|---" * 6 + "|"]
    for pairs in AMOUNTS:
        own = [best for best in bests if best["pairs"] == pairs]
        fits = [fitted(gains(best["points"])) for best in own]
        cells = [
            cell([100 * model["accuracy"]["mean"] for model in models if model["pairs"] == pairs], 1),
            cell([best["rank_correlation"] for best in own]),
            *(cell([one[place] for one in fits], 3) for place in range(2)),
            f"{min(one[2] for one in fits):.3f} at least",
        ]
        lines.append(f"| {pairs:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fitted(curve: dict[str, np.ndarray]) -> tuple[float, float, float]:
    """Returns α_bon, β_bon and R² of gold = d (α_bon − β_bon d)."""
    distance, gold = curve["distance"], curve["gold"]
    columns = np.stack([distance, -(distance**2)], axis=1)
    found = np.linalg.lstsq(columns, gold, rcond=None)[0]
    residual = float(np.square(gold - columns @ found).sum() / np.square(gold - gold.mean()).sum())
    return float(found[0]), float(found[1]), 1 - residual


def quotations(runs: list[dict[str, Any]]) -> str:
    """What the last policies write where proxy rose and gold fell most: one text of every run without a KL term."""
    lines = []
    for run in runs:
        if run["beta"] == 0 and run["verdict"]["samples"]:
            worst = run["verdict"]["samples"][0]
            lines += [
                f"{label(run['pairs'], run['beta'])}, seed {run['seed']}: proxy {TEMPERATURE * worst['proxy_change']:+.2f}, gold "
                f"{worst['gold_change']:+.2f}",
                f"  before: {worst['prompt']} |{worst['before']}",
                f"  after:  {worst['prompt']} |{worst['after']}",
            ]
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], bests: list[dict[str, Any]], path: Path) -> None:
    """Draws gold (solid) and proxy (dashed) over √KL: every amount at β = 0, its beginning with best-of-n, and every β at one amount."""
    figure, (whole, beginning, betas) = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    for place, pairs in enumerate(AMOUNTS):
        unpenalised = [run for run in runs if run["pairs"] == pairs and run["beta"] == 0]
        draw(whole, unpenalised, f"C{place}", f"{pairs:,} comparisons")
        draw(beginning, unpenalised, f"C{place}", f"{pairs:,} comparisons")
        draw(beginning, [best for best in bests if best["pairs"] == pairs], f"C{place}", f"best of n, {pairs:,}", "o")
    for place, beta in enumerate(BETAS):
        own = [run for run in runs if run["pairs"] == AMOUNT_OF_BETAS and run["beta"] == beta]
        draw(betas, own, f"C{3 + place}", f"β = {beta:g}")
    for style, name in (("-", "gold reward"), ("--", "proxy reward")):
        whole.plot([], [], style, color="grey", linewidth=2, label=name)
    titles = (
        "RLOO without a KL term",
        f"its beginning, and best of n = 1 … {NS[-1]} (KL bound)",
        f"the effect of β, {AMOUNT_OF_BETAS:,} comparisons",
    )
    for axis, title in zip((whole, beginning, betas), titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("√KL to the SFT model, √nats")
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper right" if axis is betas else "lower left")
    whole.set_ylim(-2.6, 1.4)
    for axis in (beginning, betas):
        axis.set_xlim(0, 5)
        axis.set_ylim(-0.6, 1.0)
    whole.set_ylabel("gain over the SFT model, in gold reward\n(thin: seeds, thick: their mean)")
    figure.savefig(path, dpi=110)


def draw(axis: Any, curves: list[dict[str, Any]], colour: str, name: str, marker: str = "") -> None:
    """Draws one group: each seed thin, and thick the mean of √KL and of the gain at equal numbers of queries (or n)."""
    found = [gains(curve["points"]) for curve in curves]
    for key, style in (("gold", "-"), ("proxy", "--")):
        for one in found:
            axis.plot(one["distance"], one[key], style, color=colour, linewidth=0.8, alpha=0.35)
        distance, mean = (np.mean([one[column] for one in found], axis=0) for column in ("distance", key))
        axis.plot(distance, mean, style + marker, color=colour, linewidth=2, markersize=4, label=name if key == "gold" else None)


def main() -> int:
    told = "Gold and proxy reward over √KL on the bundled task: when does optimising the proxy hurt?"
    options = common.parser(told, seeds=3, first_seed=0, jobs=1, work=None, plot=None).parse_args()
    torch.set_num_threads(1)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    kinds = [*((pairs, 0.0) for pairs in AMOUNTS), *((AMOUNT_OF_BETAS, beta) for beta in BETAS if beta)]
    begin = time.perf_counter()
    models: list[dict[str, Any]] = []
    bests: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, common.each_in(options.jobs) as parallel:
        work = options.work or Path(folder)
        for found in parallel(partial(fit, work=work), seeds):
            models += found
            for model in found:
                print(
                    f"seed {model['seed']}, {model['pairs']:5,} pairs: right in {model['accuracy']['mean']:.1%} of comparisons", flush=True
                )
        for found in parallel(partial(best_of, work=work), seeds):
            bests += found
        for run in parallel(partial(train, work=work), [(seed, *kind) for seed in seeds for kind in kinds]):
            runs.append(run)
            curve, last = gains(run["points"]), run["points"][-1]
            print(
                f"seed {run['seed']}, {label(run['pairs'], run['beta']):24}  peak of gold {curve['gold'].max():6.3f}"
                f"  gold {curve['gold'][-1]:6.3f}  proxy {curve['proxy'][-1]:6.3f}"
                f"  KL {last['kl']:6.1f}  {run['verdict']['verdict']}  {run['seconds']:4.0f} s",
                flush=True,
            )
    runs.sort(key=lambda run: kinds.index((run["pairs"], run["beta"])))
    minutes = (time.perf_counter() - begin) / 60
    print(f"\n{reward_model_table(models, bests)}\n\n{table(runs, bests)}\n\n{quotations(runs)}")
    print(f"\n{minutes:.0f} minutes with {options.jobs} jobs")
    common.write(
        options.out,
        {
            "machine": common.machine(options.jobs),
            "minutes": minutes,
            "temperature": TEMPERATURE,
            "learning_rate": LEARNING_RATE,
            "reward_models": models,
            "best_of_n": bests,
            "runs": runs,
        },
    )
    if options.plot:
        plot(runs, bests, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
