"""Options that several commands share, word for word, and what `--resume` lets one change.

    seed: Seed = 0,
    set_: Annotated[list[str] | None, set_option("Any other argument of SFT.")] = None,

The alias stands for type and help; the default stays where the command is.
"""

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from textgym.cli.algorithms import OTHER_LEARNING_RATE
from textgym.cli.errors import UserError
from textgym.cli.settings import option, was_given

Model: TypeAlias = Annotated[
    str | None, typer.Option(help="Folder or id of a causal language model with its tokenizer.", show_default="bundled")
]
RewardWeight: TypeAlias = Annotated[
    list[float] | None, typer.Option(help="Weight of each --reward, in their order.", show_default="1 each")
]
NumEnvs: TypeAlias = Annotated[int, typer.Option(help="Completions per iteration.")]
NumGenerations: TypeAlias = Annotated[int, typer.Option(help="Completions per prompt.")]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option(help="Longest completion, in tokens.")]
Seed: TypeAlias = Annotated[int, typer.Option(help="The same seed gives the same run.")]
Device: TypeAlias = Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU if there is one.")]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace the run that is in --out.")]
Resume: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="Go on with the run in this folder. Its settings hold; only --total-timesteps and --device may be given."),
]
_CHANGED_BY_RESUME = ("total_timesteps", "device")


def out_option(name: str) -> Any:
    """Returns `--out` of a command whose run folders are called `name` and the time."""
    return typer.Option(help="Run folder.", show_default=f"runs/{name}-DATE-TIME")


def set_option(told: str, *, show_default: str | bool = True) -> Any:
    """Returns `--set NAME=VALUE` with the given help."""
    return typer.Option("--set", metavar="NAME=VALUE", help=told, show_default=show_default)


def falling_learning_rate(bundled: float) -> Any:
    """Returns `--learning-rate` of a command that lets it fall, with its default for the bundled model."""
    defaults = f"bundled model: {bundled:g}; any other: {OTHER_LEARNING_RATE:g}"
    return typer.Option(help="Step size of Adam at the start; it falls to 0.", show_default=defaults)


def resume_changes(context: typer.Context, *also: str) -> dict[str, Any]:
    """Returns the options that were really given beside `--resume`, the only changes to the run's settings.

    Args:
        context: of the command.
        also: parameters that say which run it is and change nothing, beside `resume`.

    Raises:
        UserError: an option was given that a run cannot go on with.
    """
    given = {name: value for name, value in context.params.items() if name not in ("resume", *also) and was_given(context, name)}
    refused = sorted(given.keys() - set(_CHANGED_BY_RESUME))
    if refused:
        raise UserError(f"{option(refused[0])} cannot be given with --resume: the run goes on with its own settings.")
    return given
