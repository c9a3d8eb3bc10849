"""What a command says before it works: model, data, reward, device, precision and lengths in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textgym.agents import CausalLMPolicy


def model_words(name: str, policy: "CausalLMPolicy") -> str:
    """Returns a model in words: its name, size, precision and device."""
    millions = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    computed = policy.backbone.autocast
    words = [
        f"{millions:,.1f} M parameters",
        _plain(policy.backbone.dtype),
        *([] if computed is None else [f"computed in {_plain(computed)}"]),
    ]
    return f"{name} ({', '.join(words)}, on {policy.device})"


def _plain(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def model_name(given: str | None) -> str:
    """Returns what to call a model that an option gave: the end of its path; None is the bundled one."""
    return "the bundled model" if given is None else Path(given).name or given


def reward_words(rewards: Sequence[str], weights: Sequence[float] | None = None) -> str:
    """Returns rewards in words, with their weights where there are some."""
    if not rewards:
        return "no reward"
    parts = rewards if weights is None else [f"{weight:g} {one}" for weight, one in zip(weights, rewards, strict=True)]
    return f"reward {' + '.join(parts)}"
