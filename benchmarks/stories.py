"""Agents on a real, pretrained model: stories of `stories260k` made happier, by the word list of VADER.

    python benchmarks/stories.py --model stories260k --prompts stories.jsonl.gz --lexicon vader_lexicon.txt \
        [--agents NAME ...] [--seeds 1] [--tokens 150000] [--out result.json] [--runs FOLDER]

Each agent is trained by its own command, `textgym train ALGORITHM ...` with the options printed here, on prompts that are the first
sentences of stories; what it reached on held-out prompts is read from its run folder. DPO learns from pairs of the model's own completions
whose labels come from the same reward.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

from textgym.agents import CausalLMPolicy
from textgym.prompts import read_prompts
from textgym.rewards import LexiconReward

ROOT = Path(__file__).resolve().parents[1]
MAX_PROMPT_TOKENS, NEW_TOKENS, BETA = 64, 48, 0.05
COMMON = [f"--max-prompt-tokens={MAX_PROMPT_TOKENS}", "--truncate-prompts", f"--max-new-tokens={NEW_TOKENS}"]
ONLINE = ["--num-envs=128"]
# What each algorithm is given besides.
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "PPO": ("ppo", [*ONLINE, "--learning-rate=1e-4", "--set=critic_learning_rate=0.002", "--set=n_epochs=2", "--set=batch_size=64"]),
    "REINFORCE": ("reinforce", [*ONLINE, "--learning-rate=2e-4"]),
    "RLOO k=4": ("rloo", [*ONLINE, "--learning-rate=2e-4", "--set=num_generations=4"]),
    "GRPO G=8": ("grpo", [*ONLINE, "--learning-rate=1e-4"]),
    "REBEL": ("rebel", [*ONLINE, "--learning-rate=1e-4", "--set=n_epochs=2", "--set=batch_size=64"]),
    "soft DQN": (
        "dqn",
        [*ONLINE, "--learning-rate=1e-4", "--set=critic_learning_rate=0.002", "--set=gradient_steps=4", "--set=batch_size=64"],
    ),
    "DPO": ("dpo", ["--beta=0.5", "--learning-rate=1e-4", "--set=batch_size=32"]),
}
HELD_OUT = 64
PAIRS = 1600
SHARPNESS = 10.0  # a pair's better side is chosen with probability σ(10 Δr): at β = 0.5 DPO's optimum is that of r with β = 0.05


def split_prompts(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Writes the prompts to train on and those to measure on."""
    texts, _ = read_prompts(options.prompts)
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, rows in zip(paths, (order[HELD_OUT:], order[:HELD_OUT]), strict=True):
        path.write_text("".join(json.dumps({"prompt": texts[row]}) + "\n" for row in rows), encoding="utf-8")
    return paths


def write_preferences(options: argparse.Namespace, train: Path, seed: int, path: Path) -> None:
    """Writes pairs of the model's own completions, labelled by the reward."""
    policy = CausalLMPolicy.from_pretrained(options.model, device="cpu")
    reward = LexiconReward.from_file(options.lexicon)
    prompts = [json.loads(line)["prompt"] for line in train.read_text(encoding="utf-8").splitlines()]
    prompts = [prompt for prompt in prompts if len(policy.tokenizer(prompt)["input_ids"]) <= MAX_PROMPT_TOKENS]
    rng = np.random.default_rng([seed, 1])
    chosen = [prompts[row] for row in rng.permutation(len(prompts))[:PAIRS]]
    texts: list[str] = []
    for start in range(0, len(chosen), 200):
        texts += policy.generate(chosen[start : start + 200], NEW_TOKENS, num_generations=2, seed=seed + start).texts
    rewards = np.reshape(reward(texts), (-1, 2))
    lines = []
    for row, prompt in enumerate(chosen):
        first_wins = rng.random() < 1 / (1 + np.exp(SHARPNESS * (rewards[row, 1] - rewards[row, 0])))
        pair = texts[2 * row : 2 * row + 2]
        good, bad = pair if first_wins else pair[::-1]
        lines.append(json.dumps({"prompt": prompt, "chosen": good, "rejected": bad}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def command(name: str, options: argparse.Namespace, seed: int, folder: Path) -> list[str]:
    """The command that trains `name`; the data it names are written."""
    algorithm, own = SETTINGS[name]
    train, held_out = split_prompts(options, folder.parent)
    reward = f"{ROOT / 'examples' / 'vader_reward.py'}:sentiment"
    data = [f"--prompts={train}", f"--total-timesteps={options.tokens}", f"--beta={BETA}"]
    if algorithm == "dpo":
        pairs = folder.parent / f"pairs-{seed}.jsonl"
        write_preferences(options, train, seed, pairs)
        data = [f"--preferences={pairs}"]
    shared = [f"--model={options.model}", f"--eval-prompts={held_out}", f"--reward={reward}", *COMMON]
    return ["textgym", "train", algorithm, *shared, *data, *own, f"--seed={seed}", f"--out={folder}"]


def run(name: str, options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Trains, and returns what the run folder says."""
    line = command(name, options, seed, folder)
    shown = shlex.join(part.replace(f"{ROOT}/", "") for part in line)
    for path in (options.model, folder.parent):
        shown = shown.replace(str(path), Path(path).name)
    print("$ VADER_LEXICON=... " + shown, flush=True)
    begin = time.perf_counter()
    environment = {**os.environ, "VADER_LEXICON": str(Path(options.lexicon).resolve())}
    done = subprocess.run(
        [sys.executable, "-m", "textgym.cli.main", *line[1:]], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-3000:]}")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    samples = [json.loads(text) for text in (folder / "samples-after.jsonl").read_text(encoding="utf-8").splitlines()[:3]]
    return {"agent": name, "seed": seed, "seconds": seconds, "command": shown, "samples": samples, **summary}


def table(results: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| agent | seed | sentiment before → after | KL, nats | J = sentiment − β KL | tokens a story | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        before, after = result["before"], result["after"]
        objective = after["reward"] - BETA * after["kl_per_sequence"]
        lines.append(
            f"| {result['agent']} | {result['seed']} | {before['reward']:.3f} → {after['reward']:.3f} | {after['kl_per_sequence']:.2f} "
            f"| {before['reward']:.3f} → {objective:.3f} | {after['length']:.1f} | {result['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.runs or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.agents:
            for seed in range(options.seeds):
                result = run(name, options, seed, folder / f"{SETTINGS[name][0]}-{seed}")
                results.append(result)
                print(table([result]).splitlines()[-1], flush=True)
    print("\n" + table(results))
    common.write(options.out, results)
    return 0


def parser() -> argparse.ArgumentParser:
    result = common.parser("Train a pretrained story model towards happy stories with each agent.", seeds=1)
    result.add_argument("--model", required=True, help="folder of the model (stories260k of llama2.c, in transformers' form)")
    result.add_argument("--prompts", required=True, help=".jsonl or .jsonl.gz with a column prompt: first sentences of stories")
    result.add_argument("--lexicon", required=True, help="VADER's word list, vader_lexicon.txt")
    result.add_argument("--agents", nargs="*", choices=list(SETTINGS), default=list(SETTINGS), help="default: all")
    result.add_argument("--tokens", type=int, default=150_000, help="length of each training in tokens; default: 150000")
    result.add_argument("--runs", default=None, help="keep the run folders here")
    return result


if __name__ == "__main__":
    sys.exit(main())
