"""Looking through stacks of wrappers: which layers stand on an environment, and which environments its rows are."""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
from gymnasium.vector import SyncVectorEnv, VectorWrapper


def vector_layers(envs: Any) -> Iterator[Any]:
    """Yields the batched layers of a stack, outermost first, the batched environment itself last.

    Looks through the adapters of `textgym.vec_env_adapter`: below a Stable-Baselines3 view of a vector environment of ours, that
    environment's own layers follow.
    """
    yield envs
    if isinstance(envs, VectorWrapper):
        yield from vector_layers(envs.env)
    elif (inner := getattr(envs, "inner_vector_env", None)) is not None:
        yield from vector_layers(inner)


def row_environments(base: Any) -> list[gym.Env] | None:
    """Returns the environments that a batched environment steps one by one in this process, row by row; None if it has none such."""
    if isinstance(base, SyncVectorEnv):
        return base.envs
    rows = getattr(base, "row_environments", None)
    return rows() if callable(rows) else None


def single_layers(env: gym.Env) -> Iterator[gym.Env]:
    """Yields the layers of a single environment, outermost first."""
    yield env
    if isinstance(env, gym.Wrapper):
        yield from single_layers(env.env)


def layers(envs: Any) -> Iterator[Any]:
    """Yields every layer of a stack, batched or single, outermost first; where rows are environments of this process, those of all rows."""
    if isinstance(envs, gym.Env):
        yield from single_layers(envs)
        return
    base = envs
    for base in vector_layers(envs):
        yield base
    for row in row_environments(base) or ():
        yield from single_layers(row)


def definer(cls: type, name: str) -> type:
    """Returns the class, of those that `cls` is derived from, whose definition of the method `name` holds."""
    return next(base for base in cls.__mro__ if name in vars(base))
