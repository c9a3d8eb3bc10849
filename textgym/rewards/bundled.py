"""The rewards that ship with the package, by name. What they are made of is in `textgym.bundled`, loaded when a name is used."""

import difflib
from typing import Any

# name: the attribute of `textgym.bundled` that makes it
BUNDLED_REWARDS = {"film-review": "film_review_reward", "film-review-true": "film_review_true_reward"}


def bundled_reward(name: str) -> Any:
    """Returns the bundled reward `name`; an unknown name is a `ValueError` with the nearest known one."""
    if name not in BUNDLED_REWARDS:
        close = difflib.get_close_matches(name, BUNDLED_REWARDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"`reward` {name!r} is not a bundled reward ({', '.join(BUNDLED_REWARDS)}), a 'module:function', "
            f"or a folder that holds a sequence classifier.{hint}"
        )
    from textgym import bundled

    return getattr(bundled, BUNDLED_REWARDS[name])()
