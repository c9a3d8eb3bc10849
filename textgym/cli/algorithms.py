"""The algorithms of `textgym train` and `textgym sft`: their classes, and what suits the bundled model."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Algorithm(StrEnum):
    """What `textgym train` can train with."""

    PPO = "ppo"
    REINFORCE = "reinforce"
    RLOO = "rloo"
    GRPO = "grpo"
    REBEL = "rebel"
    NLPO = "nlpo"
    DQN = "dqn"
    DPO = "dpo"
    KTO = "kto"


class OnlineAlgorithm(StrEnum):
    """Those of them that learn from their own samples."""

    PPO = "ppo"
    REINFORCE = "reinforce"
    RLOO = "rloo"
    GRPO = "grpo"
    REBEL = "rebel"
    NLPO = "nlpo"
    DQN = "dqn"


@dataclass(frozen=True)
class Defaults:
    """An algorithm's class and what suits it.

    Attributes:
        class_name: of the class in `textgym.agents`.
        learning_rate: for the bundled model, which is tiny; of an offline algorithm it is that of the first step and falls to 0.
        beta: β where `--beta` is not given.
        options: further arguments for the bundled model, where `--set` does not say otherwise.
        offline: learns from a file of examples and samples nothing.
    """

    class_name: str
    learning_rate: float
    beta: float = 0.2
    options: dict[str, Any] = field(default_factory=dict)
    offline: bool = False


SFT = "sft"
REWARD = "reward"  # no algorithm of its own: what `textgym reward` is called in run folders
ALGORITHMS: dict[str, Defaults] = {
    Algorithm.PPO: Defaults("PPO", 5e-4),
    Algorithm.REINFORCE: Defaults("REINFORCE", 1e-3),
    Algorithm.RLOO: Defaults("RLOO", 5e-4),
    Algorithm.GRPO: Defaults("GRPO", 5e-4),
    Algorithm.REBEL: Defaults("REBEL", 3e-4),
    Algorithm.NLPO: Defaults("NLPO", 5e-4),
    Algorithm.DQN: Defaults("DQN", 5e-4, options={"gradient_steps": 4, "batch_size": 64, "critic_learning_rate": 2e-3}),
    Algorithm.DPO: Defaults("DPO", 3e-4, beta=0.3, offline=True),
    Algorithm.KTO: Defaults("KTO", 2e-4, offline=True),
    SFT: Defaults("SFT", 1e-3, offline=True),
}
OTHER_LEARNING_RATE = 1e-5  # for any other model


def agent_class(algorithm: str) -> Any:
    """Returns the class of an algorithm; this imports torch."""
    from textgym import agents

    return getattr(agents, ALGORITHMS[algorithm].class_name)


def learning_rates(algorithms: Iterable[StrEnum] = Algorithm) -> str:
    """Returns the default learning rates in words, for `--help`."""
    bundled = ", ".join(f"{algorithm.value} {ALGORITHMS[algorithm].learning_rate:g}" for algorithm in algorithms)
    return f"bundled model: {bundled}; any other: {OTHER_LEARNING_RATE:g}"


def betas(algorithms: Iterable[StrEnum] = Algorithm) -> str:
    """Returns the default β in words, for `--help`."""
    usual = Defaults("", 0.0).beta
    found = {algorithm.value: ALGORITHMS[algorithm].beta for algorithm in algorithms}
    return "; ".join([f"{usual:g}", *(f"{name} {beta:g}" for name, beta in found.items() if beta != usual)])


def set_by_default() -> str:
    """Returns the further arguments for the bundled model in words, for `--help`."""
    words = {
        algorithm.value: ", ".join(f"{name}={value:g}" for name, value in ALGORITHMS[algorithm].options.items()) for algorithm in Algorithm
    }
    return "; ".join(f"bundled model, {algorithm}: {options}" for algorithm, options in words.items() if options)


def command(algorithm: str) -> str:
    """Returns the command that trains with an algorithm."""
    return f"textgym {algorithm}" if algorithm in (SFT, REWARD) else f"textgym train {algorithm}"
