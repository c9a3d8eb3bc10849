"""Evaluation: which of two policies writes better, what its texts look like, and whether the reward is being hacked.

Numbers of numbers and texts: nothing here loads torch when imported. `textgym.agents.compare_policies` samples, scores and puts all of
it into one report.
"""

from textgym.evaluation.bootstrap import Estimate, bootstrap_cluster_mean, bootstrap_mean
from textgym.evaluation.calibration import ReliabilityBin, expected_calibration_error, log_loss, reliability_table
from textgym.evaluation.over_optimisation import OverOptimisationReport, ScoredTexts, over_optimisation_report, rank_correlation
from textgym.evaluation.reward_model_report import RewardModelReport
from textgym.evaluation.text_statistics import TextStatistics, distinct_n, repetition, text_statistics
from textgym.evaluation.win_rate import WinRate, judged_win_rate, win_rate, win_rate_from_points, win_rate_over_seeds

__all__ = [
    "Estimate",
    "OverOptimisationReport",
    "ReliabilityBin",
    "RewardModelReport",
    "ScoredTexts",
    "TextStatistics",
    "WinRate",
    "bootstrap_cluster_mean",
    "bootstrap_mean",
    "distinct_n",
    "expected_calibration_error",
    "judged_win_rate",
    "log_loss",
    "over_optimisation_report",
    "rank_correlation",
    "reliability_table",
    "repetition",
    "text_statistics",
    "win_rate",
    "win_rate_from_points",
    "win_rate_over_seeds",
]
