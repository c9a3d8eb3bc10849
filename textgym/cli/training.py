"""The middle of every command that trains: learn, log, save now and then, and keep what there is when something ends it."""

import json
import shutil
import traceback
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from textgym.agents.common.progress import ProgressCallback
from textgym.cli.errors import EXIT_INTERRUPTED, UserError, fail, one_line
from textgym.cli.interrupts import BetweenIterations, StopRequest, TrainingStopped
from textgym.cli.run_folder import RunFolder, save_whole
from textgym.cli.workplace import limit_threads

if TYPE_CHECKING:
    from textgym.agents.base import Agent

CHECKPOINTS_PER_RUN = 5


class SavingError(UserError):
    """A checkpoint could not be written, as on a full disk; the one before it is whole."""


def _end(bar: ProgressCallback) -> None:
    if bar.locals:  # it was started
        bar.on_training_end()


class Training(ABC):
    """An agent that is trained in a run folder.

    Args:
        agent: what learns.
        folder: where everything is written.
        settings: the run's, with its `training_length` in timesteps.
    """

    agent: Any  # an `Agent`, of which each kind has more

    def __init__(self, agent: "Agent", folder: RunFolder, settings: Any) -> None:
        self.agent, self.folder, self.settings = agent, folder, settings
        self.console = Console()
        limit_threads(agent.policy)

    def train(self) -> None:
        """Trains up to `total_timesteps`; a checkpoint is saved whatever ends it.

        Raises:
            typer.Exit: training was interrupted, or a reward or callback failed.
        """
        remaining = self.settings.training_length - self.agent.num_timesteps
        logger = self.folder.logger()
        self.agent.set_logger(logger)
        bar = ProgressCallback()
        try:
            with StopRequest() as request:
                every = max(1, self.settings.training_length // CHECKPOINTS_PER_RUN)
                between = BetweenIterations(request, self.save_checkpoint, every)
                self.agent.learn(remaining, callback=[between, bar], reset_num_timesteps=False)
            self.save_checkpoint()
        except SavingError:
            _end(bar)
            with suppress(OSError):
                self.plot()
            raise
        except (KeyboardInterrupt, TrainingStopped):
            self._save_unfinished(bar)
            self._interrupted()
        except Exception as error:  # a reward of the user's may raise anything
            self._save_unfinished(bar)
            self._failed(error)
        finally:
            logger.close()

    def go_on(self) -> None:
        """Trains the rest of an earlier run whose settings may have been changed, and reports.

        Raises:
            UserError: there is no rest.
        """
        done, total = self.agent.num_timesteps, self.settings.training_length
        if done >= total:
            raise UserError(
                f"--resume {self.folder.path}: this run has its {done:,} timesteps already; to go on, give a larger --total-timesteps."
            )
        self.folder.change_settings(self.settings)
        print(f"Resuming {self.folder.path} at {done:,} of {total:,} timesteps")
        self.train()
        self.finish()

    def save_checkpoint(self) -> None:
        """Saves the agent, to continue from, and its model, to use.

        Raises:
            SavingError: they cannot be written; the older ones are as they were.
        """
        from safetensors import SafetensorError

        try:
            self.agent.save(self.folder.checkpoint)
            save_whole(self.agent.policy.save_pretrained, self.folder.model)
        except (OSError, SafetensorError) as error:  # safetensors' own is no OSError
            shutil.rmtree(self.folder.checkpoint / ".saving", ignore_errors=True)  # it takes room, and is of no use
            raise SavingError(self._unsaved(error)) from error

    def _unsaved(self, error: Exception) -> str:
        done = f"{self.folder.path} could not be saved at {self.agent.num_timesteps:,} timesteps ({one_line(error)})"
        older = self.folder.checkpoint / "agent.json"
        if not older.is_file():
            return f"{done}, and holds no checkpoint. Make room, and start again."
        steps = json.loads(older.read_text(encoding="utf-8"))["state"]["num_timesteps"]
        return f"{done}. Its checkpoint of {steps:,} timesteps is whole: make room, and go on with: {self.folder.resume_command()}"

    def _save_unfinished(self, bar: ProgressCallback) -> None:
        """Keeps what there is of a training that did not come to its end: a checkpoint, the curves so far."""
        _end(bar)
        self.save_checkpoint()
        self.plot()

    def _interrupted(self) -> None:
        done, total = self.agent.num_timesteps, self.settings.training_length
        self.console.print(
            f"Stopped at {done:,} of {total:,} timesteps and saved. Go on with:\n  {self.folder.resume_command()}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED)

    def _failed(self, error: Exception) -> None:
        self.folder.error.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        fail(
            error,
            f" (Training stopped at {self.agent.num_timesteps:,} timesteps and was saved; the traceback is in {self.folder.error}. "
            f"When this is mended, go on with: {self.folder.resume_command()})",
        )

    @abstractmethod
    def plot(self) -> None:
        """Draws the curves of all metrics so far."""

    @abstractmethod
    def finish(self) -> None:
        """Measures what was trained, and reports."""
