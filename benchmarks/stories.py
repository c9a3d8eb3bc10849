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

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["--max-prompt-tokens=64", "--truncate-prompts", "--max-new-tokens=48", "--beta=0.05"]
ONLINE = ["--num-envs=128"]
# What each algorithm is given besides.
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "PPO": ("ppo", [*ONLINE, "--learning-rate=1e-4", "--set=critic_learning_rate=0.002", "--set=n_epochs=2", "--set=batch_size=64"]),
    "REINFORCE": ("reinforce", [*ONLINE, "--learning-rate=3e-4"]),
}


def command(name: str, options: argparse.Namespace, seed: int, folder: Path) -> list[str]:
    """The command that trains `name`."""
    algorithm, own = SETTINGS[name]
    reward = f"{ROOT / 'examples' / 'vader_reward.py'}:sentiment"
    data = [f"--model={options.model}", f"--prompts={options.prompts}", f"--reward={reward}"]
    return ["textgym", "train", algorithm, *data, *COMMON, *own, f"--total-timesteps={options.tokens}", f"--seed={seed}", f"--out={folder}"]


def run(name: str, options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Trains, and returns what the run folder says."""
    line = command(name, options, seed, folder)
    shown = shlex.join(part.replace(f"{ROOT}/", "") for part in line)
    for path in (options.model, options.prompts, str(folder.parent)):
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


def table(results: list[dict[str, Any]], beta: float = 0.05) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| agent | seed | sentiment before → after | KL, nats | J = sentiment − β KL | tokens a story | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        before, after = result["before"], result["after"]
        objective = after["reward"] - beta * after["kl_per_sequence"]
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
        for name in options.agents:
            for seed in range(options.seeds):
                result = run(name, options, seed, folder / f"{SETTINGS[name][0]}-{seed}")
                results.append(result)
                print(table([result]).splitlines()[-1], flush=True)
    print("\n" + table(results))
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description="Train a pretrained story model towards happy stories with each agent.")
    result.add_argument("--model", required=True, help="folder of the model (stories260k of llama2.c, in transformers' form)")
    result.add_argument("--prompts", required=True, help=".jsonl or .jsonl.gz with a column prompt: first sentences of stories")
    result.add_argument("--lexicon", required=True, help="VADER's word list, vader_lexicon.txt")
    result.add_argument("--agents", nargs="*", choices=list(SETTINGS), default=list(SETTINGS), help="default: all")
    result.add_argument("--seeds", type=int, default=1, help="how many seeds; default: 1")
    result.add_argument("--tokens", type=int, default=150_000, help="length of each training in tokens; default: 150000")
    result.add_argument("--runs", default=None, help="keep the run folders here")
    result.add_argument("--out", default=None, help="write the numbers to this JSON file")
    return result


if __name__ == "__main__":
    sys.exit(main())
