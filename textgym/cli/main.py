"""The `textgym` command. Options are declared here; the commands' own modules, and torch, are imported when a command runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from textgym.cli.algorithms import ALGORITHMS, SFT, Algorithm, betas, learning_rates, set_by_default
from textgym.cli.bench import bench
from textgym.cli.convert import EXAMPLES, convert
from textgym.cli.errors import EXIT_USER_ERROR, UserError, one_line, one_sentence_errors
from textgym.cli.evaluate import evaluate
from textgym.cli.label import label
from textgym.cli.options import (
    Device,
    Force,
    MaxNewTokens,
    Model,
    NumEnvs,
    NumGenerations,
    Resume,
    RewardWeight,
    Seed,
    falling_learning_rate,
    out_option,
    resume_changes,
    set_option,
)
from textgym.cli.pipeline import pipeline
from textgym.cli.plot import plot
from textgym.cli.reward import reward
from textgym.cli.settings import TrainSettings, option, parse_options, was_given
from textgym.rewards.named import reward_names

app = typer.Typer(
    name="textgym",
    help="Train language models in a text environment, and generate text with them. Everything works offline, on what ships with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # flows paragraphs; without it help keeps the line breaks of the source
)

DEFAULTS = TrainSettings("ppo")
ONLINE_OPTIONS = ("prompts", "num_envs")
OFFLINE_OPTIONS = ("preferences",)


@app.callback()
def textgym() -> None:
    """Keeps the commands' names even while there are few of them."""


@app.command()
def train(
    context: typer.Context,
    algorithm: Annotated[Algorithm, typer.Argument(help="The algorithm.")],
    model: Model = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompts to train on: .jsonl or .jsonl.gz with a column prompt; rewards get the others.", show_default="bundled"),
    ] = None,
    preferences: Annotated[
        str | None,
        typer.Option(
            help="What dpo and kto train on: .jsonl or .jsonl.gz with prompt, chosen, rejected (dpo) or prompt, completion, label (kto).",
            show_default="completions of the bundled model, labelled by its reward",
        ),
    ] = None,
    eval_prompts: Annotated[
        str | None,
        typer.Option(help="Held-out prompts, of the same form.", show_default="bundled, or a tenth of the file"),
    ] = None,
    reward: Annotated[
        list[str],
        typer.Option(
            help=f"What to maximise: a name ({', '.join(reward_names())}), with options as in 'rouge-l?stemmer=true&column=summary'; "
            "module:function or file.py:function (TRL's form); or the folder of a one-label classifier. Several are added up. "
            "dpo and kto only measure it, and with --preferences only if it is given."
        ),
    ] = list(DEFAULTS.reward),  # noqa: B006  (typer copies it)
    reward_weight: RewardWeight = None,
    true_reward: Annotated[
        str | None,
        typer.Option(help="A reward that is only measured, of the same forms.", show_default="film-review-true beside film-review"),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Folder or id of the model that KL is measured to.", show_default="the model as it is at the start")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the KL penalty, reward per nat; 0: none.", show_default=betas())] = None,
    temperature: Annotated[float, typer.Option(help="Of sampling, in training and measuring.")] = DEFAULTS.temperature,
    total_timesteps: Annotated[
        int,
        typer.Option(help="Training length in generated tokens; dpo, kto: in completion tokens, and by default n_epochs passes."),
    ] = 60_000,
    num_envs: NumEnvs = DEFAULTS.num_envs,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt, in tokens; a longer one is an error.", show_default="that of the longest prompt")
    ] = None,
    truncate_prompts: Annotated[bool, typer.Option("--truncate-prompts", help="Keep the end of prompts that are too long.")] = False,
    max_new_tokens: MaxNewTokens = DEFAULTS.max_new_tokens,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Step size of Adam; of dpo and kto at the start, it falls to 0.", show_default=learning_rates()),
    ] = None,
    set_: Annotated[
        list[str] | None,
        set_option("Any other argument of the algorithm, as clip_range=0.1; repeatable.", show_default=set_by_default()),
    ] = None,
    eval_interval: Annotated[
        int | None, typer.Option(help="Iterations between two measurements on held-out prompts.", show_default="about 20 in all")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="KL that the best model may have, nats per completion.", show_default="no bound")
    ] = None,
    seed: Seed = DEFAULTS.seed,
    device: Device = DEFAULTS.device,
    out: Annotated[Path | None, out_option("ALGORITHM")] = None,
    force: Force = False,
    resume: Resume = None,
) -> None:
    """Train a language model by reinforcement learning, and show what it learned.

    dpo and kto learn from preferences instead, without sampling. Ends with reward and KL on held-out prompts before and after, sample texts
    side by side, and a run folder with the learning curves (PNG, TensorBoard, CSV), samples, the model and a checkpoint. Without options it
    trains the bundled model, in about a minute on a CPU core. Ctrl-C saves and says how to go on.
    """
    with one_sentence_errors():
        if resume is not None:
            _resume(context, resume, algorithm)
            return
        _check_kind(context, algorithm)
        settings = TrainSettings(
            algorithm=algorithm.value,
            model=model,
            prompts=prompts,
            examples=preferences,
            eval_prompts=eval_prompts,
            reward=_measured(context, reward, model, preferences) if ALGORITHMS[algorithm].offline else tuple(reward),
            reward_weights=tuple(reward_weight) if reward_weight else None,
            true_reward=true_reward,
            reference=reference,
            beta=ALGORITHMS[algorithm].beta if beta is None else beta,
            temperature=temperature,
            total_timesteps=None if ALGORITHMS[algorithm].offline and not was_given(context, "total_timesteps") else total_timesteps,
            num_envs=num_envs,
            max_prompt_tokens=max_prompt_tokens,
            truncate_prompts=truncate_prompts,
            max_new_tokens=max_new_tokens,
            learning_rate=learning_rate,
            options={**(ALGORITHMS[algorithm].options if model is None else {}), **parse_options(set_ or [])},
            eval_interval=eval_interval,
            max_kl=max_kl,
            seed=seed,
            device=device,
        )
        from textgym.cli import train as command

        command.train(settings, out, force)


def _check_kind(context: typer.Context, algorithm: Algorithm) -> None:
    """Raises on options that belong to the other kind of algorithm."""
    offline = ALGORITHMS[algorithm].offline
    for name in ONLINE_OPTIONS if offline else OFFLINE_OPTIONS:
        if was_given(context, name):
            cure = "it samples nothing and learns from --preferences" if offline else "it learns from its own samples; give --prompts"
            raise UserError(f"{option(name)} cannot be given with {algorithm.value}: {cure}.")


def _measured(context: typer.Context, reward: list[str], model: str | None, examples: str | None) -> tuple[str, ...]:
    """The reward that is measured beside examples: what was given, else the bundled one beside bundled things."""
    return tuple(reward) if was_given(context, "reward") or (model is None and examples is None) else ()


def _resume(context: typer.Context, folder: Path, algorithm: str) -> None:
    changes = resume_changes(context, "algorithm")
    from textgym.cli import train as command

    command.resume(folder, str(algorithm), changes)


@app.command()
def sft(
    context: typer.Context,
    examples: Annotated[
        str | None,
        typer.Option(
            help="What to learn: .jsonl or .jsonl.gz with prompt and completion, or text, or messages.",
            show_default="2,000 favourable film reviews",
        ),
    ] = None,
    model: Model = None,
    eval_prompts: Annotated[
        str | None,
        typer.Option(help="Held-out prompts: .jsonl or .jsonl.gz with a column prompt.", show_default="bundled, or a tenth of the file"),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="Measured on completions of held-out prompts, not trained on; see textgym train. Several are added up.",
            show_default="film-review beside the bundled examples, else none",
        ),
    ] = None,
    reward_weight: RewardWeight = None,
    true_reward: Annotated[
        str | None,
        typer.Option(help="A second reward that is only measured, of the same forms.", show_default="film-review-true beside film-review"),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the distribution that is trained and sampled.")] = DEFAULTS.temperature,
    epochs: Annotated[int, typer.Option(help="Passes over the examples.")] = 3,
    total_timesteps: Annotated[
        int | None, typer.Option(help="Training length in completion tokens.", show_default="--epochs passes")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per optimiser step.")] = 16,
    packing: Annotated[bool, typer.Option("--packing", help="Several examples in one row of the model's input: less padding.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest sampled completion, in tokens.")] = DEFAULTS.max_new_tokens,
    learning_rate: Annotated[float | None, falling_learning_rate(ALGORITHMS[SFT].learning_rate)] = None,
    set_: Annotated[list[str] | None, set_option("Any other argument of SFT, as max_tokens=512; repeatable.")] = None,
    eval_interval: Annotated[
        int | None, typer.Option(help="Optimiser steps between two measurements on held-out examples.", show_default="about 20 in all")
    ] = None,
    seed: Seed = DEFAULTS.seed,
    device: Device = DEFAULTS.device,
    out: Annotated[Path | None, out_option("sft")] = None,
    force: Force = False,
    resume: Resume = None,
) -> None:
    """Fine-tune a language model on examples (supervised: cross-entropy on the completions), and show what it learned.

    Ends with the loss on held-out examples before and after, sample texts side by side, and a run folder as that of textgym train. Without
    options it teaches the bundled model to be kind to films, in about half a minute. Ctrl-C saves and says how to go on.
    """
    with one_sentence_errors():
        if resume is not None:
            _resume(context, resume, SFT)
            return
        settings = TrainSettings(
            algorithm=SFT,
            model=model,
            examples=examples,
            eval_prompts=eval_prompts,
            reward=_measured(context, reward or list(DEFAULTS.reward), model, examples),
            reward_weights=tuple(reward_weight) if reward_weight else None,
            true_reward=true_reward,
            beta=0.0,
            temperature=temperature,
            total_timesteps=total_timesteps,
            max_new_tokens=max_new_tokens,
            learning_rate=learning_rate,
            options={"n_epochs": epochs, "batch_size": batch_size, "packing": packing, **parse_options(set_ or [])},
            eval_interval=eval_interval,
            seed=seed,
            device=device,
        )
        from textgym.cli import train as command

        command.train(settings, out, force)


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to go on from; - reads one per line from standard input.", show_default="some bundled ones"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or id of a model, or a run folder.", show_default="bundled")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts: .jsonl or .jsonl.gz with a column prompt.")] = None,
    num_generations: NumGenerations = 1,
    max_new_tokens: MaxNewTokens = 32,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 always takes the most probable token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many most probable tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens that make up this probability; 1: from all.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same texts.", show_default="a new one each time")] = None,
    device: Device = "auto",
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object per line: prompt, completion, completion_ids, log_prob (nats), finish_reason.")
    ] = False,
) -> None:
    """Complete prompts with a language model."""
    with one_sentence_errors():
        from textgym.cli import generate as command

        settings = command.GenerateSettings(model, num_generations, max_new_tokens, temperature, top_k, top_p, seed, device, json)
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
