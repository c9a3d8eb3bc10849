"""Learning curves as a PNG."""

from pathlib import Path
from typing import NamedTuple

from textgym.cli.run_folder import TIMESTEPS

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


def series(rows: Rows, metric: str | None) -> tuple[list[float], list[float]]:
    """Returns timesteps and values of a metric, where it was logged."""
    points = [(row[TIMESTEPS], row[metric]) for row in rows if metric in row] if metric else []
    return [x for x, _ in points], [y for _, y in points]


def plot_curves(rows: Rows, path: Path, title: str) -> None:
    """Draws reward, true reward, KL, loss and accuracy over tokens, those that there are.

    Args:
        rows: logged metrics, one dict per iteration.
        path: the PNG to write.
        title: over all panels.
    """
    # The object interface with its own canvas: `pyplot` would choose a backend, keep figures, and need a display on some systems.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if series(rows, panel.training)[0] or series(rows, panel.held_out)[0]]
    if not panels:
        return  # stopped before the first iteration
    figure = Figure(figsize=(5.0 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if panel.training is not None:
            axes.plot(*series(rows, panel.training), color="C0", alpha=0.6, label="trained on")
        axes.plot(*series(rows, panel.held_out), "o-", color="C1", markersize=3, label="held out")
        axes.set_title(panel.title)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
