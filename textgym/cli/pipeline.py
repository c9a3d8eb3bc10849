"""`textgym pipeline`: from demonstrations and comparisons to a reward model and a policy, in one round or in many."""

import json
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.cli.algorithms import ALGORITHMS, OnlineAlgorithm, agent_class, betas, learning_rates
from textgym.cli.errors import EXIT_INTERRUPTED, EXIT_WAITING, UserError, one_line, one_sentence_errors
from textgym.cli.feedback_files import FeedbackReading
from textgym.cli.options import Device, MaxNewTokens, Model, NumEnvs, Seed, out_option, set_option
from textgym.cli.run_folder import RunFolder, new_path, write_json
from textgym.cli.settings import TrainSettings, option, parse_options, was_given
from textgym.errors import FeedbackNeeded

if TYPE_CHECKING:
    from rich.console import Console

    from textgym.agents.rlhf import RLHF

DEFAULTS = TrainSettings("rloo")
BY_HAND = "by-hand"
GOLD = "film-review-true"
BUNDLED_TEMPERATURE = 0.25  # the bundled gold reward lies between about -2 and 1
BUNDLED_REWARD_MODEL = {"learning_rate": 1e-3, "n_epochs": 2}
BUNDLED_SFT = {"learning_rate": 1e-4}
TRUE = "annotator"  # the annotator's own reward, which is only measured
GENERATIONS = 4  # completions of each held-out prompt in the report
CHECKPOINT_INTERVAL = 20_000  # timesteps
CONFIG = "config.json"
RESERVED = ("policy", "env", "reference", "learning_rate", "beta", "evaluation", "seed", "device", "tensorboard_log")
REWARD_MODEL_RESERVED = ("reward_model", "feedback", "evaluation", "seed", "device", "tensorboard_log")


@dataclass(frozen=True)
class PipelineSettings:
    """The options of `textgym pipeline`; see its `--help` for what each means. None stands for what ships, or for "none"."""

    algorithm: str
    model: str | None = None
    prompts: str | None = None
    eval_prompts: str | None = None
    demonstrations: str | None = None
    feedback: str | None = None
    annotator: str | None = None
    annotator_temperature: float = 1.0
    rounds: int = 1
    pairs: int = 2_000
    beta: float = 0.2
    learning_rate: float | None = None
    total_timesteps: int = 60_000
    num_envs: int = 64
    max_new_tokens: int = 24
    seed: int = 0
    device: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    reward_model_options: dict[str, Any] = field(default_factory=dict)

    @property
    def training(self) -> TrainSettings:
        """The same as settings of `textgym train`, for what both load."""
        return TrainSettings(
            self.algorithm,
            model=self.model,
            prompts=self.prompts,
            eval_prompts=self.eval_prompts,
            beta=self.beta,
            learning_rate=self.learning_rate,
            num_envs=self.num_envs,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            device=self.device,
        )


def pipeline(
    context: typer.Context,
    algorithm: Annotated[
        OnlineAlgorithm, typer.Option(help=f"{', '.join(OnlineAlgorithm)}.", metavar="ALGORITHM", show_choices=False)
    ] = OnlineAlgorithm.RLOO,
    model: Model = None,
    prompts: Annotated[str | None, typer.Option(help="Prompts: .jsonl or .jsonl.gz with a column prompt.", show_default="bundled")] = None,
    eval_prompts: Annotated[
        str | None, typer.Option(help="Held-out prompts for the report.", show_default="bundled, or a tenth of the file")
    ] = None,
    demonstrations: Annotated[
        str | None,
        typer.Option(
            help="What SFT imitates first: .jsonl with prompt and completion.",
            show_default="the texts that the bundled prompts were cut from; none with --model",
        ),
    ] = None,
    feedback: Annotated[
        str | None, typer.Option(help="Comparisons that are there already (see docs/feedback.md); the first round then asks nobody.")
    ] = None,
    annotator: Annotated[
        str | None,
        typer.Option(
            help=f"Who compares: a reward (its better completion wins, with probability σ(difference / temperature)), or {BY_HAND}: the "
            "command stops, you label the pairs with textgym label, and --resume goes on.",
            show_default=f"{GOLD}; {BY_HAND} with --model",
        ),
    ] = None,
    annotator_temperature: Annotated[
        float | None, typer.Option(help="Of the annotator, in reward; 0: never wrong.", show_default=f"1; {BUNDLED_TEMPERATURE} bundled")
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often to ask, fit and improve: 1 is the pipeline, more the loop.")] = 1,
    pairs: Annotated[int, typer.Option(help="Pairs to compare in each round.")] = 2_000,
    beta: Annotated[
        float | None, typer.Option(help="Weight of the KL penalty, reward per nat.", show_default=betas(OnlineAlgorithm))
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the algorithm.", show_default=learning_rates(OnlineAlgorithm))] = None,
    total_timesteps: Annotated[int, typer.Option(help="Generated tokens of the algorithm in each round.")] = 60_000,
    num_envs: NumEnvs = DEFAULTS.num_envs,
    max_new_tokens: MaxNewTokens = DEFAULTS.max_new_tokens,
    set_: Annotated[list[str] | None, set_option("Any other argument of the algorithm; repeatable.")] = None,
    set_reward_model: Annotated[
        list[str] | None,
        typer.Option(
            "--set-reward-model",
            metavar="NAME=VALUE",
            help="Any argument of RewardModelTrainer; repeatable. max_tokens=N leaves out comparisons, and prompts with --max-new-tokens, "
            "that are longer.",
        ),
    ] = None,
    seed: Seed = DEFAULTS.seed,
    device: Device = DEFAULTS.device,
    out: Annotated[Path | None, out_option("pipeline")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder: its settings hold, but for --rounds if it is given.")
    ] = None,
) -> None:
    """Learn from feedback, from beginning to end: SFT, comparisons, a reward model, reinforcement learning, a report.

    With --rounds the last three are repeated: what the policy has come to write is compared, the reward model learns from all comparisons,
    training goes on. Where somebody has to compare, the command says what to do and ends with exit code 75. Ends with a comparison against
    the model before training on held-out prompts. Without options everything is bundled.
    """
    with one_sentence_errors():
        if resume is not None:
            given = [name for name in context.params if name not in ("resume", "rounds") and was_given(context, name)]
            if given:
                raise UserError(f"--resume: the run's own settings hold; only --rounds can be given with it, not {option(given[0])}.")
            run(_resumed(resume, rounds if was_given(context, "rounds") else None), resume)
            return
        bundled = model is None
        settings = PipelineSettings(
            algorithm=algorithm.value,
            model=model,
            prompts=prompts,
            eval_prompts=eval_prompts,
            demonstrations=demonstrations,
            feedback=feedback,
            annotator=annotator or (GOLD if bundled else BY_HAND),
            annotator_temperature=annotator_temperature
            if annotator_temperature is not None
            else (BUNDLED_TEMPERATURE if annotator in (None, GOLD) else 1.0),
            rounds=rounds,
            pairs=pairs,
            beta=ALGORITHMS[algorithm].beta if beta is None else beta,
            learning_rate=learning_rate,
            total_timesteps=total_timesteps,
            num_envs=num_envs,
            max_new_tokens=max_new_tokens,
            seed=seed,
            device=device,
            options={**(ALGORITHMS[algorithm].options if bundled else {}), **parse_options(set_ or [])},
            reward_model_options={**(BUNDLED_REWARD_MODEL if bundled else {}), **parse_options(set_reward_model or [])},
        )
        _check(settings)
        folder = out or new_path(Path("runs"), "pipeline")
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--out {folder} exists and is not empty: choose another folder, or go on with its run: --resume {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        run(_with_absolute_paths(settings), folder)


def _check(settings: PipelineSettings) -> None:
    for name in ("rounds", "pairs", "total_timesteps", "num_envs", "max_new_tokens"):
        if getattr(settings, name) < 1:
            raise UserError(f"{option(name)} must be at least 1, not {getattr(settings, name)}.")
    if not 0 <= settings.annotator_temperature < float("inf"):
        raise UserError(f"--annotator-temperature must be 0 or above, not {settings.annotator_temperature}.")
    from textgym.agents import RewardModelTrainer
    from textgym.cli.arguments import check_options

    check_options(settings.options, agent_class(settings.algorithm), RESERVED)
    check_options(settings.reward_model_options, RewardModelTrainer, REWARD_MODEL_RESERVED, "--set-reward-model")
    if settings.model is not None and settings.prompts is None:
        raise UserError("--prompts must be given with --model: the bundled prompts were made for the bundled model.")


def _with_absolute_paths(settings: PipelineSettings) -> PipelineSettings:
    """A run can be resumed from another folder."""
    names = ("model", "prompts", "eval_prompts", "demonstrations", "feedback")
    paths = {name: path for name in names if (path := getattr(settings, name)) is not None and Path(path).exists()}
    absolute: dict[str, Any] = {name: str(Path(path).resolve()) for name, path in paths.items()}
    return replace(settings, **absolute)


def _resumed(folder: Path, rounds: int | None) -> PipelineSettings:
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        settings = PipelineSettings(**document["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume {folder}: there is no run of textgym pipeline ({one_line(error)}).") from error
    return settings if rounds is None else replace(settings, rounds=rounds)


def run(settings: PipelineSettings, folder: Path) -> None:
    """Runs the rounds that are not done yet, and reports."""
    from rich.console import Console

    from textgym.cli.interrupts import BetweenIterations, StopRequest, TrainingStopped
    from textgym.cli.warned import said_warnings
    from textgym.cli.workplace import limit_threads, quiet_transformers

    write_json(folder / CONFIG, {"settings": asdict(settings)})
    quiet_transformers()
    console = Console()
    rlhf, held_out = _make(settings, folder)
    limit_threads(rlhf.start)
    if len(rlhf.rounds) >= settings.rounds:
        done = f"{len(rlhf.rounds)} round{'s are' if len(rlhf.rounds) > 1 else ' is'} done"
        raise UserError(f"--resume {folder}: its {done}; to go on, give more --rounds.")
    try:
        with StopRequest() as request, said_warnings(), closing(RunFolder(folder).logger()) as rlhf.logger:
            between = BetweenIterations(request, rlhf.save, CHECKPOINT_INTERVAL)
            rlhf.run(settings.rounds, callback=[between], progress_bar=True, announce=lambda text: console.print(text, style="dim"))
    except FeedbackNeeded as needed:
        console.print(f"{needed}\nThen go on with:\n  textgym pipeline --resume {folder}", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_WAITING) from None
    except (KeyboardInterrupt, TrainingStopped):
        if rlhf.agent is not None and rlhf.agent.num_timesteps:
            rlhf.save()
        console.print(f"Stopped. Go on with:\n  textgym pipeline --resume {folder}", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        plot_progress(folder, f"{settings.algorithm.upper()} in {settings.rounds} round{'s' if settings.rounds > 1 else ''}")
    _finish(rlhf, held_out, settings, console)


def plot_progress(path: Path, title: str) -> None:
    """Draws the learning curves of a run folder, as far as there are some."""
    from textgym.cli.plots import plot_curves

    folder = RunFolder(path)
    plot_curves(folder.read_metrics(), folder.curves, title)


def _make(settings: PipelineSettings, folder: Path) -> "tuple[RLHF, list[dict[str, Any]]]":
    """Returns the loop and the held-out prompts."""
    from textgym.agents.rlhf import RLHF
    from textgym.cli.workplace import load_policy, load_prompts

    training = settings.training
    sides = load_prompts(training)
    prompts, held_out = sides.train, sides.held_out
    policy = load_policy("--model", settings.model or str(bundled_model_path()), settings.device)
    demonstrations: Any = settings.demonstrations
    if demonstrations is None and settings.model is None:
        demonstrations = [{"prompt": row["prompt"], "completion": row["reference"]} for row in bundled_prompts("train")]
    max_tokens = settings.reward_model_options.get("max_tokens")
    held_out = _readable("--eval-prompts" if settings.eval_prompts else "--prompts, its held-out part", held_out, policy, settings)
    rlhf = RLHF(
        policy,
        prompts,
        _annotator(settings, policy.tokenizer),
        folder,
        demonstrations=demonstrations,
        feedback=None if settings.feedback is None else FeedbackReading().read("--feedback", settings.feedback),
        algorithm=ALGORITHMS[settings.algorithm].class_name,
        num_pairs=settings.pairs,
        timesteps_per_round=settings.total_timesteps,
        max_new_tokens=settings.max_new_tokens,
        num_envs=settings.num_envs,
        agent_options={"learning_rate": training.step_size, "beta": settings.beta, **settings.options},
        reward_model_options=settings.reward_model_options,
        sft_options=BUNDLED_SFT if settings.model is None else None,
        seed=settings.seed,
    )
    if rlhf.num_left_out:
        print(f"Left out: {rlhf.num_left_out:,} of {len(prompts):,} prompts, with their completions longer than max_tokens={max_tokens}")
    rlhf.agent_options["evaluation"] = _evaluation(rlhf, held_out, settings)
    return rlhf, held_out


def _readable(name: str, prompts: list[dict[str, Any]], policy: Any, settings: PipelineSettings) -> list[dict[str, Any]]:
    """Returns the held-out prompts that the reward model can read with their completions; how many it cannot is said."""
    from textgym.agents.common.rlhf_steps import readable_prompts
    from textgym.agents.common.scored_completions import PromptRows

    max_tokens = settings.reward_model_options.get("max_tokens")
    try:
        kept, left_out = readable_prompts(PromptRows.read(prompts), policy, settings.max_new_tokens, max_tokens)
    except ValueError as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    if not left_out:
        return prompts
    print(f"Left out: {left_out:,} of {len(prompts):,} held-out prompts, with their completions longer than max_tokens={max_tokens}")
    return kept.as_rows()


def _evaluation(rlhf: "RLHF", held_out: list[dict[str, Any]], settings: PipelineSettings) -> Any:
    """Measures the latest reward, and the annotator's where there is one, on held-out prompts during training."""
    import gymnasium

    from textgym.cli.measuring import MeasuredEvaluation
    from textgym.cli.workplace import MAX_EVALUATION_ROWS
    from textgym.rewards import RewardSet

    gold = getattr(rlhf.annotator, "reward", None)
    names = ["reward_model", *([] if gold is None else [TRUE])]
    envs = gymnasium.make_vec(
        "textgym:TextGen-v0",
        num_envs=min(len(held_out), MAX_EVALUATION_ROWS),
        prompts=held_out,
        tokenizer=rlhf.start.tokenizer,
        reward=RewardSet.build([rlhf.reward, *([] if gold is None else [gold])], [1.0, 0.0][: len(names)], names),
        max_new_tokens=settings.max_new_tokens,
        eos_token_ids=rlhf.start.eos_token_ids,
    )
    interval = replace(settings.training, total_timesteps=settings.total_timesteps).evaluation_interval
    return MeasuredEvaluation(envs, None if gold is None else TRUE, interval, None, None)


def _annotator(settings: PipelineSettings, tokenizer: Any) -> Any:
    """Returns who compares; None for somebody outside. Rewards that read tokens get those of `tokenizer`."""
    if settings.annotator in (None, BY_HAND):
        return None
    from textgym.cli.workplace import load_reward_option
    from textgym.feedback import SyntheticAnnotator

    reward = load_reward_option("--annotator", settings.annotator)
    return SyntheticAnnotator(reward, tokenizer=tokenizer, temperature=settings.annotator_temperature, seed=settings.seed)


def _finish(rlhf: "RLHF", held_out: list[dict[str, Any]], settings: PipelineSettings, console: "Console") -> None:
    """Compares the policy with the reference on held-out prompts, prints and writes it."""
    from textgym.agents import compare_policies
    from textgym.cli.bars import bar
    from textgym.cli.comparison_report import print_comparison, write_comparison
    from textgym.cli.report import print_rounds

    assert rlhf.agent is not None
    rlhf.policy.save_pretrained(rlhf.folder / "model")
    gold = getattr(rlhf.annotator, "reward", None)
    with bar(console, "comparing with before", 2 * len(held_out)) as advance:
        report = compare_policies(
            rlhf.policy,
            held_out,
            rlhf.agent.reference,
            reward=rlhf.reward,
            true_reward=gold,
            reference=rlhf.agent.reference,
            max_new_tokens=settings.max_new_tokens,
            num_generations=GENERATIONS,
            seed=settings.seed,
            names=("after", "before"),
            on_batch=advance,
        )
    print_rounds(rlhf.rounds, console)
    print_comparison(console, report)
    further = {"rounds": [asdict(one) for one in rlhf.rounds], "left_out_prompts": rlhf.num_left_out}
    write_comparison(rlhf.folder, report, further)
    console.print(f"Run folder: {rlhf.folder}", style="bold", highlight=False, soft_wrap=True)
