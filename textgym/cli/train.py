"""`textgym train` and `textgym sft`: measure, train, measure again, and write everything into a run folder."""

import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from textgym.agents.common.evaluation import EvaluationResult
from textgym.agents.common.options import arguments_of
from textgym.cli import offline_workplace
from textgym.cli.algorithms import ALGORITHMS, agent_class, command
from textgym.cli.announcing import model_name, model_words, reward_words
from textgym.cli.arguments import RESERVED, check_options
from textgym.cli.bars import bar
from textgym.cli.errors import UserError, fail
from textgym.cli.measuring import MeasuredEvaluation, Measurement, default_completions, measure, summarise
from textgym.cli.plots import plot_curves
from textgym.cli.report import numbers_table, print_report, samples_table, samples_text
from textgym.cli.run_folder import RunFolder, read_json_lines, write_json, write_json_lines
from textgym.cli.schedules import kl_coefficient, schedule, with_schedules
from textgym.cli.settings import TrainSettings
from textgym.cli.training import Training
from textgym.cli.workplace import (
    Prepared,
    Workplace,
    check_device,
    check_model_paths,
    check_positions,
    check_writable,
    load_policies,
    make_environments,
    quiet_transformers,
    unknown_options,
)
from textgym.tokenizers import load_tokenizer

Rows = list[dict[str, Any]]


class Run(Training):
    """One training run: an agent, its environments and its folder."""

    settings: TrainSettings

    def __init__(self, prepared: Prepared, folder: RunFolder, settings: TrainSettings) -> None:
        super().__init__(prepared.agent, folder, settings)
        self.environment, self.true_name, self.rows = prepared.environment, prepared.true_name, prepared.rows
        self.completions = settings.eval_completions or default_completions(self.agent.policy)
        evaluation: Any = self.agent.evaluation
        evaluation.at_most(self.completions)

    @classmethod
    def start(cls, settings: TrainSettings, out: Path | None, force: bool) -> "Run":
        """Makes a new run; its folder appears when its options have proved right, and what it replaces goes when it has been measured."""
        folder = RunFolder.choose(settings.algorithm, out, force)
        check_writable(out)
        check_options(settings.options, agent_class(settings.algorithm), RESERVED)
        prepared = (offline_workplace.make_agent if settings.offline else make_online)(settings, folder)
        if settings.offline:
            settings = replace(settings, total_timesteps=offline_workplace.count_passes(settings, prepared.agent))
        run = cls(prepared, folder, settings)
        run.announce()
        folder.set_aside()
        folder.create(settings, data=prepared.rows.counts)
        run.measure_before()
        folder.settle()
        return run

    @classmethod
    def resume(cls, folder: RunFolder, settings: TrainSettings) -> "Run":
        """Goes on with the run in `folder`, which may have been stopped while it was measured."""
        load = offline_workplace.load_agent if settings.offline else load_online
        run = cls(load(settings, folder), folder, settings)
        run.announce()
        measured = folder.read_summary().get("before", {}).get("completions", 0)
        if run.agent.num_timesteps == 0 and measured < run.completions:
            run.measure_before()
        return run

    def announce(self) -> None:
        """Says in one line what is trained, on what, how, and what is held out."""
        settings = self.settings
        longest = self.environment.single_observation_space["input_ids"].shape[0]
        parts = [
            f"{settings.title} of {model_words(model_name(settings.model), self.agent.policy)}",
            self.rows.told("row" if settings.offline else "prompt"),
            reward_words(settings.reward, settings.reward_weights) + (", only measured" if settings.offline and settings.reward else ""),
            f"{longest - settings.max_new_tokens} + {settings.max_new_tokens} tokens at most",
            f"{settings.training_length:,} timesteps",
        ]
        self.console.print("; ".join(parts), style="dim", highlight=False, markup=False)

    def train(self) -> None:
        """See `Training`; a preference learner's reference scores the examples first, which is a pass over all of them."""
        if self.settings.offline:
            try:
                self.agent.prepare(self.agent.examples, progress_bar=True)
            except KeyboardInterrupt:
                self._interrupted()
        super().train()

    def measure_before(self) -> None:
        """Measures the policy before training, and saves it; whatever ends that, what was measured is written.

        Raises:
            typer.Exit: it was interrupted, or a reward failed.
        """
        so_far: list[EvaluationResult] = []
        try:
            self.write_measurement("before", *self.measure("before", so_far.append))
        except KeyboardInterrupt:
            if so_far:
                self.write_measurement("before", *summarise(so_far[-1], self.true_name, {}))
            self.save_checkpoint()
            self.folder.settle()
            self._interrupted()
        except Exception as error:  # a reward of the user's may raise anything
            self.folder.give_back()
            self.folder.error.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            fail(
                error,
                f" (Nothing has been trained; the traceback is in {self.folder.error}. When this is mended, give the same command again.)",
            )
        self.save_checkpoint()

    def measure(self, when: str, on_walk: Callable[[EvaluationResult], object] = lambda result: None) -> tuple[Measurement, Rows]:
        """Measures the policy `"before"` or `"after"` training."""
        self.console.print(f"Measuring the policy {when} training on held-out prompts ...", style="dim")
        with bar(self.console, "Measuring", self.completions) as advance:
            done = 0

            def measured(result: EvaluationResult) -> None:
                nonlocal done
                advance(len(result.infos) - done)
                done = len(result.infos)
                on_walk(result)

            return measure(self.agent, self.environment, self.true_name, self.completions, measured)

    def write_measurement(self, when: str, measurement: Measurement, samples: Rows) -> None:
        """Writes the numbers and the samples of a measurement."""
        summary = {**self.folder.read_summary(), when: asdict(measurement), "timesteps": self.agent.num_timesteps, "data": self.rows.counts}
        write_json(self.folder.summary, summary)
        write_json_lines(self.folder.samples(when), samples)

    def plot(self) -> None:
        """Draws the curves of all metrics so far."""
        plot_curves(self.folder.curve_rows(), self.folder.curves, self.settings.title)

    def finish(self) -> None:
        """Measures the trained policy and reports."""
        after, fresh = self.measure("after")
        self.write_measurement("after", after, fresh)
        self.plot()
        before = Measurement(**self.folder.read_summary()["before"])
        samples = (read_json_lines(self.folder.samples("before")), read_json_lines(self.folder.samples("after")))
        self.folder.samples_text.write_text(samples_text(*samples), encoding="utf-8")
        print_report(self.console, self.folder, numbers_table(before, after), samples_table(*samples, width=self.console.width))


def make_online(settings: TrainSettings, folder: RunFolder) -> Prepared:
    """Returns an agent in its environment, and the one over held-out prompts."""
    policy, reference = load_policies(settings)
    place = make_environments(settings, policy.tokenizer)
    check_positions((place.envs, place.held_out), policy)
    kind = agent_class(settings.algorithm)
    options = with_schedules(settings.options, arguments_of(kind))
    size = options.get("rollout_size")
    completions = size if isinstance(size, int) else settings.num_envs
    with unknown_options():
        agent = kind(
            policy,
            place.envs,
            learning_rate=schedule(settings.step_size),
            beta=kl_coefficient(settings.beta, ALGORITHMS[settings.algorithm].beta, completions),
            reference=reference,
            evaluation=_evaluation(settings, place, folder),
            seed=settings.seed,
            **options,
        )
    return Prepared(agent, place.held_out, place.rewards.true_name, place.prompts)


def load_online(settings: TrainSettings, folder: RunFolder) -> Prepared:
    """The same from the checkpoint in a run folder."""
    place = make_environments(settings, load_tokenizer(folder.checkpoint / "model"))
    evaluation = _evaluation(settings, place, folder)
    agent = agent_class(settings.algorithm).load(
        folder.checkpoint, env=place.envs, device=check_device(settings.device), evaluation=evaluation
    )
    return Prepared(agent, place.held_out, place.rewards.true_name, place.prompts)


def train(settings: TrainSettings, out: Path | None, force: bool) -> None:
    """Runs `textgym train` from the start."""
    quiet_transformers()
    check_model_paths({"--model": settings.model, "--reference": settings.reference})
    run = Run.start(settings.checked().with_absolute_paths(), out, force)
    run.train()
    run.finish()


def resume(path: Path, algorithm: str, changes: dict[str, Any]) -> None:
    """Runs `textgym train --resume`.

    Args:
        path: the run folder.
        algorithm: as given on the command line; it must be the run's.
        changes: settings that shall differ from the run's, which are saved as its own.
    """
    quiet_transformers()
    folder = RunFolder.open(path)
    settings = replace(folder.settings(), **changes).checked()
    if settings.algorithm != algorithm:
        raise UserError(f"--resume {path} is a run of {settings.algorithm}: {command(settings.algorithm)} --resume {path}")
    Run.resume(folder, settings).go_on()


def _evaluation(settings: TrainSettings, place: Workplace, folder: RunFolder) -> MeasuredEvaluation:
    return MeasuredEvaluation(place.held_out, place.rewards.true_name, settings.evaluation_interval, folder.best_model, settings.max_kl)
