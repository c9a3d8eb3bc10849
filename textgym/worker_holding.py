"""Holding rows that live in worker processes, of Gymnasium or of Stable-Baselines3 (see `textgym.row_holding`)."""

from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from textgym.types import BoolArray


class HeldConnection:
    """Stands before the pipe to one row's worker process during a walk, and answers steps of a held row itself.

    Args:
        connection: the pipe.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.held = False
        self.last: Any = None  # the worker's last answer to a step
        self._answers = False
        self._steps = False

    def send(self, message: tuple[str, Any]) -> None:
        """Sends a message to the worker, unless it is a step of a held row."""
        self._steps = message[0] == "step"
        self._answers = self._steps and self.held
        if not self._answers:
            self.connection.send(message)

    def recv(self) -> Any:
        """Returns the worker's answer, or a held row's."""
        if self._answers:
            self._answers = False
            return self.still()
        answer = self.connection.recv()
        if self._steps:
            self.last, self._steps = answer, False
        return answer

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Is there an answer?"""
        return self._answers or self.connection.poll(timeout)

    def still(self) -> Any:
        """The answer of a Gymnasium worker whose row does not move."""
        (observation, *_), _ = self.last
        return (observation, 0.0, False, False, {}), True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


class HeldRemote(HeldConnection):
    """The same for a worker of Stable-Baselines3, which answers in another form."""

    def still(self) -> Any:
        """The answer of a Stable-Baselines3 worker whose row does not move."""
        observation, *_, reset_info = self.last
        return observation, 0.0, False, {"TimeLimit.truncated": False}, reset_info


class AsyncHolder:
    """Holds rows of an `AsyncVectorEnv`, whose workers reset a row that ends: the rows' `hold` makes that reset do nothing."""

    holds = True

    def __init__(self, base: AsyncVectorEnv) -> None:
        self._base = base
        self._pipes: list[HeldConnection] = []

    def fresh(self) -> bool:
        """See `RowHolder`."""
        return not self._all_have("fresh") or all(self._base.get_attr("fresh"))

    def _all_have(self, name: str) -> bool:
        return all(self._base.call("has_wrapper_attr", name))

    def engage(self) -> None:
        """See `RowHolder`."""
        self._base.set_attr("hold", True)
        self._pipes = [HeldConnection(pipe) for pipe in self._base.parent_pipes]
        self._base.parent_pipes[:] = self._pipes  # type: ignore[assignment]

    def hold(self, rows: BoolArray) -> None:
        """See `RowHolder`."""
        for i in np.flatnonzero(rows):
            self._pipes[i].held = True

    def release(self) -> None:
        """See `RowHolder`."""
        pipes: list[Any] = self._base.parent_pipes
        pipes[:] = [pipe.connection if isinstance(pipe, HeldConnection) else pipe for pipe in pipes]
        if any(pipe is None for pipe in pipes):
            return  # a worker died, and the vector environment with it
        if self._base.autoreset_mode == AutoresetMode.NEXT_STEP and not self._base.shared_memory:
            self._spend_autoresets()
        self._base.set_attr("hold", False)
        if self._all_have("require_reset"):
            self._base.call("require_reset")

    def _spend_autoresets(self) -> None:
        """Steps the workers of ended rows once more, which resets them, which does nothing while they are held.

        Without shared memory a worker does not forget, at an explicit reset, that its row was to be reset: the first step after it would.
        """
        ended = [pipe.connection for pipe in self._pipes if pipe.last is not None and (pipe.last[0][2] or pipe.last[0][3])]
        for connection in ended:
            connection.send(("step", 0))
        for connection in ended:
            connection.recv()


class SubprocHolder:
    """Holds rows of a Stable-Baselines3 `SubprocVecEnv`, whose workers reset a row that ends by themselves, as those of Gymnasium do."""

    holds = True

    def __init__(self, venv: Any) -> None:
        self._venv = venv
        self._remotes: tuple[HeldRemote, ...] = ()

    def fresh(self) -> bool:
        """See `RowHolder`."""
        return not self._all_have("fresh") or all(self._venv.get_attr("fresh"))

    def _all_have(self, name: str) -> bool:
        return all(self._venv.env_method("has_wrapper_attr", name))

    def engage(self) -> None:
        """See `RowHolder`."""
        self._venv.env_method("set_wrapper_attr", "hold", True)
        self._remotes = tuple(HeldRemote(remote) for remote in self._venv.remotes)
        self._venv.remotes = self._remotes

    def hold(self, rows: BoolArray) -> None:
        """See `RowHolder`."""
        for i in np.flatnonzero(rows):
            self._remotes[i].held = True

    def release(self) -> None:
        """See `RowHolder`."""
        self._venv.remotes = tuple(remote.connection for remote in self._remotes)
        self._venv.env_method("set_wrapper_attr", "hold", False)
        if self._all_have("require_reset"):
            self._venv.env_method("require_reset")
