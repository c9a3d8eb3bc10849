"""The agent's side of the environment: whatever the user gave, seen as one Gymnasium `VectorEnv` with KL shaping on it."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from textgym.types import IntArray, Observation
from textgym.vec_env_adapter import GymnasiumVectorEnv, as_gymnasium_vector_env

DEFAULT_NUM_ENVS = 64


def as_vector_env(env: Any) -> VectorEnv:
    """Returns `env` as a Gymnasium vector environment.

    Args:
        env: an id (`DEFAULT_NUM_ENVS` native rows are made), a `VectorEnv` (taken as it is), an `Env` (one row), or a
            Stable-Baselines3 `VecEnv`.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(env, str):
        return gym.make_vec(env, num_envs=DEFAULT_NUM_ENVS)
    if isinstance(env, VectorEnv):
        return env
    if isinstance(env, VecEnv):
        return as_gymnasium_vector_env(env)
    if isinstance(env, gym.Env):
        return SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.DISABLED)
    raise ValueError(
        f"`env` must be an environment id, a Gymnasium `Env` or `VectorEnv`, or a Stable-Baselines3 `VecEnv`, got {type(env).__name__}. "
        'For example: `gym.make_vec("TextGen-v0", num_envs=64)`.'
    )


def attribute(envs: VectorEnv, name: str, default: Any = None) -> Any:
    """Returns the attribute `name` of the innermost environment (of row 0 where each row has its own), or `default`."""
    base = envs.unwrapped
    if isinstance(base, SyncVectorEnv | AsyncVectorEnv | GymnasiumVectorEnv):
        try:
            return base.get_attr(name)[0]
        except AttributeError:
            return default
    return getattr(base, name, default)


def reset_to_prompts(envs: VectorEnv, prompt_indices: IntArray | None, seed: int | None = None) -> Observation:
    """Resets every row, row i to prompt `prompt_indices[i]`; with None the environment draws them itself."""
    base = envs.unwrapped
    if prompt_indices is None:
        pass
    elif isinstance(base, SyncVectorEnv | AsyncVectorEnv | GymnasiumVectorEnv):
        base.set_attr("next_prompt_index", [int(i) for i in prompt_indices])
    else:
        base.next_prompt_index = np.asarray(prompt_indices, dtype=np.int64)  # type: ignore[attr-defined]
    observations: Observation
    observations, _ = envs.reset(seed=seed)
    return observations


def split_prompts(observations: Observation) -> tuple[IntArray, IntArray]:
    """Returns the prompts of freshly reset rows: ids (B, P), left-padded, and lengths (B,).

    Raises:
        ValueError: the prompts do not all end at the same column.
    """
    if not isinstance(observations, Mapping) or not {"input_ids", "attention_mask"} <= observations.keys():
        shown = ", ".join(observations) if isinstance(observations, Mapping) else type(observations).__name__
        raise ValueError(
            f"`env` must show `input_ids` and `attention_mask`, as TextGen-v0 does, got {shown}; take the wrapper off that leaves them out."
        )
    if np.asarray(observations["input_ids"]).dtype.kind not in "iu":
        raise ValueError(
            "`env` must show `input_ids` that are integers, got numbers that an observation wrapper changed; leave that wrapper away "
            "(for Stable-Baselines3's `VecNormalize`: `norm_obs=False`)."
        )
    mask = np.asarray(observations["attention_mask"]).astype(bool)
    ends = mask.shape[1] - np.argmax(mask[:, ::-1], axis=1)
    if not mask.any(1).all() or (ends != ends[0]).any():
        raise ValueError(
            "After a reset every row's prompt must end at the same column, as TextGen-v0's do; an observation wrapper moved them."
        )
    ids = np.asarray(observations["input_ids"])[:, : ends[0]].astype(np.int64)
    return ids, mask[:, : ends[0]].sum(1).astype(np.int64)


def common_ends(envs: VectorEnv, of_policy: tuple[int, ...], argument: str = "env") -> tuple[int, ...]:
    """Returns the tokens that end an episode, which must be those that end a completion of the policy.

    Args:
        envs: the environment; one that does not say what ends it is taken to have the policy's.
        of_policy: the policy's `eos_token_ids`.
        argument: what the error message calls `envs`.

    Raises:
        ValueError: they are others: a completion would end for the one and go on for the other.
    """
    found = attribute(envs, "eos_token_ids")
    ends = of_policy if found is None else tuple(int(token) for token in found)
    if set(ends) != set(of_policy):
        raise ValueError(
            f"`{argument}` ends its episodes with the tokens {ends}, `policy` its completions with {of_policy}: they must be the same. "
            f"Make the environment with `eos_token_ids=policy.eos_token_ids`, or the policy with `eos_token_ids={list(ends)}`."
        )
    return ends
