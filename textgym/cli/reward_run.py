"""What `textgym reward` does: read feedback, hold some out, train a reward model, report it, and write everything into a run folder."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from rich.table import Table
from stable_baselines3.common.utils import LinearSchedule

from textgym.agents.common.held_out import HeldOut
from textgym.agents.reward_model import RewardModel
from textgym.agents.reward_model_trainer import RewardModelTrainer
from textgym.bundled import bundled_model_path
from textgym.cli import default_data
from textgym.cli.algorithms import REWARD
from textgym.cli.errors import UserError, one_line
from textgym.cli.plots import REWARD_MODEL_PANELS, plot_curves, plot_reliability
from textgym.cli.reward import RewardSettings
from textgym.cli.run_folder import RunFolder, write_json
from textgym.cli.train import unknown_options
from textgym.cli.training import Training
from textgym.cli.workplace import check_device, check_options, load_policy, quiet_transformers
from textgym.evaluation import Estimate, RewardModelReport
from textgym.feedback import Comparison, Judgements, Label, Marking, Ranking, Record, SegmentPair, read_feedback
from textgym.prompts import PromptText
from textgym.rows import FILES, read_rows

MAX_HELD_OUT = 500  # records; every measurement reads them all
MAX_NORMALISED = 2000  # texts that the mean is taken over
EVALUATIONS = 20
MAX_NEW_TOKENS = 24  # of the bundled model's texts
FEWEST_PROMPTS = 10  # to hold out whole prompts
_RESERVED = (
    *("reward_model", "feedback", "learning_rate", "n_epochs", "batch_size", "evaluation"),
    *("seed", "device", "tensorboard_log", "optimizer", "verbose", "stats_window_size"),
)
Records = list[Record]
Texts = list[tuple[PromptText, PromptText]]


class RewardRun(Training):
    """One run of `textgym reward`.

    Args:
        trainer: the trainer, connected to the feedback that is trained on.
        held_out: the feedback that is measured on.
        reference_texts: prompts and completions that the reward is normalised on; none for not at all.
        folder: the run's.
        settings: the run's.
    """

    settings: RewardSettings

    def __init__(
        self, trainer: RewardModelTrainer, held_out: Records, reference_texts: Texts, folder: RunFolder, settings: RewardSettings
    ) -> None:
        super().__init__(trainer, folder, settings)
        self.trainer, self.held_out, self.reference_texts = trainer, held_out, reference_texts

    @classmethod
    def start(cls, settings: RewardSettings, out: Path | None, force: bool) -> Self:
        """Makes a new run; its folder appears only when its options and its feedback have proved right."""
        folder = RunFolder.choose(REWARD, out, force)
        check_options(settings.options, RewardModelTrainer, _RESERVED)
        train, held_out = load_feedback(settings)
        texts = load_reference_texts(settings, train)
        model = load_reward_model(settings, [*train, *held_out])
        falling = LinearSchedule(settings.step_size, 0.0, 1.0)
        sizes: dict[str, Any] = {"n_epochs": settings.passes, "batch_size": settings.batch_size}
        with unknown_options():
            trainer = RewardModelTrainer(model, train, falling, seed=settings.seed, **sizes, **settings.options)
        trainer.evaluation = _evaluation(settings, trainer, held_out, folder)
        assert trainer.examples is not None
        length = settings.total_timesteps or settings.passes * int(trainer.examples.num_tokens.sum())
        run = cls(trainer, held_out, texts, folder, replace(settings, total_timesteps=length))
        report = run.measure("before")
        folder.create(run.settings)
        run.write(before=report.to_dict())
        return run

    @classmethod
    def resume(cls, folder: RunFolder, settings: RewardSettings) -> Self:
        """Goes on with the run in `folder`."""
        train, held_out = load_feedback(settings)
        evaluation = _evaluation(settings, None, held_out, folder)
        trainer = RewardModelTrainer.load(folder.checkpoint, train, device=check_device(settings.device), evaluation=evaluation)
        evaluation.interval = settings.eval_interval or _interval(trainer)
        return cls(trainer, held_out, load_reference_texts(settings, train), folder, settings)

    @property
    def report_file(self) -> Path:
        """Where the reports before and after lie."""
        return self.folder.path / "report.json"

    def measure(self, when: str) -> RewardModelReport:
        """Measures the reward model `"before"` or `"after"` training."""
        self.console.print(f"Measuring the reward model {when} training on held-out feedback ...", style="dim")
        return self.trainer.evaluate(self.held_out)

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

    def finish(self) -> None:
        """Measures the trained model, normalises it, writes it, and reports."""
        after = self.measure("after")
        self.write(after=after.to_dict())
        if self.reference_texts:
            self._normalise()
        self.trainer.reward_model.save_pretrained(self.folder.model)
        self.plot()
        plot_reliability(after.reliability, self.folder.path / "reliability.png", "Calibration on held-out feedback")
        before = self.read()["before"]
        self.console.print(numbers_table(before, after.to_dict()))
        self._say_what_lies_where()

    def _normalise(self) -> None:
        """Shifts the saved model, not the checkpoint: a run that goes on does so from what was trained."""
        prompts, completions = zip(*self.reference_texts, strict=True)
        done = self.trainer.reward_model.normalise(prompts, completions)
        self.write(normalisation={"mean": done.mean.tolist(), "texts": len(prompts), "in_weights": done.in_weights})
        if not done.in_weights:
            self.console.print(
                "The mean stands in the model's config.json as reward_offset: its architecture has no parameter for a constant, so that "
                "transformers alone gives the scores without it.",
                soft_wrap=True,
            )

    def _say_what_lies_where(self) -> None:
        self.console.print(f"Run folder: {self.folder.path}", style="bold", highlight=False, soft_wrap=True)
        contents = (
            (self.folder.model, f"the reward model: textgym train rloo --reward {self.folder.model}"),
            (self.report_file, "these numbers, and the reliability table"),
            (self.folder.curves, "learning curves"),
            (self.folder.path / "reliability.png", "stated against observed accuracy"),
            (self.folder.best_model, "the model with the lowest held-out loss"),
            (self.folder.checkpoint, f"to train on: {self.folder.resume_command()} --total-timesteps N"),
        )
        for path, note in contents:
            if path.exists():
                self.console.print(f"  {path.name:<16} {note}", highlight=False, markup=False, soft_wrap=True)


def numbers_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Returns a report before and after training, beside what the lengths alone say."""
    rule = "longer wins" if after["longer_wins"] else "shorter wins"
    table = Table(title=f"On {after['num_decisions']} decisions of held-out feedback")
    for column in ("", "before", "after", rule):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    length = str(Estimate(**after["length_accuracy"]))
    table.add_row("accuracy", str(Estimate(**before["accuracy"])), str(Estimate(**after["accuracy"])), length)
    for name, label in (
        ("log_loss", "log loss (coin: 0.693)"),
        ("expected_calibration_error", "calibration error"),
        ("loss", "loss"),
        ("reward_mean", "reward mean"),
        ("reward_std", "reward std"),
    ):
        table.add_row(label, f"{before[name]:.4f}", f"{after[name]:.4f}", "")
    return table


# -- feedback ------------------------------------------------------------------------------------------------------------


def load_feedback(settings: RewardSettings) -> tuple[Records, Records]:
    """Returns the feedback to train on and what is held out."""
    if settings.feedback is None:
        policy = load_policy("--model", str(bundled_model_path()), settings.device)
        return split(list(default_data.comparisons(policy, settings.seed, MAX_NEW_TOKENS)), settings.seed)
    records = _read("--feedback", list(settings.feedback), settings)
    if settings.held_out is not None:
        return records, _read("--held-out", settings.held_out, settings)
    return split(records, settings.seed)


def _read(name: str, source: Any, settings: RewardSettings) -> Records:
    try:
        found = read_feedback(source, on_bad_row="keep_good" if settings.keep_good else "raise", positive=settings.positive)
    except (ValueError, OSError) as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    if found.bad_rows:
        print(f"textgym: {name}: left out {len(found.bad_rows)} rows; the first: {found.bad_rows[0].reason}")
    return found.records


def split(records: Records, seed: int) -> tuple[Records, Records]:
    """Returns the records to train on and those that are held out: all of a tenth of the prompts, at most `MAX_HELD_OUT` records.

    Where there are hardly any prompts, as of labelled texts, single records are held out.
    """
    groups: dict[str, Records] = {}
    for number, record in enumerate(records):
        groups.setdefault(prompt_of(record) or f"record {number}", []).append(record)
    if len(groups) < FEWEST_PROMPTS:
        groups = {f"record {number}": [record] for number, record in enumerate(records)}
    names = list(groups)
    random.Random(seed).shuffle(names)
    held_out: Records = []
    chosen = set()
    for name in names[: max(1, len(names) // 10)]:
        if held_out and len(held_out) + len(groups[name]) > MAX_HELD_OUT:
            break
        held_out += groups[name]
        chosen.add(name)
    train = [record for name in groups if name not in chosen for record in groups[name]]
    if not train:
        raise UserError("--feedback holds one record, so none can be held out: give --held-out too.")
    return train, held_out


def prompt_of(record: Record) -> str:
    """Returns what tells the prompt of a record from others; "" where it has none."""
    if isinstance(record, SegmentPair):
        return repr(record.first.prompt_ids)
    return repr(record.prompt) if record.prompt else ""


def texts_of(record: Record) -> Sequence[tuple[PromptText, PromptText]]:
    """Returns the texts of a record, each with its prompt; segments are none."""
    if isinstance(record, Comparison):
        return [(record.prompt, record.chosen), (record.prompt, record.rejected)]
    if isinstance(record, Ranking | Judgements):
        return [(record.prompt, completion) for completion in record.completions]
    if isinstance(record, Label | Marking):
        return [(record.prompt, record.completion)]
    return []


def load_reference_texts(settings: RewardSettings, train: Records) -> Texts:
    """Returns the texts of `--reference-texts`, else those of the feedback, at most `MAX_NORMALISED`; none with `--no-normalise`."""
    if not settings.normalise:
        return []
    if settings.reference_texts is None:
        texts = [text for record in train for text in texts_of(record)]
    else:
        try:
            rows = read_rows(settings.reference_texts, "reference_texts", forms=f"the path of {FILES}")
        except (ValueError, OSError) as error:
            raise UserError(f"--reference-texts: {one_line(error)}") from error
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or not {"prompt", "completion"} <= row.keys():
                raise UserError(f"--reference-texts: row {number} must have the columns prompt and completion.")
        texts = [(row["prompt"], row["completion"]) for row in rows]
    if not texts:
        raise UserError("the feedback has no texts to normalise on, only segments: give --reference-texts, or --no-normalise.")
    return random.Random(settings.seed).sample(texts, min(len(texts), MAX_NORMALISED))


def load_reward_model(settings: RewardSettings, records: Records) -> RewardModel:
    """Returns the model to train; markings give it an output for each of their categories."""
    categories = sorted({span.category for record in records if isinstance(record, Marking) for span in record.spans})
    shape: dict[str, Any] = {"per_token": settings.per_token or None, "output_names": categories or None, "seed": settings.seed}
    try:
        return RewardModel.from_pretrained(settings.model or bundled_model_path(), device=check_device(settings.device), **shape)
    except (ValueError, OSError) as error:
        raise UserError(f"--model: {one_line(error)}") from error


# -- running -------------------------------------------------------------------------------------------------------------


def _evaluation(settings: RewardSettings, trainer: RewardModelTrainer | None, held_out: Records, folder: RunFolder) -> HeldOut:
    interval = settings.eval_interval or (1 if trainer is None else _interval(trainer))
    return HeldOut(held_out, interval=interval, patience=settings.patience, best_model_path=folder.best_model)


def _interval(trainer: RewardModelTrainer) -> int:
    """Optimiser steps between two evaluations, so that the passes have about twenty."""
    assert trainer.examples is not None
    steps = trainer.n_epochs * -(-len(trainer.examples) // trainer.batch_size)
    return max(1, round(steps / EVALUATIONS))


def start(settings: RewardSettings, out: Path | None, force: bool) -> None:
    """Runs `textgym reward` from the start."""
    quiet_transformers()
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
    RewardRun.resume(folder, settings).go_on()
