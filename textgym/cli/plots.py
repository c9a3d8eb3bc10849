"""Learning curves as a PNG."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from textgym.cli.run_folder import TIMESTEPS
from textgym.evaluation.calibration import ReliabilityBin

Rows = list[dict[str, float]]


class Panel(NamedTuple):
    """One plot: its title, and the metrics on training and on held-out prompts."""

    title: str
    training: str | None
    held_out: str


PANELS = (
    Panel("reward", "rollout/reward_mean", "eval/reward_mean"),
    Panel("true reward (measured, not trained on)", None, "eval/true_reward_mean"),
    Panel("KL to the reference, nats per completion", "rollout/kl_per_sequence", "eval/kl_per_sequence"),
    Panel("loss", "train/loss", "eval/loss"),
    Panel("accuracy: preferences in the order of the implicit reward", "rewards/accuracies", "eval/accuracy"),
)
REWARD_MODEL_PANELS = (
    Panel("loss", "train/loss", "eval/loss"),
    Panel("accuracy: feedback that the reward agrees with", "train/accuracy", "eval/accuracy"),
    Panel("margin: how far apart the reward holds what differs", "train/reward_margin", "eval/reward_margin"),
)

KL = "eval/kl_per_sequence"
REWARDS = ("eval/reward_mean", "eval/true_reward_mean")


def series(rows: Rows, metric: str | None) -> tuple[list[float], list[float]]:
    """Returns timesteps and values of a metric, where it was logged."""
    points = [(row[TIMESTEPS], row[metric]) for row in rows if metric in row] if metric else []
    return [x for x, _ in points], [y for _, y in points]


def plot_curves(rows: Rows, path: Path, title: str, panels: Sequence[Panel] = PANELS) -> None:
    """Draws reward, true reward, KL, loss and accuracy over tokens, those that there are.

    Args:
        rows: logged metrics, one dict per iteration.
        path: the PNG to write.
        title: over all panels.
        panels: what to draw.
    """
    panels = [panel for panel in panels if series(rows, panel.training)[0] or series(rows, panel.held_out)[0]]
    if not panels:
        return  # stopped before the first iteration
    figure = _figure(len(panels))
    figure.suptitle(title)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if panel.training is not None:
            axes.plot(*series(rows, panel.training), color="C0", alpha=0.6, label="trained on")
        axes.plot(*series(rows, panel.held_out), "o-", color="C1", markersize=3, label="held out")
        axes.set_title(panel.title)
        _token_axis(axes)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def over_root_kl(rows: Rows, metric: str) -> tuple[list[float], list[float]]:
    """Returns √KL and a held-out metric, where both were measured, in the order of training.

    Rewards are close to straight lines in √KL while a policy begins to move (Gao, Schulman & Hilton 2022), and runs of any length and
    learning rate can be laid over each other.
    """
    points = [(math.sqrt(max(row[KL], 0.0)), row[metric]) for row in rows if KL in row and metric in row]
    return [x for x, _ in points], [y for _, y in points]


def plot_runs(runs: Sequence[tuple[str, Rows]], path: Path, drawn: Sequence[Panel] = PANELS) -> None:
    """Draws several runs into one picture: each held-out metric over tokens, and the rewards over √KL; panels without data are left out.

    Args:
        runs: the name of each run and its logged metrics.
        path: the PNG to write.
        drawn: what to draw.

    Raises:
        ValueError: no run has a held-out metric.
    """
    tokens = [(panel.title, "tokens", [series(rows, panel.held_out) for _, rows in runs]) for panel in drawn]
    rewards = [panel for panel in drawn if panel.held_out in REWARDS]
    root_kl = [(panel.title, "√KL to the reference", [over_root_kl(rows, panel.held_out) for _, rows in runs]) for panel in rewards]
    panels = [panel for panel in (*tokens, *root_kl) if any(x for x, _ in panel[2])]
    if not panels:
        raise ValueError("none of the runs has been measured on held-out prompts.")
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = _figure(columns, lines)
    for number, (title, label, curves) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, number)
        for place, (x, y) in enumerate(curves):
            # Ten colours, then the same ones dashed: every run has one look in all panels, also where it has no data.
            axes.plot(x, y, "o-" if place < 10 else "o--", color=f"C{place % 10}", markersize=3)
        axes.set_title(title)
        if label == "tokens":
            _token_axis(axes)
        else:
            axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.legend(figure.axes[0].get_lines(), [name for name, _ in runs], loc="outside lower center", ncols=min(len(runs), 6))
    figure.savefig(path, dpi=110)


def _token_axis(axes: Any) -> None:
    """Labels an axis of tokens, in thousands and millions: longer numbers run into each other."""
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _figure(columns: int, lines: int = 1) -> Any:
    """A figure for panels side by side, in one line or several."""
    # The object interface with its own canvas: `pyplot` would choose a backend, keep figures, and need a display on some systems.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * columns, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_reliability(table: Sequence[ReliabilityBin], path: Path, title: str) -> None:
    """Draws how often a reward model is right against how often it says so.

    Args:
        table: of a `RewardModelReport`.
        path: the PNG to write.
        title: over the picture.
    """
    figure = _figure(1)
    axes = figure.subplots()
    there = [one for one in table if one.weight]
    total = sum(one.weight for one in there)
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", label="calibrated")
    axes.plot([one.stated for one in there], [one.observed for one in there], "o-", color="C1", label="held out")
    axes.bar(
        [(one.low + one.high) / 2 for one in there],
        [one.weight / total for one in there],
        width=0.8 * (table[0].high - table[0].low),
        color="C0",
        alpha=0.25,
        label="share of the feedback",
    )
    axes.set(xlabel="stated probability of the favoured side, σ(|Δ|)", ylabel="how often it was right", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
