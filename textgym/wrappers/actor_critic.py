"""Stable-Baselines3's policies under the protocol that `KLShaping` asks."""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from stable_baselines3.common.policies import ActorCriticPolicy


class ActorCriticAdapter:
    """A Stable-Baselines3 `ActorCriticPolicy` as a `textgym.types.TokenPolicy`.

    It follows the policy as that learns: `env.set_policy(ActorCriticAdapter(model.policy))` once, after the agent is built.

    Args:
        policy: the policy, of an agent with a `Discrete` action space.
    """

    def __init__(self, policy: "ActorCriticPolicy") -> None:
        self.policy = policy

    def frozen_copy(self) -> "ActorCriticAdapter":
        """Returns a copy that does not learn, to serve as reference."""
        frozen = copy.deepcopy(self.policy)
        frozen.set_training_mode(False)
        return ActorCriticAdapter(frozen.requires_grad_(False))

    def log_probs(self, observations: Any, actions: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Returns log π(a|s), (B,), in nats."""
        log_probs = self._all_log_probs(observations)
        chosen: npt.NDArray[np.float64] = log_probs[np.arange(len(log_probs)), np.asarray(actions)]
        return chosen

    def full_kl(self, reference: "ActorCriticAdapter", observations: Any) -> npt.NDArray[np.float64]:
        """Returns KL(self ‖ reference) over all actions at each observation, (B,), in nats."""
        own, other = self._all_log_probs(observations), reference._all_log_probs(observations)
        probabilities = np.exp(own)
        kl: npt.NDArray[np.float64] = np.sum(np.where(probabilities > 0, probabilities * (own - other), 0.0), axis=1)
        return kl

    def _all_log_probs(self, observations: Any) -> npt.NDArray[np.float64]:
        """Returns log π of every action, (B, V), with dropout and the like off, and no gradient."""
        import torch

        was_training = self.policy.training
        self.policy.set_training_mode(False)
        try:
            with torch.no_grad():
                tensors, _ = self.policy.obs_to_tensor(observations)
                log_probs: npt.NDArray[np.float64] = self._categorical(tensors).logits.double().cpu().numpy()
                return log_probs
        finally:
            self.policy.set_training_mode(was_training)

    def _categorical(self, tensors: Any) -> "torch.distributions.Categorical":
        """The distribution over actions; its logits are normalised."""
        import torch

        distribution = self.policy.get_distribution(tensors).distribution
        if not isinstance(distribution, torch.distributions.Categorical):
            raise ValueError(
                "`ActorCriticAdapter` needs a policy over a `Discrete` action space, this one's distribution is "
                f"{type(distribution).__name__}."
            )
        return distribution
