"""Checks of what users hand to `reset` and to the constructors: each failure is one clear `ValueError`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from textgym.types import BoolArray


class RenderModeError(ValueError, TypeError):
    """An unknown render mode.

    A `TypeError` too, because Stable-Baselines3 asks every environment that it makes by its id for `"rgb_array"`, and makes it without a
    render mode when that raises a `TypeError`.
    """


def check_render_mode(render_mode: str | None, metadata: Mapping[str, Any]) -> str | None:
    """Returns `render_mode` if it is None or one of the modes in `metadata`."""
    if render_mode is not None and render_mode not in metadata["render_modes"]:
        raise RenderModeError(f"`render_mode` must be None or one of {metadata['render_modes']}, got {render_mode!r}.")
    return render_mode


def check_seed(seed: Any, argument: str = "seed") -> int | None:
    """Returns `seed` as an int, or None."""
    if seed is None:
        return None
    if isinstance(seed, bool | np.bool_) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"`{argument}` must be None or an integer of at least 0, got {seed!r}.")
    return int(seed)


def check_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """Returns one seed per row: `seed`, `seed + 1`, ... for a number, as Gymnasium's vector environments do."""
    if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str):
        if len(seed) != num_envs:
            raise ValueError(f"`seed` given as a list must hold one seed per row: {num_envs} rows, got {len(seed)} seeds.")
        return [check_seed(one, f"seed[{row}]") for row, one in enumerate(seed)]
    first = check_seed(seed)
    return [None if first is None else first + row for row in range(num_envs)]


def check_options(options: Any, known: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of the reset options, after checking that all of them are known and only one chooses the prompt."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ValueError(f"`options` must be None or a dict, got {type(options).__name__}.")
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"`options` may have the keys {', '.join(known)}, got {', '.join(map(repr, unknown))}.")
    if "prompt_index" in options and "prompt" in options:
        raise ValueError('`options` must have either "prompt_index" or "prompt", got both; leave one out.')
    return dict(options)


def check_mask(mask: Any, num_envs: int, argument: str) -> BoolArray:
    """Returns a (num_envs,) bool array."""
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (num_envs,):
        shown = f"shape {mask.shape}, dtype {mask.dtype}" if isinstance(mask, np.ndarray) else repr(mask)
        raise ValueError(f"`{argument}` must be a bool numpy array of shape ({num_envs},), one entry per row, got {shown}.")
    return mask


def check_autoreset_mode(mode: Any) -> AutoresetMode:
    """Returns an `AutoresetMode` for itself, its value (`"NextStep"`) or its name (`"NEXT_STEP"`)."""
    if isinstance(mode, AutoresetMode):
        return mode
    for known in AutoresetMode:
        if mode in (known.value, known.name):
            return known
    raise ValueError(f"`autoreset_mode` must be an AutoresetMode or one of {[known.value for known in AutoresetMode]}, got {mode!r}.")
