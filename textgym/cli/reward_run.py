"""What `textgym reward` does: read feedback, train a reward model, report and normalise it, and write everything into a run folder."""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import typer
from stable_baselines3.common.utils import LinearSchedule

from textgym.agents.common.feedback_sets import FeedbackSet
from textgym.agents.common.held_out import HeldOut
from textgym.agents.reward_model import RewardModel
from textgym.agents.reward_model_trainer import RewardModelTrainer
from textgym.bundled import bundled_model_path
from textgym.cli.algorithms import REWARD
from textgym.cli.arguments import check_options
from textgym.cli.errors import EXIT_INTERRUPTED, UserError, fail, one_line
from textgym.cli.plots import REWARD_MODEL_PANELS, plot_curves, plot_reliability
from textgym.cli.reward import RewardSettings
from textgym.cli.reward_feedback import (
    NormalisationTexts,
    Records,
    counts,
    counts_in_words,
    load_feedback,
    normalisation_texts,
    read_held_out,
)
from textgym.cli.reward_report import PER_TOKEN_FILE, category_table, next_commands, numbers_table, write_per_token_rewards
from textgym.cli.run_folder import RunFolder, write_json
from textgym.cli.training import Training
from textgym.cli.warned import said_warnings
from textgym.cli.workplace import check_device, quiet_transformers, unknown_options
from textgym.evaluation import RewardModelReport
from textgym.feedback import Marking

EVALUATIONS = 20
_RESERVED = (
    *("reward_model", "feedback", "learning_rate", "n_epochs", "batch_size", "evaluation"),
    *("seed", "device", "tensorboard_log", "optimizer", "verbose", "stats_window_size"),
)


class RewardRun(Training):
    """One run of `textgym reward`.

    Args:
        trainer: the trainer, connected to the feedback that is trained on.
        held_out: the feedback that is measured on.
        texts: what the reward is normalised on.
        folder: the run's.
        settings: the run's.
    """

    settings: RewardSettings

    def __init__(
        self, trainer: RewardModelTrainer, held_out: FeedbackSet, texts: NormalisationTexts, folder: RunFolder, settings: RewardSettings
    ) -> None:
        super().__init__(trainer, folder, settings)
        self.trainer, self.held_out, self.texts = trainer, held_out, texts

    @classmethod
    def start(cls, settings: RewardSettings, out: Path | None, force: bool) -> Self:
        """Makes a new run; its folder appears only when its options and its feedback have proved right."""
        folder = RunFolder.choose(REWARD, out, force)
        check_options(settings.options, RewardModelTrainer, _RESERVED)
        parts = load_feedback(settings)
        model = load_reward_model(settings, [*parts.train, *parts.held_out])
        falling = LinearSchedule(settings.step_size, 0.0, 1.0)
        sizes: dict[str, Any] = {"n_epochs": settings.passes, "batch_size": settings.batch_size}
        with unknown_options():
            trainer = RewardModelTrainer(model, parts.train, falling, seed=settings.seed, **sizes, **settings.options)
        assert trainer.examples is not None
        held_out = read_held_out(trainer, parts)
        texts = normalisation_texts(settings, parts.train, trainer)
        found = counts(parts, trainer.examples, held_out)
        print(counts_in_words(found, trainer.max_tokens))
        trainer.evaluation = _evaluation(settings, _interval(trainer), held_out, folder)
        length = settings.total_timesteps or settings.passes * int(trainer.examples.num_tokens.sum())
        run = cls(trainer, held_out, texts, folder, replace(settings, total_timesteps=length))
        report = run.measure("before")
        folder.create(run.settings, feedback=found)
        run.write(feedback=found, before=report.to_dict())
        return run

    @classmethod
    def resume(cls, folder: RunFolder, settings: RewardSettings) -> Self:
        """Goes on with the run in `folder`."""
        parts = load_feedback(settings)
        evaluation = _evaluation(settings, 1, parts.held_out, folder)
        trainer = RewardModelTrainer.load(folder.checkpoint, parts.train, device=check_device(settings.device), evaluation=evaluation)
        evaluation.interval = settings.eval_interval or _interval(trainer)
        held_out, texts = read_held_out(trainer, parts), normalisation_texts(settings, parts.train, trainer)
        return cls(trainer, held_out, texts, folder, settings)

    @property
    def report_file(self) -> Path:
        """Where the reports before and after lie."""
        return self.folder.path / "report.json"

    def measure(self, when: str) -> RewardModelReport:
        """Measures the reward model `"before"` or `"after"` training."""
        self.console.print(f"Measuring the reward model {when} training on held-out feedback ...", style="dim")
        return self.trainer.evaluate(self.held_out, progress_bar=True)

    def write(self, **reports: Any) -> None:
        """Adds to `report.json`."""
        known = self.read()
        write_json(self.report_file, {**known, **reports, "timesteps": self.agent.num_timesteps})

    def read(self) -> dict[str, Any]:
        """Returns what `report.json` holds."""
        document: dict[str, Any] = json.loads(self.report_file.read_text(encoding="utf-8")) if self.report_file.exists() else {}
        return document

    def plot(self) -> None:
        """Draws the curves of all metrics so far."""
        plot_curves(self.folder.read_metrics(), self.folder.curves, "Reward model", REWARD_MODEL_PANELS)

    def save_checkpoint(self) -> None:
        """Saves the trainer, to continue from. `model/` is written in the end, when it is normalised."""
        self.agent.save(self.folder.checkpoint)

    def go_on(self) -> None:
        """Trains the rest; a run whose training is done, and whose end is missing, is brought to its end."""
        report, done = self.read(), self.agent.num_timesteps
        trained = done >= self.settings.training_length or report.get("trained") == done
        if trained and report.get("finished") != done:
            self.folder.change_settings(self.settings)
            print(f"Resuming {self.folder.path}: its {done:,} timesteps are trained; measuring and normalising")
            self.finish()
        else:
            super().go_on()

    # -- the end ----------------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Measures the trained model, normalises it, writes it, and reports; whatever fails here can be gone on with."""
        with self._trained_model_kept():
            self.write(trained=self.agent.num_timesteps)
            after = self.measure("after")
            self.write(after=after.to_dict())
            if self.texts.texts:
                self._normalise()
            self.trainer.reward_model.save_pretrained(self.folder.model)
            if self.trainer.reward_model.per_token:
                write_per_token_rewards(self.trainer.reward_model, self.folder.path / PER_TOKEN_FILE)
            self.plot()
            plot_reliability(after.reliability, self.folder.path / "reliability.png", "Calibration on held-out feedback")
            self.write(finished=self.agent.num_timesteps)
        report = self.read()
        self.console.print(numbers_table(report["before"], report["after"]))
        if (categories := category_table(report["before"], report["after"])) is not None:
            self.console.print(categories)
        self._say_normalisation(report.get("normalisation"))
        self._say_what_lies_where()

    @contextmanager
    def _trained_model_kept(self) -> Iterator[None]:
        """Says, whatever ends the part behind training, that nothing is lost and how to go on."""
        kept = f"Training is done and saved, {self.folder.model} is not written yet"
        try:
            yield
        except KeyboardInterrupt:
            self.console.print(f"\n{kept}. Go on with:\n  {self.folder.resume_command()}", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            self.folder.error.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            fail(
                error,
                f" ({kept}; the traceback is in {self.folder.error}. When this is mended, go on with: {self.folder.resume_command()})",
            )

    def _normalise(self) -> None:
        """Shifts the saved model, not the checkpoint: a run that goes on does so from what was trained."""
        self.console.print(f"Normalising the reward on {self.texts.source} ...", style="dim")
        prompts, completions = zip(*self.texts.texts, strict=True)
        done = self.trainer.reward_model.normalise(prompts, completions, progress_bar=True)
        numbers = {"mean": done.mean.tolist(), "texts": len(prompts), "in_weights": done.in_weights}
        self.write(normalisation={**numbers, "source": self.texts.source, "left_out": self.texts.left_out})

    def _say_normalisation(self, done: dict[str, Any] | None) -> None:
        if done is None:
            said = "The reward is not normalised: its level means nothing."
        else:
            means = ", ".join(f"{mean:.4f}" for mean in done["mean"])
            per = " per token" if self.trainer.reward_model.per_token else ""
            left_out = f" ({done['left_out']:,} that are too long left out)" if done["left_out"] else ""
            cure = "" if self.settings.reference_texts else " Better are samples of the model that RL will start from: --reference-texts."
            said = (
                f"Normalised: the mean {means}{per} of {done['texts']:,} of {done['source']}{left_out} was subtracted, so that the mean "
                f"reward of these is 0 in model/ (the table shows it before).{cure}"
            )
        self.console.print(said, highlight=False, markup=False, soft_wrap=True)
        if done is not None and not done["in_weights"]:
            self.console.print(
                "The mean stands in the model's config.json as reward_offset: its architecture has no parameter for a constant, so that "
                "transformers alone gives the scores without it.",
                soft_wrap=True,
            )

    def _say_what_lies_where(self) -> None:
        self.console.print(f"Run folder: {self.folder.path}", style="bold", highlight=False, soft_wrap=True)
        contents = (
            (self.folder.model, "the reward model"),
            (self.report_file, "these numbers, what was left out, and the reliability table"),
            (self.folder.curves, "learning curves"),
            (self.folder.path / "reliability.png", "stated against observed accuracy"),
            (self.folder.best_model, "the model with the lowest held-out loss, not normalised"),
            (self.folder.checkpoint, f"to train on: {self.folder.resume_command()} --total-timesteps N"),
        )
        for path, note in contents:
            if path.exists():
                self.console.print(f"  {path.name:<16} {note}", highlight=False, markup=False, soft_wrap=True)
        self.console.print("To train a policy by it:", highlight=False)
        for command in next_commands(self.trainer.reward_model, self.folder.model, self.settings):
            self.console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def load_reward_model(settings: RewardSettings, records: Records) -> RewardModel:
    """Returns the model to train; markings give it an output for each of their categories."""
    categories = sorted({span.category for record in records if isinstance(record, Marking) for span in record.spans})
    shape: dict[str, Any] = {"per_token": settings.per_token or None, "output_names": categories or None, "seed": settings.seed}
    try:
        return RewardModel.from_pretrained(settings.model or bundled_model_path(), device=check_device(settings.device), **shape)
    except (ValueError, OSError) as error:
        raise UserError(f"--model: {one_line(error)}") from error


# -- running -------------------------------------------------------------------------------------------------------------


def _evaluation(settings: RewardSettings, interval: int, held_out: FeedbackSet | Records, folder: RunFolder) -> HeldOut:
    interval = settings.eval_interval or interval
    return HeldOut(held_out, interval=interval, patience=settings.patience, best_model_path=folder.best_model)


def _interval(trainer: RewardModelTrainer) -> int:
    """Optimiser steps between two evaluations, so that the passes have about twenty."""
    assert trainer.examples is not None
    steps = trainer.n_epochs * -(-len(trainer.examples) // trainer.batch_size)
    return max(1, round(steps / EVALUATIONS))


def start(settings: RewardSettings, out: Path | None, force: bool) -> None:
    """Runs `textgym reward` from the start."""
    quiet_transformers()
    with said_warnings():
        run = RewardRun.start(settings, out, force)
        run.train()
        run.finish()


def resume(path: Path, changes: dict[str, Any]) -> None:
    """Runs `textgym reward --resume`.

    Args:
        path: the run folder.
        changes: settings that shall differ from the run's, which are saved as its own.
    """
    quiet_transformers()
    folder = RunFolder.open(path)
    if folder.algorithm != REWARD:
        raise UserError(f"--resume {path} is a run of {folder.algorithm}: {folder.resume_command()}")
    settings = replace(folder.read_settings(RewardSettings), **changes).checked()
    with said_warnings():
        RewardRun.resume(folder, settings).go_on()
