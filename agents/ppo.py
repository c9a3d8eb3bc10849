"""PPO on completions (Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019, arXiv:1909.08593).

Against REINFORCE it adds a critic with generalised advantages, and the clipped ratio that makes several epochs on one batch safe.
Every token is a step: the KL term is in the reward of each (through `KLShaping`), the score in that of the last.
"""

from textgym.agents.clipped import ClippedAgent
from textgym.agents.common.batches import RolloutBatch


class PPO(ClippedAgent):
    """Proximal policy optimisation of a language model, one token a step.

        L = −E[min(ρ_t Â_t, clip(ρ_t, 1−ε, 1+ε) Â_t)] + c₁ ½ E[(V(s_t) − R̂_t)²] − c₂ E[H(π(·|s_t))]

    Its arguments are those of `ClippedAgent`.
    """

    def train(self, rollout: RolloutBatch) -> None:
        """`n_epochs` passes of clipped minibatch steps over one rollout."""
        self.clipped_epochs(rollout, self.targets(rollout))
