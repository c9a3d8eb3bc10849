"""The rewards that ship with the package, by name. `textgym.bundled` is loaded when a name is looked up, its model when it first scores."""

from typing import Any


def bundled_names() -> tuple[str, ...]:
    """Returns the names of the bundled rewards."""
    from textgym.bundled import BUNDLED_REWARDS

    return BUNDLED_REWARDS


def bundled_reward(name: str) -> Any:
    """Returns the bundled reward `name`, one of `bundled_names()`: the trained reward model, or the rule that it was trained on."""
    from textgym.bundled import bundled_reward_model_path, true_reward
    from textgym.rewards.classifier import ClassifierReward

    return true_reward if name == "film-review-true" else ClassifierReward(bundled_reward_model_path())
