"""`textgym evaluate`: a model measured on held-out prompts, against another model or against given texts."""

import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from textgym.cli.errors import UserError, one_line, one_sentence_errors
from textgym.cli.options import DATA, MODEL, REWARDS, RUN, SAMPLING, Autocast, Device, Dtype, NumGenerations, RewardWeight
from textgym.cli.settings import TrainSettings

if TYPE_CHECKING:
    from textgym.agents import BestOfN, CausalLMPolicy
    from textgym.cli.run_folder import RunFolder
    from textgym.rewards import RewardSet

DEFAULTS = TrainSettings("ppo")


@dataclass(frozen=True)
class EvaluateSettings:
    """The options of `textgym evaluate`; see its `--help` for what each means."""

    model: str | None
    against: str | None
    references: str | None
    reward: tuple[str, ...]
    reward_weights: tuple[float, ...] | None
    true_reward: str | None
    judge: str | None
    prompts: str | None
    reference: str | None
    best_of: int
    num_generations: int
    max_new_tokens: int | None
    temperature: float | None
    seed: int
    device: str
    out: Path | None
    force: bool
    dtype: str
    autocast: str


def evaluate(
    model: Annotated[
        str | None,
        typer.Option(
            help="A: folder or id of a model, or a run folder, whose settings are then the defaults.",
            show_default="bundled",
            rich_help_panel=MODEL,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="B: another model or run folder.",
            show_default="of a run, the model it started from; with --best-of, the model",
            rich_help_panel=MODEL,
        ),
    ] = None,
    references: Annotated[
        str | None,
        typer.Option(
            help="In place of B: the column of the prompts that holds the texts to beat.",
            show_default="reference of bundled prompts",
            rich_help_panel=DATA,
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="The reward that was trained on; see textgym train. Several are added up.",
            show_default="film-review, or the run's",
            rich_help_panel=REWARDS,
        ),
    ] = None,
    reward_weight: RewardWeight = None,
    true_reward: Annotated[
        str | None,
        typer.Option(
            help="The reward that is meant, of the same forms.",
            show_default="film-review-true beside film-review, or the run's",
            rich_help_panel=REWARDS,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="module:function or file.py:function: judge(prompt, first, second) returns first, second, tie or the probability that the "
            "first is better; asked in both orders.",
            rich_help_panel=REWARDS,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Held-out prompts: .jsonl or .jsonl.gz with a column prompt; rewards get the others.",
            show_default="bundled, or the run's",
            rich_help_panel=DATA,
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Model that KL and perplexity are measured to.",
            show_default="of a run, the model it started from; else B; with --best-of, the model",
            rich_help_panel=MODEL,
        ),
    ] = None,
    best_of: Annotated[
        int, typer.Option(help="Of so many samples of A the one with the highest --reward is kept.", rich_help_panel=SAMPLING)
    ] = 1,
    num_generations: NumGenerations = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest completion, in tokens.", show_default=f"{DEFAULTS.max_new_tokens}, or the run's", rich_help_panel=SAMPLING
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of sampling, above 0.", show_default="1, or the run's", rich_help_panel=SAMPLING)
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of sampling, the same for both sides, and of the intervals.", rich_help_panel=SAMPLING)
    ] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    autocast: Autocast = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.json, report.md and samples.jsonl.", show_default="none is written", rich_help_panel=RUN),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the report that is in --out.", rich_help_panel=RUN)] = False,
) -> None:
    """Measure a model on held-out prompts: win rate, rewards, KL, perplexity, length, repetition, and whether the reward is being hacked.

    A is compared with B, another model, or with texts that come with the prompts. Intervals are 95 % bootstrap intervals over prompts; ties
    count half. Without options the bundled model is measured against the texts that its prompts were cut from.
    """
    with one_sentence_errors():
        settings = EvaluateSettings(
            model=model,
            against=against,
            references=references,
            reward=tuple(reward or ()),
            reward_weights=tuple(reward_weight) if reward_weight else None,
            true_reward=true_reward,
            judge=judge,
            prompts=prompts,
            reference=reference,
            best_of=best_of,
            num_generations=num_generations,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            device=device,
            out=out,
            force=force,
            dtype=dtype,
            autocast=autocast,
        )
        run(settings)


@dataclass(frozen=True)
class _Sides:
    """What is compared, as paths, and how.

    Attributes:
        model: A.
        against: B, or None.
        column: in place of B, or None.
        reference: what KL is measured to, or None.
        names: of A and B.
        training: the settings of the run that A is of, or those of `textgym train`, with the options given here.
    """

    model: str
    against: str | None
    column: str | None
    reference: str | None
    names: tuple[str, str]
    training: TrainSettings


def run(settings: EvaluateSettings) -> None:
    """Measures, prints, and writes the report."""
    from rich.console import Console

    from textgym.agents import compare_policies
    from textgym.cli.bars import bar
    from textgym.cli.comparison_report import print_comparison, write_comparison
    from textgym.cli.workplace import limit_threads, load_judge_option, quiet_transformers

    _check(settings)
    quiet_transformers()
    sides = _sides(settings)
    reward, true_reward = _rewards(sides.training)
    rows = _prompts(settings, sides.training)
    judge = None if settings.judge is None else load_judge_option("--judge", settings.judge)
    policies = _load(settings, sides)
    limit_threads(policies[sides.model])
    first = _best_of(policies[sides.model], reward, settings.best_of)
    against = sides.column if sides.against is None else policies[sides.against]
    console = Console()
    console.print(_announced(settings, sides, policies, len(rows)), style="dim", highlight=False, markup=False)
    with bar(console, "Sampling", len(rows) * (2 if sides.against else 1)) as on_batch:
        report = _one_sentence(
            lambda: compare_policies(
                first,
                rows,
                against,
                reward=reward,
                true_reward=true_reward,
                judge=judge,
                reference=None if sides.reference is None else policies[sides.reference],
                max_new_tokens=sides.training.max_new_tokens,
                num_generations=settings.num_generations,
                seed=settings.seed,
                names=sides.names,
                on_batch=on_batch,
            )
        )
    print_comparison(console, report)
    if settings.out is not None:
        write_comparison(settings.out, report, _circumstances(sides, settings))
        console.print(f"Report: {settings.out}", highlight=False, soft_wrap=True)


def _announced(settings: EvaluateSettings, sides: _Sides, policies: "dict[str, CausalLMPolicy]", rows: int) -> str:
    """Returns in one line what is compared with what, on what."""
    from textgym.cli.announcing import model_words, reward_words

    each = "1 completion" if settings.num_generations == 1 else f"{settings.num_generations} completions"
    other = f"the column {sides.column}" if sides.against is None else model_words(sides.names[1], policies[sides.against])
    parts = [
        f"{model_words(sides.names[0], policies[sides.model])} against {other}",
        f"{rows:,} prompts, {each} each, {sides.training.max_new_tokens} new tokens at most",
        reward_words(sides.training.reward, sides.training.reward_weights),
    ]
    return "; ".join(parts)


def _check(settings: EvaluateSettings) -> None:
    from textgym.cli.comparison_report import FILES
    from textgym.cli.workplace import check_model_paths, check_writable

    rules = (
        ("--best-of", settings.best_of >= 1, "at least 1", settings.best_of),
        ("--num-generations", settings.num_generations >= 1, "at least 1", settings.num_generations),
        ("--max-new-tokens", settings.max_new_tokens is None or settings.max_new_tokens >= 1, "at least 1", settings.max_new_tokens),
        ("--temperature", settings.temperature is None or 0 < settings.temperature < float("inf"), "above 0", settings.temperature),
    )
    for name, holds, rule, value in rules:
        if not holds:
            raise UserError(f"{name} must be {rule}, not {value}.")
    if settings.against is not None and settings.references is not None:
        raise UserError("give --against or --references, not both: A is compared with one of them.")
    there = [] if settings.out is None else [name for name in FILES if (settings.out / name).exists()]
    if there and not settings.force:
        raise UserError(f"--out {settings.out} holds a {there[0]} already: choose another folder, or replace it with --force.")
    check_model_paths({"--model": settings.model, "--against": settings.against, "--reference": settings.reference})
    check_writable(settings.out)


def _sides(settings: EvaluateSettings) -> _Sides:
    """Works out the models, the column and the names."""
    from textgym.bundled import bundled_model_path
    from textgym.cli.run_folder import RunFolder

    bundled = str(bundled_model_path())
    a_run, b_run = RunFolder.of_model(settings.model), RunFolder.of_model(settings.against)
    training = _training(settings, a_run)
    model = settings.model or bundled if a_run is None else str(a_run.model)
    start = None if a_run is None else training.reference or training.model or bundled
    against = settings.against if b_run is None else str(b_run.model)
    column = settings.references
    if against is None and column is None:
        against = start if settings.best_of == 1 or a_run is not None else model
        if against is None and training.model is None and settings.prompts is None:
            column = "reference"
    name = _name(settings.model)
    first = name if settings.best_of == 1 else f"best of {settings.best_of} of {name}"
    second = column or (_name(settings.against) if settings.against is not None else "the start of the run" if start is not None else name)
    names = (first, second) if first != second else (f"{first} (A)", f"{second} (B)")
    reference = settings.reference or start or against
    return _Sides(model, against, column, reference, names, training)


def _training(settings: EvaluateSettings, folder: "RunFolder | None") -> TrainSettings:
    """Returns the settings that prompts and rewards are loaded with: the run's where A is a run, else the defaults; given options first."""
    if folder is not None:
        base = folder.settings()
    else:  # what is bundled goes together
        known = settings.model is None and settings.prompts is None
        base = replace(DEFAULTS, model=settings.model, reward=DEFAULTS.reward if known else ())
    changes: dict[str, Any] = {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "true_reward")}
    if settings.reward:
        changes |= {"reward": settings.reward, "reward_weights": settings.reward_weights}
        if settings.true_reward is None and settings.reward != base.reward:
            base = replace(base, true_reward=None)
    elif settings.reward_weights is not None:
        raise UserError("--reward-weight belongs to --reward; give both.")
    return replace(base, **{name: value for name, value in changes.items() if value is not None})


def _rewards(training: TrainSettings) -> "tuple[RewardSet | None, RewardSet | None]":
    from textgym.cli.workplace import load_reward_option, load_rewards

    if training.reward_weights is not None and len(training.reward_weights) != len(training.reward):
        count = len(training.reward)
        raise UserError(f"--reward-weight must be given once per --reward: {count} times, not {len(training.reward_weights)}.")
    reward = load_rewards(training).trained if training.reward else None
    if training.measured_reward is None:
        return reward, None
    return reward, load_reward_option("--true-reward", training.measured_reward)


def _prompts(settings: EvaluateSettings, training: TrainSettings) -> list[dict[str, Any]]:
    from textgym.cli.workplace import load_prompts, read_prompt_rows

    if settings.prompts is not None:
        return read_prompt_rows("--prompts", settings.prompts)
    if training.prompts is not None or training.eval_prompts is not None or (training.model is None and training.examples is None):
        return load_prompts(training).held_out
    raise UserError("--prompts must be given: held-out prompts for this model, a .jsonl file with a column prompt.")


def _load(settings: EvaluateSettings, sides: _Sides) -> "dict[str, CausalLMPolicy]":
    """Loads each model once."""
    from textgym.cli.workplace import Precision, load_policy

    policies: dict[str, CausalLMPolicy] = {}
    for option, path in (("--model", sides.model), ("--against", sides.against), ("--reference", sides.reference)):
        if path is not None and path not in policies:
            precision = Precision(settings.dtype, settings.autocast)
            policies[path] = load_policy(option, path, settings.device, sides.training.temperature, precision)
    return policies


def _best_of(policy: "CausalLMPolicy", reward: "RewardSet | None", n: int) -> "CausalLMPolicy | BestOfN":
    from textgym.agents import BestOfN

    if n > 1 and reward is None:
        raise UserError("--best-of needs a --reward that says which sample is the best.")
    return policy if n == 1 else BestOfN(policy, reward, n)


def _name(given: str | None) -> str:
    return "bundled" if given is None else Path(given).name or given


def _one_sentence(measure: Any) -> Any:
    """Calls `measure`; an exception of a reward of the user's ends in one sentence that says where it was raised."""
    try:
        return measure()
    except (ValueError, OSError):
        raise
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        if not notes:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"{one_line(error)} {notes[0]}, {place.filename}, line {place.lineno}") from error


def _circumstances(sides: _Sides, settings: EvaluateSettings) -> dict[str, Any]:
    """What a report was made of and how, as JSON types."""
    training = sides.training
    return {
        "compared": {name: getattr(sides, name) for name in ("model", "against", "column", "reference")},
        "reward": list(training.reward),
        "true_reward": training.measured_reward,
        "judge": settings.judge,
        "best_of": settings.best_of,
        "temperature": training.temperature,
    }
