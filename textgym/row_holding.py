"""Holding rows of a batched environment: a held row takes no step, whatever is sent to it, until it is let go.

Episodes of a batch end at different times, but a vector environment steps all of its rows. A row holder keeps the finished ones from
being stepped, scored or reset, so that nothing that stands on a row (a reward, the statistics of a wrapper, a random generator) sees
more than the row's own episode. While a holder is engaged, an episode's end does not begin the next one, in any autoreset mode.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import vector as vector_wrappers

from textgym.types import BoolArray, Info
from textgym.worker_holding import AsyncHolder


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


class WithStatistics:
    """Adds to another holder that Gymnasium's own wrappers of the whole batch do not count the steps of held rows.

    They count every row at every step, except, outside `SAME_STEP` mode, a row whose episode ended in the step before. So during a walk
    they work as outside that mode, and held rows look to them as if they had just ended.

    Args:
        holder: what holds the rows.
        wrappers: the wrappers; those that cannot be told (other versions of Gymnasium) are left alone.
    """

    # Where each of them notes whose episode has ended.
    NOTES: ClassVar[dict[type, str]] = {
        vector_wrappers.RecordEpisodeStatistics: "prev_dones",
        vector_wrappers.NormalizeReward: "_prev_dones",
    }

    def __init__(self, holder: RowHolder, wrappers: Sequence[Any]) -> None:
        self._holder = holder
        noted: list[tuple[Any, str]] = [
            (wrapper, note) for wrapper in wrappers for kind, note in self.NOTES.items() if isinstance(wrapper, kind)
        ]
        self._notes = [(wrapper, note) for wrapper, note in noted if hasattr(wrapper, note)]
        self._modes = [wrapper._autoreset_mode for wrapper, _ in self._notes]
        self.holds = holder.holds

    def fresh(self) -> bool:
        """See `RowHolder`."""
        return self._holder.fresh()

    def engage(self) -> None:
        """See `RowHolder`."""
        self._holder.engage()
        for wrapper, _ in self._notes:
            wrapper._autoreset_mode = AutoresetMode.DISABLED

    def hold(self, rows: BoolArray) -> None:
        """See `RowHolder`."""
        self._holder.hold(rows)
        for wrapper, note in self._notes:
            setattr(wrapper, note, rows.astype(getattr(wrapper, note).dtype))

    def release(self) -> None:
        """See `RowHolder`."""
        for (wrapper, _), mode in zip(self._notes, self._modes, strict=True):
            wrapper._autoreset_mode = mode
        self._holder.release()


class HeldMoments:
    """Stands before the running moments of a wrapper during a walk, and keeps held rows from them.

    To all who ask it is the moments themselves: to `isinstance`, and to `pickle` and `copy`, which take those.

    Args:
        moments: Gymnasium's or Stable-Baselines3's `RunningMeanStd`.
    """

    def __init__(self, moments: Any) -> None:
        self.moments = moments
        self.held: BoolArray | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.moments)

    def update(self, batch: Any) -> None:
        """Takes the rows of `batch` (N, ...) that are not held."""
        batch = np.asarray(batch)
        if self.held is not None and batch.shape[:1] == self.held.shape:
            batch = batch[~self.held]
        if len(batch):
            self.moments.update(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.moments, name)

    def __reduce__(self) -> Any:
        return _itself, (self.moments,)


def _itself(value: Any) -> Any:
    return value


class WithMoments:
    """Adds to another holder that wrappers of the whole batch with running moments of all rows do not count held ones.

    Args:
        holder: what holds the rows.
        wrappers: the wrappers; `ret_rms` and `obs_rms`, the latter perhaps by key, are their moments (Stable-Baselines3's `VecNormalize`,
            Gymnasium's `NormalizeObservation`, and what is derived from them).
    """

    NAMES = ("ret_rms", "obs_rms")

    def __init__(self, holder: RowHolder, wrappers: Sequence[Any]) -> None:
        self._holder, self._wrappers = holder, wrappers
        self._guards: list[HeldMoments] = []
        self.holds = holder.holds

    def fresh(self) -> bool:
        """See `RowHolder`."""
        return self._holder.fresh()

    def engage(self) -> None:
        """See `RowHolder`."""
        self._holder.engage()
        self._exchange(self._guarded)

    def hold(self, rows: BoolArray) -> None:
        """See `RowHolder`."""
        self._holder.hold(rows)
        for guard in self._guards:
            guard.held = rows.copy()

    def release(self) -> None:
        """See `RowHolder`."""
        self._exchange(lambda moments: moments.moments if type(moments) is HeldMoments else moments)
        self._guards = []
        self._holder.release()

    def _guarded(self, moments: Any) -> HeldMoments:
        self._guards.append(HeldMoments(moments))
        return self._guards[-1]

    def _exchange(self, change: Callable[[Any], Any]) -> None:
        """Replaces all moments of the wrappers."""
        for wrapper in self._wrappers:
            for name in self.NAMES:
                found = vars(wrapper).get(name)
                if isinstance(found, dict):
                    setattr(wrapper, name, {key: change(moments) for key, moments in found.items()})
                elif found is not None:
                    setattr(wrapper, name, change(found))


def row_holder(layers: Sequence[Any]) -> RowHolder:
    """Returns what holds the rows of a stack.

    Args:
        layers: the batched layers, outermost first. An adapter that brings its own holder has a method `row_holder`.
    """
    holder = _base_holder(layers)
    if counting := [layer for layer in layers if isinstance(layer, tuple(WithStatistics.NOTES))]:
        holder = WithStatistics(holder, counting)
    if averaging := [layer for layer in layers if isinstance(layer, vector_wrappers.NormalizeObservation)]:
        holder = WithMoments(holder, averaging)
    return holder


def _base_holder(layers: Sequence[Any]) -> RowHolder:
    """What holds the rows of the environment at the bottom."""
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
