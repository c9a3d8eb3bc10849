"""`textgym train` and `textgym sft`: measure, train, measure again, and write everything into a run folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgym.cli import offline_workplace
from textgym.cli.algorithms import SFT, agent_class, command
from textgym.cli.errors import UserError, one_line
from textgym.cli.measuring import MeasuredEvaluation, Measurement, measure
from textgym.cli.plots import plot_curves
from textgym.cli.report import numbers_table, print_report, samples_table, samples_text
from textgym.cli.run_folder import RunFolder, read_json_lines, write_json, write_json_lines
from textgym.cli.settings import TrainSettings
from textgym.cli.training import Training
from textgym.cli.workplace import (
    check_device,
    check_options,
    check_positions,
    load_policies,
    make_environments,
    quiet_transformers,
)
from textgym.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from textgym.agents.base import Agent

_RESERVED = ("policy", "env", "learning_rate", "beta", "reference", "evaluation", "seed", "device", "tensorboard_log", "optimizer")
Rows = list[dict[str, Any]]


class Run(Training):
    """One training run: an agent, its environments and its folder."""

    settings: TrainSettings

    def __init__(self, agent: "Agent", environment: Any, true_name: str | None, folder: RunFolder, settings: TrainSettings) -> None:
        super().__init__(agent, folder, settings)
        self.environment, self.true_name = environment, true_name

    @classmethod
    def start(cls, settings: TrainSettings, out: Path | None, force: bool) -> "Run":
        """Makes a new run; its folder appears only when its options have proved right and its reward has scored completions."""
        folder = RunFolder.choose(settings.algorithm, out, force)
        check_options(settings.options, agent_class(settings.algorithm), _RESERVED)
        if settings.offline:
            with unknown_options():
                agent, environment, true_name = offline_workplace.make_agent(settings, folder, settings.options)
            settings = replace(settings, total_timesteps=offline_workplace.count_passes(settings, agent))
        else:
            agent, environment, true_name = make_online(settings, folder)
        run = cls(agent, environment, true_name, folder, settings)
        measurement, samples = run.measure("before")
        folder.create(settings)
        run.write_measurement("before", measurement, samples)
        return run

    @classmethod
    def resume(cls, folder: RunFolder, settings: TrainSettings) -> "Run":
        """Goes on with the run in `folder`."""
        load = offline_workplace.load_agent if settings.offline else load_online
        agent, environment, true_name = load(settings, folder)
        return cls(agent, environment, true_name, folder, settings)

    def measure(self, when: str) -> tuple[Measurement, Rows]:
        """Measures the policy `"before"` or `"after"` training."""
        self.console.print(f"Measuring the policy {when} training on held-out prompts ...", style="dim")
        return measure(self.agent, self.environment, self.true_name)

    def write_measurement(self, when: str, measurement: Measurement, samples: Rows) -> None:
        """Writes the numbers and the samples of a measurement."""
        summary = {**self.folder.read_summary(), when: asdict(measurement), "timesteps": self.agent.num_timesteps}
        write_json(self.folder.summary, summary)
        write_json_lines(self.folder.samples(when), samples)

    def plot(self) -> None:
        """Draws the curves of all metrics so far."""
        title = self.settings.algorithm.upper() + ("" if self.settings.algorithm == SFT else f", beta {self.settings.beta:g}")
        plot_curves(self.folder.curve_rows(), self.folder.curves, title)

    def finish(self) -> None:
        """Measures the trained policy and reports."""
        after, fresh = self.measure("after")
        self.write_measurement("after", after, fresh)
        self.plot()
        before = Measurement(**self.folder.read_summary()["before"])
        samples = [read_json_lines(self.folder.samples(when)) for when in ("before", "after")]
        self.folder.samples_text.write_text(samples_text(*samples), encoding="utf-8")
        print_report(self.console, self.folder, numbers_table(before, after), samples_table(*samples))


@contextmanager
def unknown_options() -> Iterator[None]:
    """Turns the complaint of a constructor about its arguments into one about `--set`."""
    try:
        yield
    except TypeError as error:
        raise UserError(f"--set: {one_line(str(error))}") from error


def make_online(settings: TrainSettings, folder: RunFolder) -> tuple[Any, Any, str | None]:
    """Returns an agent in its environment, the one over held-out prompts, and the name of the reward that is only measured."""
    policy, reference = load_policies(settings)
    envs, held_out, rewards = make_environments(settings, policy.tokenizer)
    check_positions((envs, held_out), policy)
    with unknown_options():
        agent = agent_class(settings.algorithm)(
            policy,
            envs,
            learning_rate=settings.step_size,
            beta=settings.beta,
            reference=reference,
            evaluation=_evaluation(settings, held_out, rewards.true_name, folder),
            seed=settings.seed,
            **settings.options,
        )
    return agent, held_out, rewards.true_name


def load_online(settings: TrainSettings, folder: RunFolder) -> tuple[Any, Any, str | None]:
    """The same from the checkpoint in a run folder."""
    envs, held_out, rewards = make_environments(settings, load_tokenizer(folder.checkpoint / "model"))
    evaluation = _evaluation(settings, held_out, rewards.true_name, folder)
    agent = agent_class(settings.algorithm).load(folder.checkpoint, env=envs, device=check_device(settings.device), evaluation=evaluation)
    return agent, held_out, rewards.true_name


def train(settings: TrainSettings, out: Path | None, force: bool) -> None:
    """Runs `textgym train` from the start."""
    quiet_transformers()
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


def _evaluation(settings: TrainSettings, environment: Any, true_name: str | None, folder: RunFolder) -> MeasuredEvaluation:
    return MeasuredEvaluation(environment, true_name, settings.evaluation_interval, folder.best_model, settings.max_kl)
