"""`textgym bench`: how fast sampling and training are on this machine."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from textgym.cli.errors import UserError, one_sentence_errors
from textgym.cli.options import DATA, MODEL, RUN, SAMPLING, Autocast, Device, Dtype, MaxNewTokens
from textgym.cli.settings import option

if TYPE_CHECKING:
    from textgym.agents import CausalLMPolicy
    from textgym.cli.benching import Figures

GENERATIONS = 4  # completions per prompt of RLOO


@dataclass(frozen=True)
class BenchSettings:
    """The options of `textgym bench`; see its `--help` for what each means."""

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    autocast: str = "auto"
    batch_size: int = 64
    prompt_tokens: int = 16
    max_new_tokens: int = 32
    repeats: int = 3
    seed: int = 0
    out: Path | None = None


DEFAULTS = BenchSettings()


def bench(
    model: Annotated[
        str | None, typer.Option(help="Folder or id of a model, or a run folder.", show_default="bundled", rich_help_panel=MODEL)
    ] = None,
    device: Device = DEFAULTS.device,
    dtype: Dtype = DEFAULTS.dtype,
    autocast: Autocast = "auto",
    batch_size: Annotated[
        int,
        typer.Option(
            help=f"Completions at a time, a multiple of {GENERATIONS}: RLOO samples so many of each prompt.", rich_help_panel=SAMPLING
        ),
    ] = DEFAULTS.batch_size,
    prompt_tokens: Annotated[
        int, typer.Option(help="Length of the prompts, which are made of random tokens.", rich_help_panel=DATA)
    ] = DEFAULTS.prompt_tokens,
    max_new_tokens: MaxNewTokens = DEFAULTS.max_new_tokens,
    repeats: Annotated[
        int, typer.Option(help="Measurements of each kind, whose median counts; one before them warms up.", rich_help_panel=RUN)
    ] = DEFAULTS.repeats,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and sampling.", rich_help_panel=SAMPLING)] = DEFAULTS.seed,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the numbers to this JSON file, replaced if it is there.", show_default="none is written", rich_help_panel=RUN
        ),
    ] = None,
) -> None:
    """Measure sampling and training on this machine: tokens and completions per second, and the environment's share.

    Sampling takes turns with transformers' generate, with a growing and with a static cache; every completion is --max-new-tokens long.
    Then whole iterations of PPO (critic head, one epoch) and of RLOO: sampling, rewards, reference, update; completions may end early, and
    the learning rate is 0, so the model stays what it is. Without options it measures the bundled model, in less than a minute.
    """
    with one_sentence_errors():
        run(BenchSettings(model, device, dtype, autocast, batch_size, prompt_tokens, max_new_tokens, repeats, seed, out))


def run(settings: BenchSettings) -> None:
    """Measures, prints, and writes the numbers."""
    from rich.console import Console

    from textgym.cli import benching
    from textgym.cli.bars import bar
    from textgym.cli.run_folder import write_json
    from textgym.cli.workplace import limit_threads, quiet_transformers

    _check(settings)
    quiet_transformers()
    policy = _load(settings)
    limit_threads(policy)
    console = Console()
    with bar(console, "Measuring", benching.measurements(settings.repeats)) as advance:
        figures = benching.measure(policy, settings, lambda: advance(1))
    print_figures(console, figures)
    if settings.out is not None:
        write_json(settings.out, figures.to_dict())


def _check(settings: BenchSettings) -> None:
    for name in ("batch_size", "prompt_tokens", "max_new_tokens", "repeats"):
        if getattr(settings, name) < 1:
            raise UserError(f"{option(name)} must be at least 1, not {getattr(settings, name)}.")
    if settings.batch_size % GENERATIONS:
        raise UserError(
            f"--batch-size must be a multiple of {GENERATIONS}, not {settings.batch_size}: RLOO samples so many of each prompt."
        )
    if settings.out is not None and not settings.out.parent.is_dir():
        raise UserError(f"--out {settings.out}: there is no folder {settings.out.parent}.")
    if settings.out is not None and not os.access(settings.out.parent, os.W_OK):
        raise UserError(f"--out {settings.out} cannot be written: Permission denied.")


def _load(settings: BenchSettings) -> "CausalLMPolicy":
    from textgym.bundled import bundled_model_path
    from textgym.cli.workplace import Precision, load_policy

    given, precision = settings.model or str(bundled_model_path()), Precision(settings.dtype, settings.autocast)
    policy = load_policy("--model", given, settings.device, precision=precision)
    limit, needed = policy.backbone.max_positions, settings.prompt_tokens + settings.max_new_tokens
    if limit is not None and needed > limit:
        raise UserError(f"--prompt-tokens and --max-new-tokens make {needed} tokens together, but the model has {limit} positions.")
    return policy


def print_figures(console: Any, figures: "Figures") -> None:
    """Prints what was measured."""
    from rich.table import Table

    where = figures.setting
    threads = f", {where['threads']} thread{'s' if where['threads'] > 1 else ''}" if where["device"] == "cpu" else ""
    table = Table(title=f"{where['parameters'] / 1e6:,.1f} M parameters on {where['device']}{threads}", show_header=False, min_width=60)
    table.add_column("")
    table.add_column("", justify="right")
    for line in figures.lines():
        table.add_row(*line)
    console.print(table)
    for name, error in figures.failed.items():
        console.print(f"{name} could not be measured: {error}", style="dim", highlight=False, soft_wrap=True)
