"""`textgym train` and `textgym sft` as they are typed: their options, and the settings that follow from them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from textgym.cli.algorithms import ALGORITHMS, SFT, Algorithm, betas, learning_rates, set_by_default
from textgym.cli.errors import UserError, one_sentence_errors
from textgym.cli.options import (
    DATA,
    LEARNING,
    MEASURING,
    MODEL,
    REWARDS,
    SAMPLING,
    Autocast,
    Device,
    Dtype,
    EvalCompletions,
    Force,
    MaxNewTokens,
    Model,
    NumEnvs,
    Resume,
    RewardWeight,
    Seed,
    learning_rate_schedule,
    out_option,
    resume_changes,
    set_option,
)
from textgym.cli.schedules import ADAPTIVE, Number, read_number
from textgym.cli.settings import TrainSettings, option, parse_options, was_given
from textgym.rewards.named import reward_names

DEFAULTS = TrainSettings("ppo")
ONLINE_OPTIONS = ("prompts", "num_envs")
OFFLINE_OPTIONS = ("preferences", "held_out")
ALGORITHM_NAMES = ", ".join(Algorithm)

HeldOut = Annotated[
    str | None,
    typer.Option(
        help="Held-out rows, of the same form as those that are trained on.",
        show_default="all rows of a tenth of the prompts, at most 64",
        rich_help_panel=MEASURING,
    ),
]
TrueReward = Annotated[
    str | None,
    typer.Option(
        help="A reward that is only measured, of the same forms.",
        show_default="film-review-true beside film-review",
        rich_help_panel=REWARDS,
    ),
]


def train(
    context: typer.Context,
    algorithm: Annotated[Algorithm, typer.Argument(help=f"{ALGORITHM_NAMES}.", metavar="ALGORITHM", show_choices=False)],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompts to train on: .jsonl or .jsonl.gz with a column prompt; rewards get the others. Needed with --model.",
            show_default="bundled",
            rich_help_panel=DATA,
        ),
    ] = None,
    preferences: Annotated[
        str | None,
        typer.Option(
            help="What dpo and kto train on: .jsonl or .jsonl.gz with prompt, chosen, rejected (dpo) or prompt, completion, label (kto).",
            show_default="completions of the bundled model, labelled by its reward",
            rich_help_panel=DATA,
        ),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest prompt, in tokens; a longer one is an error.",
            show_default="that of the longest prompt",
            rich_help_panel=DATA,
        ),
    ] = None,
    truncate_prompts: Annotated[
        bool, typer.Option("--truncate-prompts", help="Keep the end of prompts that are too long.", rich_help_panel=DATA)
    ] = False,
    reward: Annotated[
        list[str],
        typer.Option(
            help=f"What to maximise: a name ({', '.join(reward_names())}), with options as in 'rouge-l?column=summary'; "
            "module:function or file.py:function (TRL's form); or the folder of a one-label classifier. Several are added up. Needed with "
            "--model. dpo and kto only measure it, and with --preferences only if it is given.",
            rich_help_panel=REWARDS,
        ),
    ] = list(DEFAULTS.reward),  # noqa: B006  (typer copies it)
    reward_weight: RewardWeight = None,
    true_reward: TrueReward = None,
    model: Model = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Folder or id of the model that KL is measured to.", show_default="the model as it is at the start", rich_help_panel=MODEL
        ),
    ] = None,
    device: Device = DEFAULTS.device,
    dtype: Dtype = DEFAULTS.dtype,
    autocast: Autocast = "auto",
    temperature: Annotated[
        float, typer.Option(help="Of sampling, in training and measuring.", rich_help_panel=SAMPLING)
    ] = DEFAULTS.temperature,
    num_envs: NumEnvs = DEFAULTS.num_envs,
    max_new_tokens: MaxNewTokens = DEFAULTS.max_new_tokens,
    total_timesteps: Annotated[
        int,
        typer.Option(
            help="Training length in generated tokens; dpo, kto: in completion tokens, and by default n_epochs passes.",
            rich_help_panel=LEARNING,
        ),
    ] = 60_000,
    beta: Annotated[
        str | None,
        typer.Option(
            help=f"Weight of the KL penalty, reward per nat, 0: none; a schedule as linear:0.2:0; or {ADAPTIVE}, which moves it so that "
            "the KL per completion becomes TARGET nats. dpo, kto: a number.",
            show_default=betas(),
            metavar="BETA",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    learning_rate: Annotated[
        str | None, learning_rate_schedule("Step size of Adam; of dpo and kto at the start, a number falls to 0", learning_rates())
    ] = None,
    set_: Annotated[
        list[str] | None,
        set_option(
            "Any other argument of the algorithm, as clip_range=0.1; repeatable. --set help lists them.", show_default=set_by_default()
        ),
    ] = None,
    eval_prompts: Annotated[
        str | None,
        typer.Option(help="Held-out prompts, of the same form.", show_default="bundled, or a tenth of the file", rich_help_panel=MEASURING),
    ] = None,
    held_out: HeldOut = None,
    eval_completions: EvalCompletions = None,
    eval_interval: Annotated[
        int | None,
        typer.Option(
            help="Iterations between two measurements on held-out prompts.", show_default="about 20 in all", rich_help_panel=MEASURING
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="KL that the best model may have, nats per completion.", show_default="no bound", rich_help_panel=MEASURING),
    ] = None,
    seed: Seed = DEFAULTS.seed,
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
        if _did_something_else(context, algorithm.value, set_, resume):
            return
        _check_kind(context, algorithm)
        offline = ALGORITHMS[algorithm].offline
        settings = TrainSettings(
            algorithm=algorithm.value,
            model=model,
            prompts=prompts,
            examples=preferences,
            held_out=held_out,
            eval_prompts=eval_prompts,
            reward=_measured(context, reward, model, preferences) if offline else _maximised(context, reward, model),
            reward_weights=tuple(reward_weight) if reward_weight else None,
            true_reward=true_reward,
            reference=reference,
            beta=_given_number("--beta", beta, ALGORITHMS[algorithm].beta, adaptive=True),
            temperature=temperature,
            total_timesteps=None if offline and not was_given(context, "total_timesteps") else total_timesteps,
            num_envs=num_envs,
            max_prompt_tokens=max_prompt_tokens,
            truncate_prompts=truncate_prompts,
            max_new_tokens=max_new_tokens,
            learning_rate=read_number("--learning-rate", learning_rate),
            options={**(ALGORITHMS[algorithm].options if model is None else {}), **parse_options(set_ or [])},
            eval_interval=eval_interval,
            eval_completions=eval_completions,
            max_kl=max_kl,
            seed=seed,
            device=device,
            dtype=dtype,
            autocast=autocast,
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


def _maximised(context: typer.Context, reward: list[str], model: str | None) -> tuple[str, ...]:
    """The reward that is trained on: what was given, else the bundled one with the bundled model, else none, which is an error later."""
    return tuple(reward) if was_given(context, "reward") or model is None else ()


def _given_number(name: str, text: str | None, default: float, *, adaptive: bool = False) -> Number:
    found = read_number(name, text, adaptive=adaptive)
    return default if found is None else found


def _did_something_else(context: typer.Context, algorithm: str, given: list[str] | None, resume: Path | None) -> bool:
    """Lists what `--set` can name, or goes on with an earlier run, if that was asked for."""
    if given == ["help"]:
        from textgym.cli.arguments import print_arguments

        print_arguments(algorithm)
        return True
    if resume is not None:
        changes = resume_changes(context, "algorithm")
        from textgym.cli import train as command

        command.resume(resume, algorithm, changes)
        return True
    return False


def sft(
    context: typer.Context,
    examples: Annotated[
        str | None,
        typer.Option(
            help="What to learn: .jsonl or .jsonl.gz with prompt and completion, or text, or messages.",
            show_default="2,000 favourable film reviews",
            rich_help_panel=DATA,
        ),
    ] = None,
    model: Model = None,
    device: Device = DEFAULTS.device,
    dtype: Dtype = DEFAULTS.dtype,
    autocast: Autocast = "auto",
    temperature: Annotated[
        float, typer.Option(help="Of the distribution that is trained and sampled.", rich_help_panel=SAMPLING)
    ] = DEFAULTS.temperature,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest sampled completion, in tokens.", rich_help_panel=SAMPLING)
    ] = DEFAULTS.max_new_tokens,
    epochs: Annotated[int, typer.Option(help="Passes over the examples.", rich_help_panel=LEARNING)] = 3,
    total_timesteps: Annotated[
        int | None,
        typer.Option(help="Training length in completion tokens.", show_default="--epochs passes", rich_help_panel=LEARNING),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per optimiser step.", rich_help_panel=LEARNING)] = 16,
    packing: Annotated[
        bool,
        typer.Option("--packing", help="Several examples in one row of the model's input: less padding.", rich_help_panel=LEARNING),
    ] = False,
    learning_rate: Annotated[
        str | None,
        learning_rate_schedule(
            "Step size of Adam at the start, a number falls to 0", f"bundled model: {ALGORITHMS[SFT].learning_rate:g}; any other: 1e-05"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, set_option("Any other argument of SFT, as max_tokens=512; repeatable. --set help lists them.")
    ] = None,
    eval_prompts: Annotated[
        str | None,
        typer.Option(
            help="Held-out prompts to sample from: .jsonl or .jsonl.gz with a column prompt.",
            show_default="bundled, or those of the held-out examples",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    held_out: HeldOut = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="Measured on completions of held-out prompts, not trained on; see textgym train. Several are added up.",
            show_default="film-review beside the bundled examples, else none",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    reward_weight: RewardWeight = None,
    true_reward: TrueReward = None,
    eval_completions: EvalCompletions = None,
    eval_interval: Annotated[
        int | None,
        typer.Option(
            help="Optimiser steps between two measurements on held-out examples.",
            show_default="about 20 in all",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    seed: Seed = DEFAULTS.seed,
    out: Annotated[Path | None, out_option("sft")] = None,
    force: Force = False,
    resume: Resume = None,
) -> None:
    """Fine-tune a language model on examples (supervised: cross-entropy on the completions), and show what it learned.

    Ends with the loss on held-out examples before and after, sample texts side by side, and a run folder as that of textgym train. Without
    options it teaches the bundled model to be kind to films, in about half a minute. Ctrl-C saves and says how to go on.
    """
    with one_sentence_errors():
        if _did_something_else(context, SFT, set_, resume):
            return
        given: dict[str, Any] = {"n_epochs": epochs, "batch_size": batch_size, "packing": packing, **parse_options(set_ or [])}
        settings = TrainSettings(
            algorithm=SFT,
            model=model,
            examples=examples,
            held_out=held_out,
            eval_prompts=eval_prompts,
            reward=_measured(context, reward or list(DEFAULTS.reward), model, examples),
            reward_weights=tuple(reward_weight) if reward_weight else None,
            true_reward=true_reward,
            beta=0.0,
            temperature=temperature,
            total_timesteps=total_timesteps,
            max_new_tokens=max_new_tokens,
            learning_rate=read_number("--learning-rate", learning_rate),
            options=given,
            eval_interval=eval_interval,
            eval_completions=eval_completions,
            seed=seed,
            device=device,
            dtype=dtype,
            autocast=autocast,
        )
        from textgym.cli import train as command

        command.train(settings, out, force)
