"""The algorithms of `textgym train`: their classes, and what suits the bundled model."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Algorithm(StrEnum):
    """What `textgym train` can train with."""

    PPO = "ppo"
    REINFORCE = "reinforce"
    RLOO = "rloo"


@dataclass(frozen=True)
class Defaults:
    """An algorithm's class and its step size.

    Attributes:
        class_name: of the class in `textgym.agents`.
        learning_rate: for the bundled model, which is tiny.
    """

    class_name: str
    learning_rate: float


ALGORITHMS = {
    Algorithm.PPO: Defaults("PPO", 5e-4),
    Algorithm.REINFORCE: Defaults("REINFORCE", 1e-3),
    Algorithm.RLOO: Defaults("RLOO", 1e-3),
}
OTHER_LEARNING_RATE = 1e-5  # for any other model


def agent_class(algorithm: str) -> Any:
    """Returns the class of an algorithm; this imports torch."""
    from textgym import agents

    return getattr(agents, ALGORITHMS[Algorithm(algorithm)].class_name)


def learning_rates() -> str:
    """Returns the default learning rates in words, for `--help`."""
    bundled = ", ".join(f"{algorithm.value} {defaults.learning_rate:g}" for algorithm, defaults in ALGORITHMS.items())
    return f"bundled model: {bundled}; any other: {OTHER_LEARNING_RATE:g}"
