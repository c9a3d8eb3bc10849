"""Draws the pictures of the documentation again, from the numbers that lie beside it; only `ppo` and `q_learning` compute something.

python benchmarks/pictures.py                # all of docs/images, in a minute or two
python benchmarks/pictures.py win_rates ppo  # some
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import default_task
import fine_grained
import over_optimisation
import scaling
import win_rates

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"


def numbers(name: str) -> dict[str, Any]:
    """What a script measured."""
    document: dict[str, Any] = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
    return document


def draw_fine_grained(path: Path) -> None:
    """Fine-grained against holistic reward."""
    found = numbers("fine_grained")
    weights = sorted({run["weight"] for run in found["runs"]})
    fine_grained.plot(found["runs"], weights, found["tokens"], path)


def draw_over_optimisation(path: Path) -> None:
    """Gold and proxy reward over √KL."""
    found = numbers("over_optimisation")
    over_optimisation.plot(found["runs"], found["best_of_n"], path)


def draw_ppo(path: Path) -> None:
    """The curves of `textgym train ppo`, all defaults: the first picture of the README."""
    _computed([sys.executable, "-P", "-m", "textgym.cli.main", "train", "ppo", "--out", "run"], "run/curves.png", path)


def draw_q_learning(path: Path) -> None:
    """The curves of the example."""
    _computed([sys.executable, "-P", str(ROOT / "examples" / "q_learning_on_a_tree.py")], "q_learning_on_a_tree.png", path)


def _computed(command: list[str], made: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        shutil.copyfile(Path(folder) / made, path)


PICTURES: dict[str, Callable[[Path], None]] = {
    "default_task": lambda path: default_task.plot(numbers("default_task")["runs"], path),
    "fine_grained": draw_fine_grained,
    "over_optimisation": draw_over_optimisation,
    "ppo": draw_ppo,
    "q_learning": draw_q_learning,
    "scaling": lambda path: scaling.plot(numbers("scaling")["tokens per second"], path),
    "win_rates": lambda path: win_rates.plot(numbers("win_rates")["runs"], path),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation again.")
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=f"of {', '.join(PICTURES)}; default: all")
    parser.add_argument("--out", type=Path, default=IMAGES, help="a folder; default: docs/images")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.pictures if name not in PICTURES]
    if unknown:
        parser.error(f"there is no picture {unknown[0]!r}; the pictures are {', '.join(PICTURES)}")
    for name in options.pictures or PICTURES:
        path = options.out / f"{name}.png"
        PICTURES[name](path)
        print(path)


if __name__ == "__main__":
    main()
