"""The rewards that ship with the package, by name. What they are made of is in `textgym.bundled`, loaded when a name is used."""

from typing import Any

# name: the function of `textgym.bundled` that makes it
BUNDLED_REWARDS = {"film-review": "film_review_reward", "film-review-true": "film_review_true_reward"}


def bundled_reward(name: str) -> Any:
    """Returns the bundled reward `name`, a key of `BUNDLED_REWARDS`."""
    from textgym import bundled

    return getattr(bundled, BUNDLED_REWARDS[name])()
