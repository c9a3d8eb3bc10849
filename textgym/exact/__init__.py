"""The exact solver: token MDPs small enough to enumerate, and what an agent must end up with on them.

`gradients` and `models` need torch and are imported by name: `from textgym.exact.models import tiny_lm`.
"""

from textgym.exact.best_of_n import best_of_n
from textgym.exact.groups import GroupAdvantages, grpo_fixed_point, grpo_logit_gradient, grpo_token_weights
from textgym.exact.problems import HARD_TREE_BETA, hard_tree
from textgym.exact.q_learning import (
    BellmanOperator,
    QLearningResult,
    error_bound,
    polynomial_step_size,
    q_learning,
    rescaled_linear_step_size,
    synchronous_q_learning,
)
from textgym.exact.solutions import (
    FrontierPoint,
    HardSolution,
    SoftSolution,
    completion_distance,
    completion_kl,
    expected_reward,
    frontier,
    frontier_reward,
    hard_solution,
    kl_divergence,
    logit_gradient,
    objective,
    policy_values,
    restrict,
    soft_solution,
    total_variation,
)
from textgym.exact.texts import TreeReward
from textgym.exact.tree import TokenTree, TreeBatch

__all__ = [
    "HARD_TREE_BETA",
    "BellmanOperator",
    "FrontierPoint",
    "GroupAdvantages",
    "HardSolution",
    "QLearningResult",
    "SoftSolution",
    "TokenTree",
    "TreeBatch",
    "TreeReward",
    "best_of_n",
    "completion_distance",
    "completion_kl",
    "error_bound",
    "expected_reward",
    "frontier",
    "frontier_reward",
    "grpo_fixed_point",
    "grpo_logit_gradient",
    "grpo_token_weights",
    "hard_solution",
    "hard_tree",
    "kl_divergence",
    "logit_gradient",
    "objective",
    "policy_values",
    "polynomial_step_size",
    "q_learning",
    "rescaled_linear_step_size",
    "restrict",
    "soft_solution",
    "synchronous_q_learning",
    "total_variation",
]
