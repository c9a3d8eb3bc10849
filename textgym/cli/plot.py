"""`textgym plot`: the learning curves of several runs in one picture."""

from pathlib import Path
from typing import Annotated

import typer

from textgym.cli.errors import UserError, one_sentence_errors


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of textgym train and textgym sft.")],
    out: Annotated[Path, typer.Option(help="The picture to write, replaced if it is there.")] = Path("curves.png"),
    label: Annotated[
        list[str] | None, typer.Option(help="What to call each run, in their order.", show_default="the names of the folders")
    ] = None,
) -> None:
    """Draw the curves of several runs into one PNG: held-out reward, true reward and KL over tokens, and both rewards over √KL."""
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
        plot_runs([(name, folder.curve_rows()) for name, folder in zip(names, folders, strict=True)], out)
        print(out)


def _names(paths: list[Path]) -> list[str]:
    """The names of the folders; where two are equal, the paths as given."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
