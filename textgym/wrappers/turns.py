"""Which rows of a vector environment acted in a step, and where the infos of their episodes' last steps belong: for batched wrappers."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv

from textgym.types import BoolArray, Info
from textgym.vector_infos import put


class Turn(NamedTuple):
    """What one step was to each row, (N,) bool each.

    Attributes:
        acted: it took a step of its own: it was neither held nor reset in place of a step.
        ended: that step ended its episode.
        restarted: its next episode has begun, with the observation that the step returned.
    """

    acted: BoolArray
    ended: BoolArray
    restarted: BoolArray


class RowTurns:
    """Follows a vector environment through its steps, in any autoreset mode, with rows held or not.

    Args:
        env: the environment below the wrapper.

    Attributes:
        held: (N,) bool, the rows that are held.
        ended: (N,) bool, the rows whose episode has ended (or never begun) and which were not reset since.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.ended: BoolArray = np.ones(env.num_envs, dtype=np.bool_)
        self.held: BoolArray = np.zeros(env.num_envs, dtype=np.bool_)

    def reset(self, options: dict[str, Any] | None) -> tuple[BoolArray, dict[str, Any] | None]:
        """Notes a reset. Returns its rows, (N,) bool, and a copy of the options: `SyncVectorEnv` takes the mask out of them."""
        rows = np.ones(len(self.held), dtype=np.bool_)
        if options is not None:
            rows = np.array(options.get("reset_mask", rows))
            options = dict(options)
        self.held[rows], self.ended[rows] = False, False
        return rows, options

    def hold(self, mask: BoolArray | None) -> None:
        """Notes which rows are held from now on; None: none."""
        self.held = np.zeros(len(self.held), dtype=np.bool_) if mask is None else np.array(mask, dtype=np.bool_)

    def step(self, terminated: npt.NDArray[Any], truncated: npt.NDArray[Any]) -> Turn:
        """Notes a step and says what it was to each row."""
        restarted = ~self.held & self.ended
        if self.mode != AutoresetMode.NEXT_STEP:
            restarted[:] = False
        acted = ~self.held & ~restarted
        ended = np.logical_or(terminated, truncated) & acted
        self.ended = ended | (self.ended & self.held)
        if self.mode == AutoresetMode.SAME_STEP:
            restarted, self.ended = ended, self.ended & self.held
        return Turn(acted, ended, restarted)

    def add_keys(self, infos: Info, turn: Turn, step: dict[str, npt.NDArray[Any]], episode: dict[str, npt.NDArray[Any]]) -> Info:
        """Returns `infos` with the `step` keys of rows that acted and the `episode` keys of those that ended, where this mode has them."""
        infos = dict(infos)
        if self.mode != AutoresetMode.SAME_STEP:
            for key, values in step.items():
                put(infos, key, values, turn.acted)
            for key, values in episode.items():
                put(infos, key, values, turn.ended)
            return infos
        for key, values in step.items():
            put(infos, key, values, turn.acted & ~turn.ended)
        if turn.ended.any():
            final = dict(infos.get("final_info", {}))
            for key, values in {**step, **episode}.items():
                put(final, key, values, turn.ended)
            infos["final_info"], infos["_final_info"] = final, turn.ended | infos.get("_final_info", False)
        return infos
