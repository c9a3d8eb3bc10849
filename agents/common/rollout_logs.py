"""The numbers of a rollout, as they go into the log; docs/agents.md defines every key."""

import time
from typing import Any

import numpy as np
from stable_baselines3.common.logger import Logger

from textgym.agents.common.advantages import group_std
from textgym.agents.common.batches import RolloutBatch
from textgym.agents.common.diagnostics import identical_fraction
from textgym.rewards.compose import RewardSet


def record_rollout(logger: Logger, rollout: RolloutBatch, reward_set: RewardSet | None = None) -> list[dict[str, Any]]:
    """Logs what a rollout was like, and what its reward functions logged themselves (TRL's `log_metric`).

    Returns:
        Per episode the unshaped return `r`, the length `l` and the time `t`, as SB3's `Monitor` notes them.
    """
    kl, lengths = rollout.kl_per_sequence, rollout.lengths
    measured = ~kl.isnan()
    logger.record("rollout/reward_mean", float(rollout.unshaped_returns.mean()))
    logger.record("rollout/reward_std", float(rollout.unshaped_returns.std(correction=0)))
    logger.record("rollout/shaped_reward_mean", float(rollout.returns.mean()))
    if measured.any():
        logger.record("rollout/kl_per_sequence", float(kl[measured].mean()))
        logger.record("rollout/kl_per_token", float(kl[measured].sum() / lengths[measured].sum()))
    logger.record("rollout/length_mean", float(lengths.float().mean()))
    logger.record("rollout/eos_fraction", float(np.mean([info.get("finish_reason") == "eos" for info in rollout.infos])))
    logger.record("rollout/identical_fraction", identical_fraction(rollout))
    if rollout.num_generations > 1:
        deviations = group_std(rollout.unshaped_returns, rollout.num_generations)
        logger.record("rollout/group_reward_std", float(deviations.mean()))
        logger.record("rollout/frac_reward_zero_std", float((deviations <= 1e-5).float().mean()))
    for name, mean in _part_means(rollout).items():
        logger.record(f"rewards/{name}/mean", mean)
    if reward_set is not None and len(reward_set.names) > 1:
        for name, weight in zip(reward_set.names, reward_set.weights, strict=True):
            logger.record(f"rewards/{name}/weight", weight)
    metrics = {} if reward_set is None else reward_set.drain_logs()[0]
    for name, mean in metrics.items():
        logger.record(f"rewards/{name}", mean)
    now = time.time()
    returns, counts = rollout.unshaped_returns.tolist(), lengths.tolist()
    return [{"r": reward, "l": length, "t": now} for reward, length in zip(returns, counts, strict=True)]


def _part_means(rollout: RolloutBatch) -> dict[str, float]:
    """The mean of each named part of the reward, over the rows that have it."""
    parts: dict[str, list[float]] = {}
    for info in rollout.infos:
        for name, value in info.get("rewards", {}).items():
            parts.setdefault(name, []).append(float(value))
    return {name: float(np.nanmean(values)) for name, values in parts.items() if not np.isnan(values).all()}
