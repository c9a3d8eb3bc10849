"""Holding rows of a batched environment: a held row takes no step, whatever is sent to it, until it is let go.

Episodes of a batch end at different times, but a vector environment steps all of its rows. A row holder keeps the finished ones from
being stepped, scored or reset, so that nothing that stands on a row (a reward, the statistics of a wrapper, a random generator) sees
more than the row's own episode. While a holder is engaged, an episode's end does not begin the next one, in any autoreset mode.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from textgym.types import BoolArray, Info


class RowHolder(Protocol):
    """What a walk asks of the environment at the bottom of the stack.

    Attributes:
        holds: False if the environment cannot hold rows; ended ones may then go on with a next episode.
    """

    holds: bool

    def fresh(self) -> bool:
        """Is every row freshly reset, as far as can be known?"""

    def engage(self) -> None:
        """From now on a row that ends is held instead of being reset."""

    def hold(self, rows: BoolArray) -> None:
        """Holds `rows` (N,), besides those that have ended. Called after every step."""

    def release(self) -> None:
        """Ends holding. Every row needs a reset then; where rows can tell, a step without one is their error."""


class NativeHolder:
    """Holds rows of an environment that can do it itself: `hold_rows` and the attribute `hold` of `TextGenVectorEnv`."""

    holds = True

    def __init__(self, base: Any) -> None:
        self._base = base

    def fresh(self) -> bool:
        """See `RowHolder`."""
        return bool(np.all(getattr(self._base, "fresh", True)))

    def engage(self) -> None:
        """See `RowHolder`."""
        self._base.hold = True

    def hold(self, rows: BoolArray) -> None:
        """See `RowHolder`."""
        self._base.hold_rows(rows)

    def release(self) -> None:
        """See `RowHolder`."""
        self._base.hold = False
        if callable(require_reset := getattr(self._base, "require_reset", None)):
            require_reset()


class HeldEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Stands before one row's environment during a walk, and keeps steps and resets from it once the row is held.

    Args:
        env: the row's environment with all its wrappers.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.held = False
        self._observation: Any = None

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, Info]:
        """Steps the row; a held one gives its last observation and nothing else."""
        if self.held:
            return self._observation, 0.0, False, False, {}
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._observation = observation
        self.held = bool(terminated or truncated)
        return observation, reward, terminated, truncated, info

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        """Does nothing for a held row (this is how a vector environment would begin its next episode)."""
        if self.held:
            return self._observation, {}
        return self.env.reset(seed=seed, options=options)

    def __getattr__(self, name: str) -> Any:
        # Whoever looks into the rows during a walk finds what is there without it.
        if name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)


class ProxyHolder:
    """Holds rows of an environment that keeps its rows as environments of this process in a list.

    Args:
        rows: that list (`SyncVectorEnv.envs`, `DummyVecEnv.envs`), changed in place.
    """

    holds = True

    def __init__(self, rows: list[gym.Env]) -> None:
        self._rows = rows
        self._proxies: list[HeldEnv] = []

    def fresh(self) -> bool:
        """See `RowHolder`."""
        return all(env.get_wrapper_attr("fresh") for env in self._rows if env.has_wrapper_attr("fresh"))

    def engage(self) -> None:
        """See `RowHolder`."""
        self._proxies = [HeldEnv(env) for env in self._rows]
        self._rows[:] = self._proxies

    def hold(self, rows: BoolArray) -> None:
        """See `RowHolder`."""
        for i in np.flatnonzero(rows):
            self._proxies[i].held = True

    def release(self) -> None:
        """See `RowHolder`."""
        self._rows[:] = [proxy.env for proxy in self._proxies]
        for env in self._rows:
            if env.has_wrapper_attr("require_reset"):
                env.get_wrapper_attr("require_reset")()


class SyncHolder(ProxyHolder):
    """Holds rows of a `SyncVectorEnv`, whose own note of which rows to reset next is kept clear."""

    def __init__(self, base: SyncVectorEnv) -> None:
        super().__init__(base.envs)
        self._base = base

    def hold(self, rows: BoolArray) -> None:
        """See `RowHolder`."""
        super().hold(rows)
        self._base._autoreset_envs[:] = False


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


class FillerHolder:
    """For a batched environment of somebody else's, which cannot hold rows: finished ones are stepped on, as in any loop over it.

    Args:
        base: the environment; its `DISABLED` autoreset mode cannot be walked, since an ended row must not be stepped in it.
    """

    holds = False

    def __init__(self, base: VectorEnv[Any, Any, Any]) -> None:
        if base.metadata.get("autoreset_mode") == AutoresetMode.DISABLED:
            raise ValueError(
                f"{type(base).__name__} in autoreset mode `DISABLED` cannot be walked: its rows end at different times, and it cannot hold "
                "those that have ended. Give it a method `hold_rows(mask)` and an attribute `hold` as `TextGenVectorEnv` has, or another "
                "autoreset mode."
            )

    def fresh(self) -> bool:
        """It cannot be known."""
        return True

    def engage(self) -> None:
        """Nothing can be done."""

    def hold(self, rows: BoolArray) -> None:
        """Nothing can be done."""

    def release(self) -> None:
        """Nothing was done."""


def row_holder(layers: Sequence[Any]) -> RowHolder:
    """Returns what holds the rows of a stack.

    Args:
        layers: the batched layers, outermost first. An adapter that brings its own holder has a method `row_holder`.
    """
    base = layers[-1]
    for layer in layers:
        if callable(own := getattr(layer, "row_holder", None)):
            return own()  # type: ignore[no-any-return]
    if callable(getattr(base, "hold_rows", None)):
        return NativeHolder(base)
    if isinstance(base, SyncVectorEnv):
        return SyncHolder(base)
    if isinstance(base, AsyncVectorEnv):
        return AsyncHolder(base)
    return FillerHolder(base)
