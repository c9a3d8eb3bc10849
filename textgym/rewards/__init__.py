"""Rewards for text: TRL's calling form, weighted sums, dense rewards, classifiers, and a few simple ones.

Nothing here loads torch when imported.
"""

from textgym.rewards.causality import check_causal
from textgym.rewards.classifier import ClassifierReward
from textgym.rewards.compose import EpisodeBatch, RewardSet
from textgym.rewards.dense import segment_level, token_level
from textgym.rewards.resolve import load_reward
from textgym.rewards.segmenters import TokenCount
from textgym.rewards.simple import ExactMatchReward, LengthReward, LexiconReward, RegexReward, RepetitionPenalty

__all__ = [
    "ClassifierReward",
    "EpisodeBatch",
    "ExactMatchReward",
    "LengthReward",
    "LexiconReward",
    "RegexReward",
    "RepetitionPenalty",
    "RewardSet",
    "TokenCount",
    "check_causal",
    "load_reward",
    "segment_level",
    "token_level",
]
