"""Rewards for text: TRL's calling form, weighted sums, dense rewards, and a few simple ones. Nothing here loads torch when imported."""

from textgym.rewards.compose import EpisodeBatch, RewardSet
from textgym.rewards.dense import segment_level, token_level
from textgym.rewards.resolve import load_reward

__all__ = ["EpisodeBatch", "RewardSet", "load_reward", "segment_level", "token_level"]
