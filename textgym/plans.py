"""Plans: the whole completions that a walk is going to send, checked, and made known to the wrappers on the way."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import wrappers as single_wrappers
from gymnasium.vector import VectorEnv, VectorRewardWrapper, VectorWrapper
from gymnasium.wrappers import vector as vector_wrappers

from textgym.row_holding import HeldEnv
from textgym.stacks import definer, row_environments, single_layers
from textgym.types import BoolArray, IntArray, Observation

# Wrappers that change neither observations nor actions: what is known above them holds below.
_TRANSPARENT_BATCHED = (vector_wrappers.RecordEpisodeStatistics, vector_wrappers.NormalizeReward)
_TRANSPARENT = (
    HeldEnv,
    single_wrappers.NormalizeReward,
    single_wrappers.OrderEnforcing,
    single_wrappers.PassiveEnvChecker,
    single_wrappers.RecordEpisodeStatistics,
    single_wrappers.TimeLimit,
)


class Plan(NamedTuple):
    """Whole completions to send, checked.

    Attributes:
        actions: (N, T) int64, 0 where they do not count.
        lengths: (N,) int64, 1 to T.
        log_probs: (N, T) float64 or None.
    """

    actions: IntArray
    lengths: IntArray
    log_probs: npt.NDArray[np.float64] | None


def checked_plan(envs: VectorEnv[Any, Any, Any], actions: Any, lengths: Any, log_probs: Any) -> Plan:
    """Returns the arguments of a walk, checked; tokens that do not count are 0."""
    actions, lengths, count = np.asarray(actions), np.asarray(lengths), envs.num_envs
    if actions.ndim != 2 or actions.shape[0] != count or actions.shape[1] == 0 or actions.dtype.kind not in "iu":
        raise ValueError(f"`actions` must be integers of shape (num_envs, T) = ({count}, T), got {actions.dtype} of shape {actions.shape}.")
    width = actions.shape[1]
    if lengths.shape != (count,) or lengths.dtype.kind not in "iu":
        raise ValueError(f"`lengths` must be integers of shape (num_envs,) = ({count},), got {lengths.dtype} of shape {lengths.shape}.")
    if not ((lengths >= 1) & (lengths <= width)).all():
        row = int(np.flatnonzero((lengths < 1) | (lengths > width))[0])
        raise ValueError(f"`lengths` must be from 1 to T = {width}, the columns of `actions`, got {int(lengths[row])} in row {row}.")
    mask = np.arange(width) < lengths[:, None]
    _check_range(envs, actions, mask)
    if log_probs is not None:
        log_probs = np.asarray(log_probs, dtype=np.float64)
        if log_probs.shape != actions.shape:
            raise ValueError(f"`log_probs` must have the shape of `actions`, {actions.shape}, got {log_probs.shape}.")
        log_probs = np.where(mask, log_probs, 0.0)
    return Plan(np.where(mask, actions, 0).astype(np.int64), lengths.astype(np.int64), log_probs)


def prime_stack(layers: Sequence[Any], plan: Plan, observations: Observation | None = None) -> None:
    """Makes a plan known to every wrapper of a stack that prepares for one, the wrappers of single rows included.

    Log-probabilities are handed down through layers that change neither observations nor actions. Below any other they may be those of
    other states; there they go to batched layers only that see the very prompts they were worked out for. (What such a layer prepares
    holds for the planned tokens behind these prompts and for nothing else, so changed actions do no harm.)

    Args:
        layers: the batched layers, outermost first.
        plan: what will be sent.
        observations: what the outermost layer shows at the beginning, which the log-probabilities belong to; None if that is not known.
    """
    known = True
    for layer in layers:
        if callable(prime := getattr(layer, "prime", None)):
            prime(plan.actions, plan.lengths, plan.log_probs if known or _shows(layer, observations) else None)
        known = known and _is_transparent_batched(layer)
    for base in layers:
        _prime_rows(row_environments(base) or (), plan if known else plan._replace(log_probs=None))


def _shows(layer: Any, observations: Observation | None) -> bool:
    """Does a layer say that it sees these observations?"""
    shows = getattr(layer, "shows", None)
    return observations is not None and callable(shows) and bool(shows(observations))


def _prime_rows(rows: Iterable[gym.Env], plan: Plan) -> None:
    """Primes wrappers of single rows, those of one class together."""
    found: dict[type, list[tuple[int, Any]]] = defaultdict(list)
    log_probs = plan.log_probs
    for i, row in enumerate(rows):
        transparent = True
        for layer in single_layers(row):
            # Looked up on the class, since a row's stand-in passes the attributes of what it stands for.
            if hasattr(type(layer), "prime_rows"):
                found[type(layer)].append((i, layer))
                if not transparent:
                    log_probs = None
            transparent = transparent and _is_transparent(layer)
    for cls, members in found.items():
        at = np.array([i for i, _ in members])
        cls.prime_rows(  # type: ignore[attr-defined]
            [layer for _, layer in members], plan.actions[at], plan.lengths[at], None if log_probs is None else log_probs[at]
        )


def _is_transparent_batched(layer: Any) -> bool:
    """Does a batched layer leave observations and actions alone, as far as can be known?"""
    if isinstance(layer, VectorRewardWrapper):
        return definer(type(layer), "step") is VectorRewardWrapper and definer(type(layer), "reset") is VectorWrapper
    if isinstance(layer, VectorWrapper):
        return type(layer) in _TRANSPARENT_BATCHED or callable(getattr(layer, "prime", None)) or _changes_rewards_only(layer)
    return bool(getattr(layer, "is_transparent", True))


def _is_transparent(layer: gym.Env) -> bool:
    """Does a layer of a single row leave observations and actions alone, as far as can be known?"""
    if isinstance(layer, gym.RewardWrapper):
        return definer(type(layer), "step") is gym.RewardWrapper and definer(type(layer), "reset") is gym.Wrapper
    if isinstance(layer, gym.Wrapper):
        # Stable-Baselines3's `Monitor` by name, so as not to import it (and torch).
        named = f"{type(layer).__module__}.{type(layer).__qualname__}"
        return type(layer) in _TRANSPARENT or named == "stable_baselines3.common.monitor.Monitor" or _changes_rewards_only(layer)
    return True


def _changes_rewards_only(layer: Any) -> bool:
    """Is a layer of a class that says so, and did no class derived from it change how it steps?"""
    cls = type(layer)
    if not getattr(cls, "changes_rewards_only", False):
        return False
    owner = definer(cls, "changes_rewards_only")
    return definer(cls, "step") is owner and definer(cls, "reset") is owner


def _check_range(envs: VectorEnv[Any, Any, Any], actions: npt.NDArray[Any], mask: BoolArray) -> None:
    """Refuses tokens that count and are none."""
    space = envs.single_action_space
    if not isinstance(space, gym.spaces.Discrete):
        raise ValueError(f"`envs` must have a `Discrete` action space of tokens, got {space}.")
    bad = mask & ((actions < space.start) | (actions >= space.start + space.n))
    if bad.any():
        row, step = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"`actions` must be token ids from {space.start} to {space.start + space.n - 1}, got {int(actions[row, step])} "
            f"(row {row}, token {step})."
        )
