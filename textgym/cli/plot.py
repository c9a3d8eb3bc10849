"""`textgym plot`: the learning curves of several runs in one picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from textgym.cli.algorithms import REWARD
from textgym.cli.errors import UserError, one_sentence_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from textgym.cli.plots import Panel
    from textgym.cli.run_folder import RunFolder


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders of textgym train, sft and pipeline; or of textgym reward, which have panels of their own."),
    ],
    out: Annotated[Path, typer.Option(help="The picture to write, replaced if it is there.")] = Path("curves.png"),
    label: Annotated[
        list[str] | None, typer.Option(help="What to call each run, in their order.", show_default="the names of the folders")
    ] = None,
) -> None:
    """Draw the curves of several runs into one PNG: held-out reward, true reward and KL over tokens, and both rewards over √KL.

    Of reward models: the held-out loss, accuracy and margin over tokens.
    """
    with one_sentence_errors():
        from textgym.cli.plots import plot_runs
        from textgym.cli.run_folder import RunFolder

        if label and len(label) != len(runs):
            raise UserError(f"--label must be given once per run: {len(runs)} times, not {len(label)}.")
        if out.suffix != ".png":
            raise UserError(f"--out must be a .png file, not {out}.")
        folders = [RunFolder(path) for path in runs]
        for folder in folders:
            if not folder.config.is_file():
                raise UserError(f"{folder.path} is no run folder (there is no config.json in it).")
            if not folder.metrics_files():
                raise UserError(f"{folder.path} holds no metrics (there is no progress.csv in it).")
        names = label or _names(runs)
        panels = _panels(folders)
        plot_runs([(name, folder.curve_rows()) for name, folder in zip(names, folders, strict=True)], out, panels)
        print(out)


def _panels(folders: "Sequence[RunFolder]") -> "Sequence[Panel]":
    """Returns what is drawn of runs, which are all of policies or all of reward models."""
    from textgym.cli.plots import PANELS, REWARD_MODEL_PANELS

    of_rewards = [folder for folder in folders if folder.algorithm == REWARD]
    if of_rewards and len(of_rewards) < len(folders):
        raise UserError(
            f"{of_rewards[0].path} is a run of textgym reward, whose curves are those of a reward model: draw it apart from the runs that "
            "train a policy."
        )
    return REWARD_MODEL_PANELS if of_rewards else PANELS


def _names(paths: list[Path]) -> list[str]:
    """The names of the folders; where two are equal, the paths as given."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
