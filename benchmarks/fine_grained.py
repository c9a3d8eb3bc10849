"""Fine-grained against holistic reward at the same budget, on two objectives that conflict (SPEC of both: `objectives`).

    python benchmarks/fine_grained.py [--seeds 5] [--tokens 30000] [--weights 0.3 ...] [--jobs 1] [--out result.json] [--plot result.png]

The bundled model writes film reviews. *Praise* is the mean valence of each sentence's opinions, summed over sentences; *variety* takes half
a point off for every word that was used before. More sentences are more praise and more repeated words. PPO maximises
`w · praise + (1 − w) · variety` less β KL, in three arms that ask for the same scores of the same segments:

    per segment        each score is paid at the end of its sentence, GAE with λ = 0.95
    per segment, λ=1   the same without the bias of λ: the advantage is what is still to come less the critic's estimate
    at the end         all scores are paid together at the last token (`paid="end"`), λ = 1

All runs generate the same number of tokens with the same learning rate. On seed 100 λ = 0.95 did better per segment, and the two λ did
alike at the end. Figures are means over the seeds with the 95 % interval of Student's t, on held-out prompts after the training; curves
are over the completions that were trained on.
"""

import argparse
import time
from collections.abc import Iterable
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
from stable_baselines3.common.utils import LinearSchedule

import textgym  # noqa: F401  (registers the id)
from textgym.agents import PPO, CausalLMPolicy, evaluate_policy
from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.bundled.grammar import is_sentence, split_words, words_of
from textgym.rewards import FineGrainedReward, LexiconReward, Objective

BETA = 0.05
LEARNING_RATE = 5e-4  # falls to 0
NEW_TOKENS = 48
ROWS = 64
EPISODES = 256  # of the evaluation
PARTS = ("praise", "variety", "grammar", "sentences")
WORST = (0.0, -10.0)  # praise and variety from which the area under a front is measured

# How the scores are paid, and λ of GAE.
ARMS: dict[str, tuple[Any, float]] = {
    "per segment": ("segment", 0.95),
    "per segment, λ=1": ("segment", 1.0),
    "at the end": ("end", 1.0),
}
VALENCES = {"GOOD_MILD": 1.0, "GOOD_STRONG": 2.0, "BAD_MILD": -1.0, "BAD_STRONG": -2.0}

praise = LexiconReward({word: value for symbol, value in VALENCES.items() for word in words_of(symbol)}, normalise="mean")


def variety(completions: list[str], segments: list[str]) -> list[float]:
    """Half a point off for every word of the segment that stands earlier in the completion."""
    scores = []
    for text, segment in zip(completions, segments, strict=True):
        seen = set(_words(text[: len(text) - len(segment)]))
        repeated = 0
        for word in _words(segment):
            repeated += word in seen
            seen.add(word)
        scores.append(-0.5 * repeated)
    return scores


def grammar(prompts: list[str], segments: list[str], segment_index: list[int]) -> list[float]:
    """1 where the grammar behind the bundled texts can produce the sentence, the first with its prompt; only measured."""
    whole = [prompt + text if index == 0 else text for prompt, text, index in zip(prompts, segments, segment_index, strict=True)]
    return [float(is_sentence(tuple(split_words(text.rstrip(".!? "))))) for text in whole]


def one(segments: list[str]) -> list[float]:
    """Counts sentences; only measured."""
    return [1.0] * len(segments)


def _words(text: str) -> list[str]:
    return [word for word in split_words(text) if word.isalpha()]


def objectives(weight: float, paid: Any) -> FineGrainedReward:
    """The two objectives that are trained on, and two at weight 0."""
    return FineGrainedReward(
        [
            Objective(praise, "sentence", weight, "praise", sees="segment", paid=paid),
            Objective(variety, "sentence", 1.0 - weight, "variety", paid=paid),
            Objective(grammar, "sentence", 0.0, "grammar", paid=paid),
            Objective(one, "sentence", 0.0, "sentences", paid=paid),
        ]
    )


class Curve(BaseCallback):
    """Notes what each rollout was paid."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.points: list[dict[str, float]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        rollout = self.locals["rollout"]
        point = figures(rollout.infos, float(rollout.kl_per_sequence.mean()), float(rollout.lengths.float().mean()), self.weight)
        self.points.append({"tokens": float(self.num_timesteps), **point})


def figures(infos: Iterable[dict[str, Any]], kl: float, length: float, weight: float) -> dict[str, float]:
    """The means of some completions."""
    infos = list(infos)
    parts = {name: float(np.mean([info["rewards"][name] for info in infos])) for name in PARTS}
    reward = weight * parts["praise"] + (1.0 - weight) * parts["variety"]
    share = {"grammatical": parts.pop("grammar") / parts["sentences"]}
    return {**parts, **share, "reward": reward, "kl": kl, "objective": reward - BETA * kl, "length": length}


def run(job: tuple[str, float, int], tokens: int) -> dict[str, Any]:
    """Trains one arm with one weight and one seed."""
    arm, weight, seed = job
    paid, gae_lambda = ARMS[arm]
    policy = CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu")
    reward = objectives(weight, paid)

    def environment(prompts: str, reward: FineGrainedReward) -> Any:
        rows = [dict(row) for row in bundled_prompts(prompts)]
        return gym.make_vec("TextGen-v0", ROWS, prompts=rows, tokenizer=policy.tokenizer, reward=reward, max_new_tokens=NEW_TOKENS)

    options = {"n_epochs": 2, "batch_size": 32, "gae_lambda": gae_lambda}
    schedule = LinearSchedule(LEARNING_RATE, 0.0, 1.0)
    agent = PPO(policy, environment("train", reward), schedule, beta=BETA, seed=seed, **options)
    curve, begin = Curve(weight), time.perf_counter()
    agent.learn(tokens, callback=curve)
    seconds = time.perf_counter() - begin
    result = evaluate_policy(policy, environment("eval", objectives(weight, paid)), agent.reference, episodes=EPISODES, seed=7)
    return {
        "arm": arm,
        "weight": weight,
        "seed": seed,
        "seconds": seconds,
        "completions_scored": ROWS * len(curve.points),
        "segments_scored": reward.counts["praise"][1],
        "final": figures(result.infos, result.kl_mean, float(result.lengths.mean()), weight),
        "curve": curve.points,
    }


def area(points: list[tuple[float, float]]) -> float:
    """The area that some points of praise and variety dominate, from `WORST` on: larger is a better front."""
    total, reached = 0.0, WORST[1]
    for x, y in sorted(points, reverse=True):
        if x > WORST[0] and y > reached:
            total += (x - WORST[0]) * (y - reached)
            reached = y
    return total


def own(results: list[dict[str, Any]], arm: str, weight: float) -> list[dict[str, Any]]:
    return [result for result in results if result["arm"] == arm and result["weight"] == weight]


def table(results: list[dict[str, Any]], weights: list[float]) -> str:
    """Final figures of each arm and weight, and the areas under the fronts."""
    columns = ("reward", "praise", "variety", "kl", "objective")
    lines = [
        "| w | paid | reward | praise | variety | KL, nats | J = reward − β KL | mean J of the training | sentences | of the grammar |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for weight in weights:
        for arm in ARMS:
            runs = own(results, arm, weight)
            cells = ["{:.2f} ± {:.2f}".format(*interval([result["final"][key] for result in runs])) for key in columns]
            cells.append("{:.2f} ± {:.2f}".format(*interval([mean_objective(result["curve"]) for result in runs])))
            cells += [
                f"{np.mean([result['final']['sentences'] for result in runs]):.1f}",
                f"{np.mean([result['final']['grammatical'] for result in runs]):.0%}",
            ]
            lines.append(f"| {weight:g} | {arm} | {' | '.join(cells)} |")
    lines += ["", "| paid | area under the front of praise and variety |", "|---|---|"]
    for arm in ARMS:
        seeds = sorted({result["seed"] for result in results})
        fronts = [[result["final"] for result in results if result["arm"] == arm and result["seed"] == seed] for seed in seeds]
        areas = [area([(point["praise"], point["variety"]) for point in front]) for front in fronts]
        lines.append("| {} | {:.1f} ± {:.1f} |".format(arm, *interval(areas)))
    return "\n".join(lines)


def mean_objective(curve: list[dict[str, float]]) -> float:
    """J averaged over the tokens of a training: how early it was reached."""
    tokens = np.diff([0.0, *(point["tokens"] for point in curve)])
    return float(np.average([point["objective"] for point in curve], weights=tokens))


MARKERS = "os^Dv"  # one of each weight: labels of points that lie close would cover each other


def plot(results: list[dict[str, Any]], weights: list[float], tokens: int, path: Path) -> None:
    """Learning curves at the middle weight, the front of the two objectives, and reward over KL."""
    figure, (curves, front, cost) = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    middle = weights[len(weights) // 2]
    first_arm = next(iter(ARMS))  # one legend of the markers is enough
    grid = np.linspace(2000, tokens, 40)
    for colour, arm in zip(("tab:blue", "tab:cyan", "tab:orange"), ARMS, strict=True):
        runs = [result["curve"] for result in own(results, arm, middle)]
        values = [np.interp(grid, [p["tokens"] for p in run], [p["objective"] for p in run]) for run in runs]
        means, halves = np.array([interval([value[i] for value in values]) for i in range(len(grid))]).T
        curves.plot(grid, means, color=colour, label=arm)
        curves.fill_between(grid, means - halves, means + halves, color=colour, alpha=0.15, linewidth=0)
        stats = {
            key: np.array([interval([result["final"][key] for result in own(results, arm, w)]) for w in weights])
            for key in ("praise", "variety", "kl")
        }
        for axis, x, y in ((front, "praise", "variety"), (cost, "kl", "praise")):
            axis.errorbar(stats[x][:, 0], stats[y][:, 0], stats[y][:, 1], stats[x][:, 1], color=colour, capsize=2, linewidth=1.2)
            for i, weight in enumerate(weights):
                shape = MARKERS[i % len(MARKERS)]
                axis.plot(stats[x][i, 0], stats[y][i, 0], shape, color=colour, label=f"{weight:g}" if arm == first_arm else None)
    curves.set(title=f"J = reward − β KL while training, w = {middle:g}", xlabel="tokens generated")
    front.set(title="the front over w (held-out prompts)", xlabel="praise per review", ylabel="variety per review")
    cost.set(title="what it costs", xlabel="KL to the reference, nats per review", ylabel="praise per review")
    for axis in (curves, front, cost):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    curves.legend(title="scores are paid", frameon=False, loc="upper left")
    front.legend(title="w", frameon=False, loc="lower left")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    jobs = [(arm, weight, seed) for seed in range(options.seeds) for weight in options.weights for arm in ARMS]
    results = []
    with common.each_in(options.jobs) as parallel:
        for result in parallel(partial(run, tokens=options.tokens), jobs):
            results.append(result)
            final = result["final"]
            shown = "  ".join(f"{key} {final[key]:.2f}" for key in ("praise", "variety", "kl", "objective", "grammatical"))
            print(f"{result['arm']:16} w {result['weight']:g} seed {result['seed']}  {shown}  {result['seconds']:.0f} s", flush=True)
    print("\n" + table(results, options.weights))
    if options.out:
        for result in results:  # every fourth rollout is enough for a file
            result["curve"] = [{key: round(value, 3) for key, value in point.items()} for point in result["curve"][::4]]
        document = {
            "machine": common.machine(options.jobs),
            "tokens": options.tokens,
            "beta": BETA,
            "learning_rate": LEARNING_RATE,
            "arms": ARMS,
            "runs": results,
        }
        common.write(options.out, document)
    if options.plot:
        plot(results, options.weights, options.tokens, options.plot)


def parser() -> argparse.ArgumentParser:
    result = common.parser("Compare fine-grained with holistic rewards at the same budget.", seeds=5, jobs=1, plot=None)
    result.add_argument("--tokens", type=int, default=30_000, help="tokens that each run generates; default: 30,000")
    result.add_argument("--weights", type=float, nargs="*", default=[0.3, 0.5, 0.7, 0.9], help="of praise; default: 0.3 0.5 0.7 0.9")
    return result


if __name__ == "__main__":
    main()
