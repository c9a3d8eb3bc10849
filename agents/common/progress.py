"""The progress bar of `learn(progress_bar=True)`: what the agent says of itself, tokens per second and time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback

PLAIN_INTERVAL_S = 10.0


class ProgressCallback(BaseCallback):
    """Shows a bar on a terminal, and a line every ten seconds where the output is a file or a pipe."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._start = self._last_line = 0.0
        self._status = ""

    def _on_training_start(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}% {task.fields[status]}"),
            TimeRemainingColumn(),
        )
        total = self.locals["total_timesteps"]
        self._task = self._progress.add_task(type(self.model).__name__, total=total, completed=self.model.num_timesteps, status="")
        self._start, self._first = time.monotonic(), self.model.num_timesteps
        if self._progress.console.is_terminal:
            self._progress.start()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert self._progress is not None
        model: Any = self.model  # ours: an `Agent`
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.model.num_timesteps - self._first) / elapsed
        self._status = f"{model.progress_text(self.locals)}  {rate:,.0f} tokens/s"
        self._progress.update(self._task, completed=self.model.num_timesteps, status=self._status)
        if not self._progress.console.is_terminal and time.monotonic() - self._last_line > PLAIN_INTERVAL_S:
            self._print_line(rate)

    def _print_line(self, rate: float) -> None:
        assert self._progress is not None
        self._last_line = time.monotonic()
        task = self._progress.tasks[0]
        left = ((task.total or 0) - self.model.num_timesteps) / max(rate, 1e-9)
        self._progress.console.print(
            f"{task.description} {task.percentage:3.0f}%  {self._status}  {max(left, 0):.0f} s left", highlight=False
        )

    def _on_training_end(self) -> None:
        assert self._progress is not None
        self._progress.stop()


@contextmanager
def counting_bar(label: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Gives the function to call with how much more of `total` is done; a bar on a terminal while it lasts, nothing elsewhere."""
    console = Console()
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
