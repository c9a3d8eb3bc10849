"""Stopping a training run between two iterations, where its state is whole."""

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from stable_baselines3.common.callbacks import BaseCallback

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingStopped(Exception):  # noqa: N818  (no error: it is what the user wanted)
    """Training was asked to stop and has reached the end of an iteration."""


class StopRequest:
    """While it is entered, Ctrl-C (or SIGTERM) is remembered instead of raised; a second one raises `KeyboardInterrupt` at once."""

    def __init__(self) -> None:
        self.made = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers there only
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        print("\ntextgym: stopping after this iteration; once more to stop at once.", file=sys.stderr)


class BetweenIterations(BaseCallback):
    """Stops where a stop was requested, and saves a checkpoint now and then: both before an iteration, never inside one.

    Args:
        request: looked at before each iteration.
        save: saves a checkpoint.
        interval: timesteps between two checkpoints.
    """

    def __init__(self, request: StopRequest, save: Callable[[], None], interval: int) -> None:
        super().__init__()
        self._request, self._save, self._interval = request, save, interval
        self._saved_at = 0

    def _on_training_start(self) -> None:
        self._saved_at = self.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._request.made:
            raise TrainingStopped
        # the count of the agent: a callback's own is that of its last step
        if self.model.num_timesteps - self._saved_at >= self._interval:
            self._save()
            self._saved_at = self.model.num_timesteps
