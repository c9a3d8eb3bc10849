"""Two views: a Stable-Baselines3 `VecEnv` as a Gymnasium `VectorEnv`, and the other way round.

Importing this module imports Stable-Baselines3, and with it torch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecMonitor, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from textgym.row_holding import FillerHolder, ProxyHolder, RowHolder, WithMoments, row_holder
from textgym.stacks import row_environments, vector_layers
from textgym.types import BoolArray, Info
from textgym.vector_infos import batched_infos, row_infos
from textgym.worker_holding import SubprocHolder


def as_gymnasium_vector_env(venv: VecEnv) -> VectorEnv[Any, Any, Any]:
    """Returns a `VecEnv` as a Gymnasium `VectorEnv`: what it is a view of, if it is one, else a view of it."""
    return venv.vector_env if isinstance(venv, StableBaselinesVecEnv) else GymnasiumVectorEnv(venv)


def as_sb3_vec_env(envs: VectorEnv[Any, Any, Any]) -> VecEnv:
    """Returns a Gymnasium `VectorEnv` as a `VecEnv`: what it is a view of, if it is one, else a view of it."""
    return envs.venv if isinstance(envs, GymnasiumVectorEnv) else StableBaselinesVecEnv(envs)


# Attributes of `TextGenVectorEnv` that hold one value per row.
_ATTRIBUTES_PER_ROW = ("next_prompt_index", "np_random", "np_random_seed")


class GymnasiumVectorEnv(VectorEnv[Any, Any, Any]):
    """A Stable-Baselines3 `VecEnv` seen as a Gymnasium `VectorEnv` in autoreset mode `SAME_STEP`.

    The info of a row's last step, as the `VecEnv` gives it (with `terminal_observation` and `TimeLimit.truncated`), is in `final_info`,
    its last observation in `final_obs`; the infos of resets are those of `VecEnv.reset_infos`.

    Args:
        venv: the `VecEnv`, with any wrappers.
    """

    def __init__(self, venv: VecEnv) -> None:
        self.venv = venv
        self.num_envs = venv.num_envs
        self.single_observation_space, self.single_action_space = venv.observation_space, venv.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.render_mode = venv.render_mode
        self.metadata = {**venv.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}

    @property
    def inner_vector_env(self) -> VectorEnv[Any, Any, Any] | None:
        """The vector environment that the innermost `VecEnv` is a view of, or None."""
        base = self.venv.unwrapped
        return base.vector_env if isinstance(base, StableBaselinesVecEnv) else None

    @property
    def is_transparent(self) -> bool:
        """Does no `VecEnvWrapper` stand between that could change observations or actions?"""
        venv = self.venv
        while type(venv) is VecMonitor:
            venv = venv.venv
        return not isinstance(venv, VecEnvWrapper)

    def row_environments(self) -> list[gym.Env] | None:
        """Returns the rows if they are environments of this process."""
        base = self.venv.unwrapped
        return base.envs if isinstance(base, DummyVecEnv) else None

    def row_holder(self) -> RowHolder:
        """Returns what holds rows during a walk (see `textgym.row_holding`)."""
        normalising = [layer for layer in _vec_env_layers(self.venv) if isinstance(layer, VecNormalize)]
        return WithMoments(self._base_holder(), normalising) if normalising else self._base_holder()

    def _base_holder(self) -> RowHolder:
        base = self.venv.unwrapped
        if isinstance(base, DummyVecEnv):
            return ProxyHolder(base.envs)
        if isinstance(base, SubprocVecEnv):
            return SubprocHolder(base)
        return _ViewHolder(base) if isinstance(base, StableBaselinesVecEnv) else FillerHolder(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Info]:
        """Resets all rows.

        Args:
            seed: row i is seeded with `seed + i`.
            options: options for every row, or a list of one dict per row. A `VecEnv` cannot reset some rows only.
        """
        if isinstance(options, Mapping) and "reset_mask" in options:
            options = dict(options)
            if not np.all(options.pop("reset_mask")):
                raise ValueError("`options['reset_mask']` must be all True: a Stable-Baselines3 `VecEnv` resets all its rows or none.")
        if seed is not None:
            self.venv.seed(seed)
        if options:
            self.venv.set_options(options)
        observations = self.venv.reset()
        return observations, batched_infos(_reset_infos(self.venv))

    def step(self, actions: npt.NDArray[Any]) -> tuple[Any, npt.NDArray[Any], BoolArray, BoolArray, Info]:
        """Steps all rows; rows that end are reset at once."""
        observations, rewards, dones, row_infos = self.venv.step(np.asarray(actions))
        dones = np.asarray(dones, dtype=np.bool_)
        truncated = dones & np.array([bool(info.get("TimeLimit.truncated", False)) for info in row_infos])
        infos = batched_infos([_ended_info(info, i, self.venv) if dones[i] else info for i, info in enumerate(row_infos)])
        return observations, rewards, dones & ~truncated, truncated, infos

    def render(self) -> Any:
        """Renders as the `VecEnv` does."""
        return self.venv.render()

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the `VecEnv`."""
        self.venv.close()

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Calls the method `name` of every row, or reads the attribute `name`, as `SyncVectorEnv.call` does."""
        values = self.venv.get_attr(name)
        return tuple(self.venv.env_method(name, *args, **kwargs)) if callable(values[0]) else tuple(values)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Reads the attribute `name` of every row."""
        return tuple(self.venv.get_attr(name))

    def set_attr(self, name: str, values: Any) -> None:
        """Sets the attribute `name` of every row, where it is defined in a row's stack; a list or tuple holds one value per row."""
        values = values if isinstance(values, list | tuple) else [values] * self.num_envs
        if len(values) != self.num_envs:
            raise ValueError(f"`values` must be one value or one per row: {self.num_envs} rows, got {len(values)} values.")
        # `VecEnv.set_attr` of the outermost wrapper would set it there, where nobody reads it.
        if isinstance(base := self.venv.unwrapped, StableBaselinesVecEnv):
            base.set_rows(name, values)
            return
        for i, value in enumerate(values):
            self.venv.env_method("set_wrapper_attr", name, value, indices=i)


class StableBaselinesVecEnv(VecEnv):
    """A Gymnasium `VectorEnv` seen as a Stable-Baselines3 `VecEnv`: rows that end are reset in the same step.

    Args:
        envs: the vector environment, in any autoreset mode, with any wrappers. Outside `SAME_STEP` mode rows are reset with
            `options["reset_mask"]`, which every wrapper on it has to pass on.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        self.vector_env = envs
        self._same_step = envs.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP
        if envs.metadata.get("autoreset_mode") == AutoresetMode.NEXT_STEP and getattr(envs.unwrapped, "shared_memory", True) is False:
            raise ValueError(
                "`envs` is an `AsyncVectorEnv` with `shared_memory=False` in `NEXT_STEP` mode, whose workers would reset a row that was "
                "reset already. Make it with `shared_memory=True` or with `autoreset_mode=AutoresetMode.SAME_STEP`."
            )
        self.held = False
        self._actions: npt.NDArray[Any] | None = None
        self.num_envs = envs.num_envs
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> VecEnvObs:
        """Resets all rows, with the seeds and options set for them."""
        seeds: Any = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        observations, infos = self.vector_env.reset(seed=seeds, options=_merged_options(self._options))
        self.reset_infos = row_infos(infos, range(self.num_envs))
        self._reset_seeds()
        self._reset_options()
        return observations  # type: ignore[no-any-return]

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Notes the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Steps all rows and resets those that end."""
        observations, rewards, terminated, truncated, infos = self.vector_env.step(self._actions)
        dones = np.logical_or(terminated, truncated)
        last = row_infos(infos, range(self.num_envs))
        for i, info in _numbered(infos.get("final_info", {}), dones) if self._same_step else ():
            last[i] = info
        for info, cut in zip(last, np.logical_and(truncated, np.logical_not(terminated)).tolist(), strict=True):
            info["TimeLimit.truncated"] = cut
        if dones.any():
            observations = self._start_over(dones, observations, infos, last)
        return observations, np.asarray(rewards, dtype=np.float32), dones, last

    def _start_over(self, dones: BoolArray, observations: Any, infos: Info, last: list[Info]) -> Any:
        """Puts the last observations of ended rows into their infos; returns the observations after their resets."""
        for i in np.flatnonzero(dones).tolist():
            last[i]["terminal_observation"] = infos["final_obs"][i] if self._same_step else _row(observations, i)
        if not self._same_step and not self.held:
            observations, infos = self.vector_env.reset(options={"reset_mask": dones.copy()})
        for i, info in _numbered(infos, dones):  # a held row was not reset
            self.reset_infos[i] = {} if self.held else {k: value for k, value in info.items() if k not in ("final_info", "final_obs")}
        return observations

    def close(self) -> None:
        """Closes the vector environment."""
        self.vector_env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Reads an attribute: of each row where rows have their own, else that of the batched environment for every row."""
        values = self._row_values(attr_name)
        return [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of rows: of the rows' own environments, else of the batched environment (which must have it).

        An attribute of a batched environment that holds one value per row is changed in the rows of `indices` only.
        """
        rows = set(self._get_indices(indices))
        everywhere = len(rows) == self.num_envs
        if everywhere and not callable(getattr(self.vector_env.unwrapped, "set_attr", None)):
            setattr(self._owner(attr_name), attr_name, value)
            return
        values = [value] * self.num_envs if everywhere else self._row_values(attr_name)
        self.set_rows(attr_name, [value if i in rows else old for i, old in enumerate(values)])

    def set_rows(self, attr_name: str, values: Sequence[Any]) -> None:
        """Sets an attribute of every row, `values[i]` of row i: of the rows' own environments, else of the batched environment."""
        base: Any = self.vector_env.unwrapped
        if callable(getattr(base, "set_attr", None)):
            base.set_attr(attr_name, list(values))
        elif attr_name in _ATTRIBUTES_PER_ROW or any(value is not values[0] for value in values):
            setattr(self._owner(attr_name), attr_name, list(values))
        else:
            setattr(self._owner(attr_name), attr_name, values[0])

    def env_method(self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any) -> list[Any]:
        """Calls a method of rows: of the rows' own environments, else once of the batched environment, whose answer is split by rows."""
        rows = list(self._get_indices(indices))
        base: Any = self.vector_env.unwrapped
        if method_name in _OF_WRAPPERS and row_environments(base) is None:
            return [_OF_WRAPPERS[method_name](self, row, *method_args, **method_kwargs) for row in rows]
        if environments := row_environments(base):
            return [environments[i].get_wrapper_attr(method_name)(*method_args, **method_kwargs) for i in rows]
        if len(rows) < self.num_envs and callable(getattr(base, "call", None)):
            raise ValueError(f"`indices` must be all rows: {type(base).__name__} calls `{method_name}` in every worker or in none.")
        call = base.call if callable(getattr(base, "call", None)) else None
        answer = (
            call(method_name, *method_args, **method_kwargs)
            if call
            else getattr(self._owner(method_name), method_name)(*method_args, **method_kwargs)
        )
        return [answer[i] if _is_batch(answer, self.num_envs) else answer for i in rows]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Tells which rows have a wrapper; a batched environment's rows have none of their own."""
        environments = row_environments(self.vector_env.unwrapped)
        return [environments is not None and is_wrapped(environments[i], wrapper_class) for i in self._get_indices(indices)]

    def get_images(self) -> Sequence[npt.NDArray[Any] | None]:
        """Returns a picture of each row in render mode "rgb_array"; otherwise none: texts are rendered as text."""
        pictures: Any = self.vector_env.render() if self.render_mode == "rgb_array" else None
        return [None] * self.num_envs if pictures is None else list(pictures)

    def _owner(self, name: str) -> Any:
        """The outermost batched layer that has the attribute `name`."""
        for layer in vector_layers(self.vector_env):
            if hasattr(layer, name):
                return layer
        raise AttributeError(f"No layer of {self.vector_env} has an attribute {name!r}.")

    def _row_values(self, name: str) -> list[Any]:
        """An attribute's value for each row."""
        base: Any = self.vector_env.unwrapped
        if name != "render_mode" and callable(getattr(base, "get_attr", None)):
            return list(base.get_attr(name))
        value = getattr(self._owner(name), name)
        # A tuple may as well be one value for all rows, such as the end tokens.
        per_row = isinstance(value, np.ndarray) or name in _ATTRIBUTES_PER_ROW
        return list(value) if per_row and _is_batch(value, self.num_envs) else [value] * self.num_envs


# What Gymnasium's single environments have for attributes anywhere on their stack, said of a row of a batched one.
_OF_WRAPPERS: dict[str, Callable[..., Any]] = {
    "get_wrapper_attr": lambda view, row, name: view.get_attr(name, row)[0],
    "set_wrapper_attr": lambda view, row, name, value, **_: view.set_attr(name, value, row),
    "has_wrapper_attr": lambda view, row, name: _has(view, row, name),
}


def _has(view: StableBaselinesVecEnv, row: int, name: str) -> bool:
    try:
        view.get_attr(name, row)
    except AttributeError:
        return False
    return True


def _vec_env_layers(venv: VecEnv) -> Iterator[VecEnv]:
    """Yields the layers of a `VecEnv`, outermost first."""
    yield venv
    if isinstance(venv, VecEnvWrapper):
        yield from _vec_env_layers(venv.venv)


class _ViewHolder:
    """Holds rows below a `StableBaselinesVecEnv`, which otherwise resets rows that end."""

    def __init__(self, view: StableBaselinesVecEnv) -> None:
        self._view = view
        self._inner = row_holder(list(vector_layers(view.vector_env)))
        self.holds = self._inner.holds

    def fresh(self) -> bool:
        """See `RowHolder`."""
        return self._inner.fresh()

    def engage(self) -> None:
        """See `RowHolder`."""
        self._view.held = self.holds
        self._inner.engage()

    def hold(self, rows: BoolArray) -> None:
        """See `RowHolder`."""
        self._inner.hold(rows)

    def release(self) -> None:
        """See `RowHolder`."""
        self._inner.release()
        self._view.held = False


def _reset_infos(venv: VecEnv) -> list[Info]:
    """The infos of the last resets; a `VecEnvWrapper` has a list of its own, which Stable-Baselines3 leaves empty."""
    return venv.reset_infos if any(venv.reset_infos) else venv.unwrapped.reset_infos


def _ended_info(info: Info, row: int, venv: VecEnv) -> Info:
    """The info of a row that ended and was reset, in Gymnasium's form."""
    return {**_reset_infos(venv)[row], "final_obs": info.get("terminal_observation"), "final_info": dict(info)}


def _numbered(infos: Info, rows: BoolArray) -> Iterator[tuple[int, Info]]:
    """Yields the number and the info of each of `rows` (N,) bool."""
    numbers = np.flatnonzero(rows).tolist()
    yield from zip(numbers, row_infos(infos, numbers), strict=True)


def _row(observations: Any, row: int) -> Any:
    """One row of batched observations, as its own."""
    if isinstance(observations, Mapping):
        return {key: np.array(value[row]) for key, value in observations.items()}
    return np.array(observations[row])


def _is_batch(value: Any, num_envs: int) -> bool:
    """Has this value one entry per row?"""
    return isinstance(value, tuple | list | np.ndarray) and np.ndim(value) > 0 and len(value) == num_envs


def _merged_options(options: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One options dict per row as one for all rows: values that differ become lists."""
    if not any(options):
        return None
    keys = list(options[0])
    if any(list(row) != keys for row in options):
        raise ValueError(f"The options of all rows must have the same keys, got {[list(row) for row in options]}.")
    merged: dict[str, Any] = {}
    for key in keys:
        values = [row[key] for row in options]
        merged[key] = values[0] if all(value == values[0] for value in values) else values
    return merged
