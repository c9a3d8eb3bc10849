"""The progress bar of `learn(progress_bar=True)`: what the agent says of itself, tokens per second and time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.text import Text
from stable_baselines3.common.callbacks import BaseCallback

PLAIN_INTERVAL_S = 10.0
_SHORTEST_BAR, _LONGEST_BAR = 6, 40  # columns


def progress_line(name: str, share: float, status: str, rate: float | None, left: float | None, width: int) -> str:
    """Returns a line that fits: what there is no room for is left away as a whole, no number is cut.

    Args:
        name: of what is trained.
        share: done, from 0 to 1.
        status: what the agent says, parts with two spaces between them.
        rate: tokens per second; None until it is known.
        left: seconds; None until they are known.
        width: columns of the terminal.
    """
    first = [name, f"{min(share, 1.0):.0%}", *([] if left is None else [f"{_clock(left)} left"])]
    further = [*filter(None, status.split("  ")), *([] if rate is None else [f"{rate:,.0f} tokens/s"])]
    while further and len("  ".join([*first, *further])) > width:
        further.pop()
    room = width - len("  ".join([*first, *further])) - 2
    if room >= _SHORTEST_BAR:
        size = min(room, _LONGEST_BAR)
        done = round(size * min(share, 1.0))
        first.insert(1, "━" * done + "╌" * (size - done))
    return "  ".join([*first, *further])


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes = f"{rest // 60}:{rest % 60:02d}"
    return f"{hours}:{minutes.zfill(5)}" if hours else minutes


class _Line(ProgressColumn):
    """The whole line as one column."""

    def __init__(self, callback: "ProgressCallback") -> None:
        super().__init__()
        self.callback = callback

    def render(self, task: Task) -> Text:
        return Text(self.callback.line(self.callback.width), no_wrap=True, overflow="crop")


class ProgressCallback(BaseCallback):
    """Shows a bar on a terminal, and a line every ten seconds where the output is a file or a pipe.

    Rate and time left are those of whole iterations: before the first one is over there are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._start = self._last_line = 0.0
        self._status = ""
        self._sampled = False
        self._rate: float | None = None

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        assert self._progress is not None
        return self._progress.console.width

    def line(self, width: int) -> str:
        """The line as it is now; see `progress_line`."""
        done, total = self.model.num_timesteps, self._total
        left = None if self._rate is None else max(total - done, 0) / max(self._rate, 1e-9)
        return progress_line(type(self.model).__name__, done / max(total, 1), self._status, self._rate, left, width)

    def _on_training_start(self) -> None:
        self._progress = Progress(_Line(self))
        self._total = self.locals["total_timesteps"]
        self._start = self._last_line = time.monotonic()
        self._first = self.model.num_timesteps
        self._sampled, self._rate, self._status = False, None, ""
        self._task = self._progress.add_task("", total=self._total)
        if self._progress.console.is_terminal:
            self._progress.start()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._sampled:
            self._end_iteration()

    def _on_rollout_end(self) -> None:
        self._sampled = True
        self._update()

    def _end_iteration(self, last: bool = False) -> None:
        """The iteration before this moment is over: rate and line are those of whole iterations."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        self._rate = (self.model.num_timesteps - self._first) / elapsed
        self._update()
        assert self._progress is not None
        console = self._progress.console
        if not console.is_terminal and (last or time.monotonic() - self._last_line > PLAIN_INTERVAL_S):
            self._last_line = time.monotonic()
            console.print(self.line(console.width), highlight=False, markup=False, soft_wrap=True)

    def _update(self) -> None:
        assert self._progress is not None
        model: Any = self.model  # ours: an `Agent`
        self._status = model.progress_text(self.locals)
        self._progress.update(self._task, completed=self.model.num_timesteps)

    def _on_training_end(self) -> None:
        assert self._progress is not None
        if self._sampled:
            self._end_iteration(last=True)
        self._progress.stop()


@contextmanager
def counting_bar(label: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Gives the function to call with how much more of `total` is done; a bar on a terminal while it lasts, nothing elsewhere."""
    console = Console()
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
