"""`textgym reward`: a reward model out of feedback."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from textgym.cli.algorithms import OTHER_LEARNING_RATE, REWARD
from textgym.cli.errors import UserError, one_sentence_errors
from textgym.cli.feedback_files import parse_renames
from textgym.cli.options import Device, Force, Resume, Seed, falling_learning_rate, out_option, resume_changes, set_option
from textgym.cli.settings import option, parse_options

BUNDLED_LEARNING_RATE, BUNDLED_EPOCHS = 1e-3, 3


@dataclass(frozen=True)
class RewardSettings:
    """The options of `textgym reward`, which are also the run folder's `config.json`; see its `--help` for what each means.

    `feedback` None stands for what is made of the bundled model, `model` None for that model; `total_timesteps` None for `--epochs` passes,
    until the feedback is counted.
    """

    algorithm: str = REWARD
    feedback: tuple[str, ...] | None = None
    held_out: str | None = None
    form: str | None = None
    rename: dict[str, str] | None = None
    keep_good: bool = False
    positive: str | None = None
    model: str | None = None
    per_token: bool = False
    normalise: bool = True
    reference_texts: str | None = None
    epochs: int | None = None
    total_timesteps: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    eval_interval: int | None = None
    patience: int | None = None
    seed: int = 0
    device: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def step_size(self) -> float:
        """The learning rate: as given, else one that suits the bundled model (which is tiny), else one that suits others."""
        if self.learning_rate is not None:
            return self.learning_rate
        return BUNDLED_LEARNING_RATE if self.model is None else OTHER_LEARNING_RATE

    @property
    def passes(self) -> int:
        """Passes over the feedback: as given, else some for the bundled model and one for others."""
        return self.epochs or (BUNDLED_EPOCHS if self.model is None else 1)

    @property
    def training_length(self) -> int:
        """Timesteps to train for; counted by the time that training begins."""
        if self.total_timesteps is None:
            raise RuntimeError("The passes over the feedback have not been counted yet; this is a bug of the command line.")
        return self.total_timesteps

    def checked(self) -> Self:
        """Returns itself if the values can be right.

        Raises:
            UserError: a value is out of its range, or belongs to another one that was not given.
        """
        for name in ("epochs", "total_timesteps", "batch_size", "eval_interval", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{option(name)} must be at least 1, not {value}.")
        if self.learning_rate is not None and not 0 <= self.learning_rate < float("inf"):
            raise UserError(f"--learning-rate must be a number, 0 or above, not {self.learning_rate}.")
        if self.feedback is None and self.model is not None:
            raise UserError("--feedback must be given with --model: what is used without it was made of the bundled model's texts.")
        for name in ("held_out", "form", "rename", "positive", "keep_good"):
            if self.feedback is None and getattr(self, name):
                raise UserError(f"{option(name)} must be given with --feedback.")
        if self.reference_texts is not None and not self.normalise:
            raise UserError("--reference-texts cannot be given with --no-normalise: they are what the reward is normalised on.")
        return self

    def with_absolute_paths(self) -> Self:
        """Returns a copy in which paths that exist are absolute, so that a run can be resumed from elsewhere."""
        names = ("held_out", "model", "reference_texts")
        given = {name: getattr(self, name) for name in names}
        absolute: dict[str, Any] = {name: str(Path(path).resolve()) for name, path in given.items() if path and Path(path).exists()}
        files = None if self.feedback is None else tuple(str(Path(path).resolve()) for path in self.feedback)
        return replace(self, feedback=files, **absolute)

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Reads what `to_json` wrote."""
        files = document["feedback"]
        return cls(**{**document, "feedback": None if files is None else tuple(files)})


DEFAULTS = RewardSettings()


def reward(
    context: typer.Context,
    feedback: Annotated[
        list[str] | None,
        typer.Option(
            help="What to learn from: .jsonl or .jsonl.gz of pairs, rankings, judgements, labels, segments or spans (docs/feedback.md); "
            "repeatable.",
            show_default="2,000 pairs of the bundled model's texts, compared by a noisy annotator",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="Feedback to measure on, of the same forms.", show_default="a tenth of the prompts, at most 500 records"),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="The form that all rows have, where their columns fit several: comparison, ranking, judgements, label, ..."),
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="A column that is called otherwise; repeatable.", show_default=False)
    ] = None,
    keep_good: Annotated[bool, typer.Option("--keep-good", help="Leave out rows that are no feedback, instead of stopping.")] = False,
    positive: Annotated[str | None, typer.Option(help="Of labels that are names of classes, the one that means good.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="What to start from: folder or id of a causal language model, or of a one-label classifier.", show_default="bundled"
        ),
    ] = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="A score for every token, whose sum is the reward; what segments need.")
    ] = False,
    normalise: Annotated[
        bool, typer.Option("--normalise/--no-normalise", help="Shift the reward to mean 0 when training is done.")
    ] = DEFAULTS.normalise,
    reference_texts: Annotated[
        str | None,
        typer.Option(
            help="What the mean is taken over: .jsonl with prompt and completion, best samples of the model that RL will start from, as "
            "textgym generate --json writes them. Of more than 2,000 texts so many are drawn.",
            show_default="the feedback's own texts",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the feedback.", show_default=f"bundled model: {BUNDLED_EPOCHS}; any other: 1"),
    ] = None,
    total_timesteps: Annotated[
        int | None, typer.Option(help="Training length in tokens of texts that are read.", show_default="--epochs passes")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Records per optimiser step; a ranking is one.")] = DEFAULTS.batch_size,
    learning_rate: Annotated[float | None, falling_learning_rate(BUNDLED_LEARNING_RATE)] = None,
    set_: Annotated[
        list[str] | None,
        set_option("Any other argument of RewardModelTrainer, as center_coef=0.01, ranking_loss=pairwise, max_tokens=512; repeatable."),
    ] = None,
    eval_interval: Annotated[
        int | None, typer.Option(help="Optimiser steps between two measurements of the held-out loss.", show_default="about 20 in all")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop when the held-out loss was not the lowest so many measurements in a row.", show_default="never"),
    ] = None,
    seed: Seed = DEFAULTS.seed,
    device: Device = DEFAULTS.device,
    out: Annotated[Path | None, out_option("reward")] = None,
    force: Force = False,
    resume: Resume = None,
) -> None:
    """Train a reward model on feedback, and show what it is worth on feedback that it has not seen.

    Ends with accuracy, log loss and calibration on held-out feedback before and after, beside what the lengths of the texts alone would
    say, and a run folder with the learning curves, the reliability plot, the report and the model, a transformers classifier that
    textgym train takes as --reward. What is left out, such as rows longer than --set max_tokens=N, is counted. Without options it learns a
    reward of film reviews, in about a minute. Ctrl-C saves and says how to go on.
    """
    with one_sentence_errors():
        if resume is not None:
            changes = resume_changes(context)
            from textgym.cli import reward_run

            reward_run.resume(resume, changes)
            return
        settings = RewardSettings(
            feedback=tuple(feedback) if feedback else None,
            held_out=held_out,
            form=form,
            rename=parse_renames(rename) if rename else None,
            keep_good=keep_good,
            positive=positive,
            model=model,
            per_token=per_token,
            normalise=normalise,
            reference_texts=reference_texts,
            epochs=epochs,
            total_timesteps=total_timesteps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            eval_interval=eval_interval,
            patience=patience,
            seed=seed,
            device=device,
            options=parse_options(set_ or []),
        )
        from textgym.cli import reward_run

        reward_run.start(settings.checked().with_absolute_paths(), out, force)
