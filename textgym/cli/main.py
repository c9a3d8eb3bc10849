"""The `textgym` command. Options are declared beside their commands; the commands' own work, and torch, are imported when one runs."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from textgym.cli.bench import bench
from textgym.cli.convert import EXAMPLES, convert
from textgym.cli.errors import EXIT_USER_ERROR, one_line, one_sentence_errors
from textgym.cli.evaluate import evaluate
from textgym.cli.label import label
from textgym.cli.options import DATA, MODEL, RUN, SAMPLING, Autocast, Device, Dtype, MaxNewTokens, NumGenerations
from textgym.cli.pipeline import pipeline
from textgym.cli.plot import plot
from textgym.cli.reward import reward
from textgym.cli.train_commands import sft, train

app = typer.Typer(
    name="textgym",
    help="Train language models in a text environment, and generate text with them. Everything works offline, on what ships with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # flows paragraphs; without it help keeps the line breaks of the source
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"textgym {version('textgym')}")
        except PackageNotFoundError:  # a bare checkout
            print("textgym, not installed: its version is unknown")
        raise typer.Exit


@app.callback()
def textgym(
    shown: Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Train language models in a text environment, and generate text with them. Everything works offline, on what ships with it."""


app.command()(train)
app.command()(sft)


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to go on from; - reads one per line from standard input.", show_default="some bundled ones"),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts: .jsonl or .jsonl.gz with a column prompt.", rich_help_panel=DATA)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or id of a model, or a run folder.", show_default="bundled", rich_help_panel=MODEL)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    autocast: Autocast = "auto",
    num_generations: NumGenerations = 1,
    max_new_tokens: MaxNewTokens = 32,
    temperature: Annotated[
        float, typer.Option(help="Of sampling; 0 always takes the most probable token.", rich_help_panel=SAMPLING)
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many most probable tokens; 0: from all.", rich_help_panel=SAMPLING)] = 0,
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the most probable tokens that make up this probability; 1: from all.", rich_help_panel=SAMPLING),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="The same seed gives the same texts.", show_default="a new one each time", rich_help_panel=SAMPLING),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="One JSON object per line: prompt, completion, completion_ids, log_prob (nats), finish_reason.",
            rich_help_panel=RUN,
        ),
    ] = False,
) -> None:
    """Complete prompts with a language model."""
    with one_sentence_errors():
        from textgym.cli import generate as command

        settings = command.GenerateSettings(
            model, num_generations, max_new_tokens, temperature, top_k, top_p, seed, device, json, dtype, autocast
        )
        command.generate(settings, prompt or [], prompts)


app.command()(pipeline)
app.command()(evaluate)
app.command()(plot)
app.command()(label)
app.command(epilog=EXAMPLES)(convert)
app.command()(reward)
app.command()(bench)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; an option that cannot be read ends in one sentence too."""
    try:
        code = app(args=arguments, prog_name="textgym", standalone_mode=False)
    except Exception as error:
        message = getattr(error, "format_message", None)  # typer's own errors, whichever version's
        if message is None:
            raise
        print(f"textgym: {one_line(message())}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
