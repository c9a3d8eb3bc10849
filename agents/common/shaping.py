"""Who applies β: the agents whose objective has the KL term in the reward put it there through `KLShaping`, once."""

from typing import Any

from gymnasium.vector import VectorEnv
from torch import Tensor

from textgym.kl import AdaptiveKLController, KLCoefficient
from textgym.wrappers import KLShaping
from textgym.wrappers.finding import find_kl_shaping
from textgym.wrappers.vector import KLShaping as VectorKLShaping

AnyKLShaping = KLShaping | VectorKLShaping


def ensure_kl_shaping(
    envs: VectorEnv, policy: Any, reference: Any, beta: Any, *, rebind: bool = False
) -> tuple[VectorEnv, list[AnyKLShaping]]:
    """Returns `envs` with KL shaping on it, and the wrappers that do it (one, or one per row in single form).

    A stack without any gets the vector form as its outermost wrapper. One that has some is completed where it has no policy or
    reference yet.

    Args:
        envs: the environment as the user gave it.
        policy: π.
        reference: π_ref.
        beta: the agent's β.
        rebind: give existing wrappers this policy and reference whatever they had (an agent that was loaded from a folder).

    Raises:
        ValueError: an existing wrapper has another β, policy or reference.
    """
    found = find_kl_shaping(envs)
    if not found:
        shaped = VectorKLShaping(envs, policy=policy, reference=reference, beta=beta)
        return shaped, [shaped]
    for wrapper in found:
        if rebind:
            wrapper.state.coefficient = KLCoefficient(beta)
        elif not _same_beta(wrapper.state.coefficient, beta):
            raise ValueError(
                f"The environment's KLShaping has another `beta` ({wrapper.beta:g} now) than the agent was given ({beta!r}). "
                "Give both the same, or leave the wrapper away: the agent adds it."
            )
        for name, mine, given in (("policy", policy, wrapper.policy), ("reference", reference, wrapper.reference)):
            if given is not None and given is not mine and not rebind:
                raise ValueError(
                    f"The environment's KLShaping has another `{name}` than the agent. Pass the agent the same object, "
                    "or leave it away in the wrapper: the agent sets it."
                )
        wrapper.set_policy(policy)
        wrapper.set_reference(reference)
    return envs, found


def _same_beta(coefficient: KLCoefficient, beta: Any) -> bool:
    """Is `beta` what a wrapper was made with? Controllers and schedules must be the same object, for they move."""
    if isinstance(beta, AdaptiveKLController):
        return coefficient.controller is beta
    if callable(beta):
        return coefficient.schedule is beta
    return coefficient.controller is None and coefficient.schedule is None and coefficient.value == float(beta)


def refuse_kl_shaping(envs: VectorEnv, algorithm: str) -> None:
    """Raises a `ValueError` if `envs` has KL shaping: `algorithm` applies β itself, and would apply it twice."""
    if find_kl_shaping(envs):
        raise ValueError(
            f"`env` must not have KLShaping for {algorithm}, which applies `beta` itself: the penalty would count twice. "
            "Leave the wrapper away."
        )


def move_adaptive_beta(coefficients: list[KLCoefficient], kl_per_sequence: Tensor) -> None:
    """Tells each adaptive controller the mean KL of a rollout, once: rows that share a controller move it together."""
    measured = kl_per_sequence[~kl_per_sequence.isnan()]
    if not len(measured):
        return
    controllers = {id(c.controller): c.controller for c in coefficients if c.controller is not None}
    for controller in controllers.values():
        controller.update(float(measured.double().mean()), len(measured))
