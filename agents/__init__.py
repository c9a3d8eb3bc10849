"""Agents: language-model policies and the algorithms that train them.

Names are loaded when first used, so that `import textgym.agents` does not load torch.
"""

import importlib
from typing import Any

_HOMES = {
    "AdaptiveKLController": "textgym.kl",
    "BestOfN": "textgym.agents.best_of_n",
    "CausalLMPolicy": "textgym.agents.policy",
    "ComparisonReport": "textgym.agents.comparison",
    "DPO": "textgym.agents.dpo",
    "DQN": "textgym.agents.dqn",
    "Evaluation": "textgym.agents.common.evaluation",
    "GRPO": "textgym.agents.grpo",
    "HeldOut": "textgym.agents.common.held_out",
    "KTO": "textgym.agents.kto",
    "NLPO": "textgym.agents.nlpo",
    "PPO": "textgym.agents.ppo",
    "REBEL": "textgym.agents.rebel",
    "REINFORCE": "textgym.agents.reinforce",
    "RLOO": "textgym.agents.rloo",
    "RewardModel": "textgym.agents.reward_model",
    "RewardModelTrainer": "textgym.agents.reward_model_trainer",
