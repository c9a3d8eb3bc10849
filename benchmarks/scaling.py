"""How sampled tokens per second grow with batch size, length and model size, with the floor beside them.

    python benchmarks/scaling.py [--device auto] [--repeats 3] [--out result.json] [--plot result.png]

GPT-2-type models of random weights, V = 2,048, prompts of 16 tokens; every completion runs to its full length. Around the middle (batch
64, 32 new tokens, width 128, 4 layers: 1.1 M parameters) one thing is varied at a time. The floor is what the matrix products at the
rate of this machine's large products, or reading weights and cache once per token at the rate of its copies, would take (`floors.py`);
the script measures both rates.

It prints tokens per second, those at the floor, and the share of the floor that is reached.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import common
import matplotlib.pyplot as plt
import torch
from floors import FIRST_WORD, HEAD_SIZE, Machine, Shape, Work
from stable_baselines3.common.utils import get_device

from textgym.agents import CausalLMPolicy

VOCAB_SIZE, PROMPT_TOKENS = 2048, 16


@dataclass(frozen=True)
class Point:
    """One setting."""

    batch_size: int
    new_tokens: int
    shape: Shape

    @property
    def calls(self) -> list[Work]:
        """The work of its calls of the model."""
        return self.shape.decoding(self.batch_size, self.batch_size, PROMPT_TOKENS, self.new_tokens)

    def run(self, policy: CausalLMPolicy) -> int:
        """Samples a batch; returns its tokens."""
        prompts = torch.arange(self.batch_size * PROMPT_TOKENS) % (VOCAB_SIZE - FIRST_WORD) + FIRST_WORD
        lengths = torch.full((self.batch_size,), PROMPT_TOKENS)
        generation = policy.generate_ids(prompts.view(self.batch_size, -1), lengths, self.new_tokens, eos_token_ids=())
        return int(generation.lengths.sum())


def sweeps(options: argparse.Namespace, middle: Point) -> dict[str, dict[float, Point]]:
    """Returns, of each thing that is varied, the points by its value."""
    shapes = [replace(middle.shape, width=width, layers=layers) for width, layers in options.sizes]
    return {
        "batch size": {size: replace(middle, batch_size=size) for size in options.batch_sizes},
        "new tokens": {length: replace(middle, new_tokens=length) for length in options.lengths},
        "parameters": {shape.parameters: replace(middle, shape=shape) for shape in shapes},
    }


def measure(points: list[Point], options: argparse.Namespace) -> dict[Point, float]:
    """Returns the tokens per second of each point; they take turns."""
    longest = PROMPT_TOKENS + max(point.new_tokens for point in points)
    policies = {shape: shape.policy(longest, options.device) for shape in dict.fromkeys(point.shape for point in points)}
    named: dict[str, Callable[[], float]] = {}
    for i, point in enumerate(points):
        policy = policies[point.shape]
        named[str(i)] = common.per_second(partial(point.run, policy), policy.device)
    rates = common.alternate(named, options.repeats)
    return {point: rates[str(i)] for i, point in enumerate(points)}


def report(swept: dict[str, dict[float, Point]], rates: dict[Point, float], machine: Machine) -> dict[str, list[dict[str, float]]]:
    """Prints the tables; returns their rows."""
    results: dict[str, list[dict[str, float]]] = {}
    for name, points in swept.items():
        print(f"\n{name:>12}{'tokens/s':>14}{'at the floor':>14}{'share':>8}{'products, s':>13}{'reading, s':>13}")
        results[name] = []
        for value, point in points.items():
            floor = point.batch_size * point.new_tokens / machine.seconds(point.calls)
            products, reading = machine.parts(point.calls)
            row = {name: value, "tokens/s": rates[point], "floor": floor, "share": rates[point] / floor}
            results[name].append(row | {"products": products, "reading": reading})
            print(f"{value:12,}{rates[point]:14,.0f}{floor:14,.0f}{row['share']:8.1%}{products:13.5f}{reading:13.5f}")
    return results


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draws tokens per second and the floor over each thing that was varied."""
    figure, axes = plt.subplots(1, len(results), figsize=(14, 4.4), layout="constrained", sharey=True)
    for axis, (name, rows) in zip(axes, results.items(), strict=True):
        values = [row[name] for row in rows]
        axis.plot(values, [row["floor"] for row in rows], "--", color="C7", label="floor: products, weights and cache alone")
        axis.plot(values, [row["tokens/s"] for row in rows], "o-", color="C0", label="textgym")
        for row in rows:
            axis.annotate(
                f"{row['share']:.0%}", (row[name], row["tokens/s"]), (0, -14), textcoords="offset points", ha="center", fontsize=8
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(values, [f"{value / 1e6:.2g} M" if value >= 1e5 else f"{value:,}" for value in values])
        axis.minorticks_off()
        axis.margins(x=0.09, y=0.14)  # room for the shares below the points
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("sampled tokens per second")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def size(text: str) -> tuple[int, int]:
    """Reads WIDTHxLAYERS."""
    width, _, layers = text.partition("x")
    if not (width.isdigit() and layers.isdigit()) or int(width) % HEAD_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} must be WIDTHxLAYERS, as 128x4, the width a multiple of {HEAD_SIZE}")
    return int(width), int(layers)


def parser() -> argparse.ArgumentParser:
    result = common.parser(__doc__, device="auto", repeats=3, plot=None)
    result.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    result.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    result.add_argument("--sizes", type=size, nargs="+", default=[(64, 2), (128, 4), (256, 6), (512, 8)], help="WIDTHxLAYERS")
    result.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights; default: float32")
    return result


def main() -> None:
    options = parser().parse_args()
    dtype = getattr(torch, options.dtype)
    middle = Point(64, 32, Shape(VOCAB_SIZE, 128, 4, dtype.itemsize))
    swept = sweeps(options, middle)
    device = get_device(options.device)
    machine = Machine(device, dtype)
    print(f"matrix products: {machine.flops / 1e9:,.0f} GFLOP/s; copies of 1 GB: {machine.bandwidth(2**30) / 1e9:,.1f} GB/s")
    rates = measure(list(dict.fromkeys(point for points in swept.values() for point in points.values())), options)
    results = report(swept, rates, machine)
    if options.plot:
        plot(results, options.plot)
    common.write(options.out, {"setting": common.setting(device), "machine": machine.to_json(), "tokens per second": results})


if __name__ == "__main__":
    main()
