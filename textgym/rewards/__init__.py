"""Rewards for text: TRL's calling form, metrics by name, weighted sums, dense and fine-grained rewards, classifiers.

Nothing here loads torch, or a package of the extra `metrics`, when imported.
"""

from textgym.rewards.background import InBackground
from textgym.rewards.bert_score import BertScoreReward
from textgym.rewards.causality import check_causal
from textgym.rewards.classifier import ClassifierReward
from textgym.rewards.compose import EpisodeBatch, RewardSet
from textgym.rewards.dense import segment_level, token_level
from textgym.rewards.fine_grained import FineGrainedReward, Objective
from textgym.rewards.json_validity import JsonReward
from textgym.rewards.named import make_reward, reward_names
from textgym.rewards.numeric import NumericReward
from textgym.rewards.overlap import BleuReward, ChrfReward, NgramPrecisionReward, RougeReward
from textgym.rewards.resolve import load_reward
from textgym.rewards.segmenters import Sentences, TokenCount
from textgym.rewards.simple import ExactMatchReward, LengthReward, LexiconReward, RegexReward, RepetitionPenalty

__all__ = [
    "BertScoreReward",
    "BleuReward",
    "ChrfReward",
    "ClassifierReward",
    "EpisodeBatch",
    "ExactMatchReward",
    "FineGrainedReward",
    "InBackground",
    "JsonReward",
    "LengthReward",
    "LexiconReward",
    "NgramPrecisionReward",
    "NumericReward",
    "Objective",
    "RegexReward",
    "RepetitionPenalty",
    "RewardSet",
    "RougeReward",
    "Sentences",
    "TokenCount",
    "check_causal",
    "load_reward",
    "make_reward",
    "reward_names",
    "segment_level",
    "token_level",
]
