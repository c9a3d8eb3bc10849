"""Finding the bundled wrappers on a stack."""

from typing import Any

from textgym.stacks import layers
from textgym.wrappers.kl_shaping import KLShaping
from textgym.wrappers.rewards import NormalizeReward
from textgym.wrappers.vector import KLShaping as VectorKLShaping
from textgym.wrappers.vector_rewards import NormalizeReward as VectorNormalizeReward


def find_kl_shaping(envs: Any) -> list[KLShaping | VectorKLShaping]:
    """Returns the KL shaping of an environment: none, one (of a single or batched stack), or one per row (single forms in the rows).

    Args:
        envs: an `Env`, a `VectorEnv` or a Stable-Baselines3 `VecEnv`. Rows in other processes cannot be looked into (and cannot be
            KL-shaped there).
    """
    return [layer for layer in layers(envs) if isinstance(layer, KLShaping | VectorKLShaping)]


def find_normalize_reward(envs: Any) -> list[NormalizeReward | VectorNormalizeReward]:
    """Returns the wrappers of an environment that normalise its rewards, outermost first, those of its rows included.

    Args:
        envs: an `Env`, a `VectorEnv` or a Stable-Baselines3 `VecEnv`. Rows in other processes cannot be looked into.
    """
    return [layer for layer in layers(envs) if isinstance(layer, NormalizeReward | VectorNormalizeReward)]
