"""The `textgym` command. Options are declared here; the commands' own modules, and torch, are imported when a command runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from textgym.cli.algorithms import Algorithm, learning_rates
from textgym.cli.errors import EXIT_USER_ERROR, UserError, one_line, one_sentence_errors
from textgym.cli.settings import TrainSettings, option, parse_options

app = typer.Typer(
    name="textgym",
    help="Train language models in a text environment, and generate text with them. Everything works offline, on what ships with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # flows paragraphs; without it help keeps the line breaks of the source
)

DEFAULTS = TrainSettings("ppo")
RESUME_OPTIONS = ("total_timesteps", "device")  # what --resume lets one change


@app.callback()
def textgym() -> None:
    """Keeps the commands' names even while there are few of them."""


@app.command()
def train(
    context: typer.Context,
    algorithm: Annotated[Algorithm, typer.Argument(help="The algorithm.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or id of a causal language model with its tokenizer.", show_default="bundled")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompts to train on: .jsonl or .jsonl.gz with a column prompt; rewards get the others.", show_default="bundled"),
    ] = None,
    eval_prompts: Annotated[
        str | None, typer.Option(help="Held-out prompts, of the same form.", show_default="bundled, or a tenth of --prompts")
    ] = None,
    reward: Annotated[
        list[str],
        typer.Option(
            help="What to maximise: film-review (bundled), module:function or file.py:function (TRL's form), or the folder of a one-label "
            "classifier. Several are added up."
        ),
    ] = list(DEFAULTS.reward),  # noqa: B006  (typer copies it)
    reward_weight: Annotated[
        list[float] | None, typer.Option(help="Weight of each --reward, in their order.", show_default="1 each")
    ] = None,
    true_reward: Annotated[
        str | None,
        typer.Option(help="A reward that is only measured, of the same forms.", show_default="film-review-true beside film-review"),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Folder or id of the model that KL is measured to.", show_default="the model as it is at the start")
    ] = None,
    beta: Annotated[float, typer.Option(help="Weight of the KL penalty, reward per nat; 0: none.")] = DEFAULTS.beta,
    temperature: Annotated[float, typer.Option(help="Of sampling, in training and measuring.")] = DEFAULTS.temperature,
    total_timesteps: Annotated[int, typer.Option(help="Training length in generated tokens.")] = DEFAULTS.total_timesteps,
    num_envs: Annotated[int, typer.Option(help="Completions per iteration.")] = DEFAULTS.num_envs,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt, in tokens; a longer one is an error.", show_default="that of the longest prompt")
    ] = None,
    truncate_prompts: Annotated[bool, typer.Option("--truncate-prompts", help="Keep the end of prompts that are too long.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion, in tokens.")] = DEFAULTS.max_new_tokens,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Step size of Adam.", show_default=learning_rates()),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other argument of the algorithm, as clip_range=0.1; repeatable."),
    ] = None,
    eval_interval: Annotated[
        int | None, typer.Option(help="Iterations between two measurements on held-out prompts.", show_default="about 20 in all")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="KL that the best model may have, nats per completion.", show_default="no bound")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = DEFAULTS.seed,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU if there is one.")] = DEFAULTS.device,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/ALGORITHM-DATE-TIME")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that is in --out.")] = False,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the run in this folder. Its settings hold; only --total-timesteps and --device may be given."),
    ] = None,
) -> None:
    """Train a language model by reinforcement learning, and show what it learned.

    Ends with reward and KL on held-out prompts before and after, sample texts side by side, and a run folder with the learning curves
    (PNG, TensorBoard, CSV), samples, the model and a checkpoint. Without options it trains the bundled model, in about two minutes on two
    CPU cores. Ctrl-C saves and says how to go on.
    """
    with one_sentence_errors():
        if resume is not None:
            _resume(context, resume, algorithm)
            return
        settings = TrainSettings(
            algorithm=algorithm.value,
            model=model,
            prompts=prompts,
            eval_prompts=eval_prompts,
            reward=tuple(reward),
            reward_weights=tuple(reward_weight) if reward_weight else None,
            true_reward=true_reward,
            reference=reference,
            beta=beta,
            temperature=temperature,
            total_timesteps=total_timesteps,
            num_envs=num_envs,
            max_prompt_tokens=max_prompt_tokens,
            truncate_prompts=truncate_prompts,
            max_new_tokens=max_new_tokens,
            learning_rate=learning_rate,
            options=parse_options(set_ or []),
            eval_interval=eval_interval,
            max_kl=max_kl,
            seed=seed,
            device=device,
        )
        from textgym.cli import train as command

        command.train(settings, out, force)


def _resume(context: typer.Context, folder: Path, algorithm: Algorithm) -> None:
    """Goes on with a run: the options that were really given are its only changes."""
    given = {name for name in context.params if _was_given(context, name)} - {"algorithm", "resume"}
    refused = sorted(given - set(RESUME_OPTIONS))
    if refused:
        name = option(refused[0].rstrip("_"))
        raise UserError(f"{name} cannot be given with --resume: the run goes on with its own settings.")
    from textgym.cli import train as command

    command.resume(folder, algorithm.value, {name: context.params[name] for name in given})


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to go on from; - reads one per line from standard input.", show_default="some bundled ones"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or id of a model, or a run folder.", show_default="bundled")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts: .jsonl or .jsonl.gz with a column prompt.")] = None,
    num_generations: Annotated[int, typer.Option(help="Completions per prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion, in tokens.")] = 32,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 always takes the most probable token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many most probable tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens that make up this probability; 1: from all.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same texts.", show_default="a new one each time")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU if there is one.")] = "auto",
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object per line: prompt, completion, completion_ids, log_prob (nats), finish_reason.")
    ] = False,
) -> None:
    """Complete prompts with a language model."""
    with one_sentence_errors():
        from textgym.cli import generate as command

        settings = command.GenerateSettings(model, num_generations, max_new_tokens, temperature, top_k, top_p, seed, device, json)
        command.generate(settings, prompt or [], prompts)


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
