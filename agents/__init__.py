"""Agents: language-model policies and the algorithms that train them.

Names are loaded when first used, so that `import textgym.agents` does not load torch.
"""

import importlib
from typing import Any

_HOMES = {
    "AdaptiveKLController": "textgym.kl",
    "BestOfN": "textgym.agents.best_of_n",
    "CachedEngine": "textgym.agents.engines",
    "CausalLMActorCriticPolicy": "textgym.agents.sb3_policy",
    "CausalLMPolicy": "textgym.agents.policy",
    "ComparisonReport": "textgym.agents.comparison",
    "DPO": "textgym.agents.dpo",
    "DQN": "textgym.agents.dqn",
    "Evaluation": "textgym.agents.common.evaluation",
    "GRPO": "textgym.agents.grpo",
    "GenerationEngine": "textgym.agents.engines",
    "HeldOut": "textgym.agents.common.held_out",
    "KTO": "textgym.agents.kto",
    "NLPO": "textgym.agents.nlpo",
    "PPO": "textgym.agents.ppo",
    "REBEL": "textgym.agents.rebel",
    "REINFORCE": "textgym.agents.reinforce",
    "RLHF": "textgym.agents.rlhf",
    "RLOO": "textgym.agents.rloo",
    "RejectionSampling": "textgym.agents.rejection_sampling",
    "RewardEnsemble": "textgym.agents.reward_ensemble",
    "RewardModel": "textgym.agents.reward_model",
    "RewardModelTrainer": "textgym.agents.reward_model_trainer",
    "SFT": "textgym.agents.sft",
    "Sampling": "textgym.agents.common.sampling",
    "TransformersEngine": "textgym.agents.engines",
    "ValueHead": "textgym.agents.common.value_heads",
    "ValueModel": "textgym.agents.common.value_heads",
    "WinRateEvaluation": "textgym.agents.common.win_rate_evaluation",
    "compare_policies": "textgym.agents.comparison",
    "evaluate_policy": "textgym.agents.common.evaluation",
    "keep_best": "textgym.agents.rejection_sampling",
    "perplexity": "textgym.agents.common.perplexity",
    "scored_generation": "textgym.agents.engines",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names."""
    return __all__
