"""Options that several commands share, word for word, and what `--resume` lets one change.

    seed: Seed = 0,
    set_: Annotated[list[str] | None, set_option("Any other argument of SFT.")] = None,

The alias stands for type and help; the default stays where the command is. The panels are those of `--help`.
"""

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from textgym.cli.algorithms import OTHER_LEARNING_RATE
from textgym.cli.errors import UserError
from textgym.cli.schedules import FORMS
from textgym.cli.settings import option, was_given

DATA, MODEL, REWARDS = "Data", "Model", "Rewards"
SAMPLING, LEARNING, MEASURING, RUN = "Sampling", "Learning", "Measuring", "Run"

Model: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Folder or id of a causal language model with its tokenizer, or a run folder.", show_default="bundled", rich_help_panel=MODEL
    ),
]
Dtype: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Of the weights: auto (float32 for half-precision checkpoints), checkpoint (as they are), float32, bfloat16 or float16.",
        rich_help_panel=MODEL,
    ),
]
Autocast: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Of matrix products: bfloat16, float16, none (as the weights), or auto (bfloat16 where that is the checkpoint's and fast).",
        rich_help_panel=MODEL,
    ),
]
RewardWeight: TypeAlias = Annotated[
    list[float] | None,
    typer.Option(help="Weight of each --reward, in their order.", show_default="1 each", rich_help_panel=REWARDS),
]
NumEnvs: TypeAlias = Annotated[int, typer.Option(help="Completions per iteration.", rich_help_panel=SAMPLING)]
NumGenerations: TypeAlias = Annotated[int, typer.Option(help="Completions per prompt.", rich_help_panel=SAMPLING)]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option(help="Longest completion, in tokens.", rich_help_panel=SAMPLING)]
EvalCompletions: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Completions of held-out prompts that are measured before and after training.",
        show_default="200; of models above 10 M parameters 64, above 1,000 M 32",
        rich_help_panel=MEASURING,
    ),
]
Seed: TypeAlias = Annotated[int, typer.Option(min=0, help="The same seed gives the same run.", rich_help_panel=RUN)]
Device: TypeAlias = Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU if there is one.", rich_help_panel=MODEL)]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace the run that is in --out.", rich_help_panel=RUN)]
Resume: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Go on with the run in this folder. Its settings hold; only --total-timesteps and --device may be given.", rich_help_panel=RUN
    ),
]
_CHANGED_BY_RESUME = ("total_timesteps", "device")


def out_option(name: str) -> Any:
    """Returns `--out` of a command whose run folders are called `name` and the time."""
    return typer.Option(help="Run folder.", show_default=f"runs/{name}-DATE-TIME", rich_help_panel=RUN)


def set_option(told: str, *, show_default: str | bool = True) -> Any:
    """Returns `--set NAME=VALUE` with the given help."""
    return typer.Option("--set", metavar="NAME=VALUE", help=told, show_default=show_default, rich_help_panel=LEARNING)


def falling_learning_rate(bundled: float) -> Any:
    """Returns `--learning-rate` of a command that lets it fall, with its default for the bundled model."""
    defaults = f"bundled model: {bundled:g}; any other: {OTHER_LEARNING_RATE:g}"
    return typer.Option(help="Step size of Adam at the start; it falls to 0.", show_default=defaults, rich_help_panel=LEARNING)


def learning_rate_schedule(told: str, show_default: str) -> Any:
    """Returns `--learning-rate` of a command that takes a schedule too, with the given help."""
    return typer.Option(help=f"{told}; or {FORMS}.", show_default=show_default, metavar="RATE", rich_help_panel=LEARNING)


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
