"""Wrappers of text environments. The vector forms are in `textgym.wrappers.vector`."""

from textgym.wrappers.actor_critic import ActorCriticAdapter
from textgym.wrappers.finding import find_kl_shaping, find_normalize_reward
from textgym.wrappers.kl_shaping import KLShaping
from textgym.wrappers.reward_changes import RunningMoments
from textgym.wrappers.rewards import ClipReward, NormalizeReward

__all__ = ["ActorCriticAdapter", "ClipReward", "KLShaping", "NormalizeReward", "RunningMoments", "find_kl_shaping", "find_normalize_reward"]
