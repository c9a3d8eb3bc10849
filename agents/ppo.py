"""PPO on completions (Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019, arXiv:1909.08593).

Against REINFORCE it adds a critic with generalised advantages, and the clipped ratio that makes several epochs on one batch safe.
Every token is a step: the KL term is in the reward of each (through `KLShaping`), the score in that of the last. With `ptx_coef` it is
PPO-ptx (Ouyang et al. 2022, arXiv:2203.02155): the likelihood of pretraining texts is kept up on the way.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Unpack

from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from textgym.agents.clipped import ClippedAgent, ClippedOptions
from textgym.agents.common.batches import RolloutBatch
from textgym.agents.common.checks import check_count, check_number
from textgym.agents.common.pretraining import PretrainingMix
from textgym.agents.policy import CausalLMPolicy


class PPO(ClippedAgent):
    """Proximal policy optimisation of a language model, one token a step.

        L = −E[min(ρ_t Â_t, clip(ρ_t, 1−ε, 1+ε) Â_t)] + c₁ ½ E[(V(s_t) − R̂_t)²] − c₂ E[H(π(·|s_t))] − γ_ptx E_x[log π(x_t|x_{<t})]

    Args:
        policy: the policy to train, in place.
        env: an environment id, an `Env`, a `VectorEnv` or an SB3 `VecEnv`.
        learning_rate: a number or a schedule.
        ptx_coef: γ_ptx, the weight of the mean log-probability per token of pretraining texts; 0, the default, leaves it out.
        ptx_texts: those texts, strings or id lists of at least two tokens; needed if and only if `ptx_coef` is above 0. A checkpoint does
            not hold them: pass them to `load` again.
        ptx_batch_size: texts per optimiser step.
        **options: β, ε, c₁, c₂, λ, epochs and batches are arguments of `ClippedAgent`; the rest see `AgentOptions`.

    Raises:
        ValueError: an argument breaks one of these rules.
    """

    saved_arguments: ClassVar[tuple[str, ...]] = ("ptx_coef", "ptx_batch_size")

    def __init__(
        self,
        policy: CausalLMPolicy,
        env: Any,
        learning_rate: float | Schedule = 1e-5,
        *,
        ptx_coef: float = 0.0,
        ptx_texts: Sequence[str | Sequence[int]] | None = None,
        ptx_batch_size: int = 8,
        **options: Unpack[ClippedOptions],
    ) -> None:
        check_number("ptx_coef", ptx_coef, 0)
        check_count("ptx_batch_size", ptx_batch_size, "texts")
        if (ptx_coef > 0) != (ptx_texts is not None):
            given = "no texts" if ptx_texts is None else f"{len(ptx_texts)} texts"
            raise ValueError(
                f"`ptx_texts` must be given if and only if `ptx_coef` is above 0 (also to `load`), got {given} and {ptx_coef}."
            )
        self.ptx_coef, self.ptx_batch_size = ptx_coef, ptx_batch_size
        super().__init__(policy, env, learning_rate, **options)
        assert self.seed is not None  # `Agent` draws one if none is given
        self.pretraining = None if ptx_texts is None else PretrainingMix(self.policy, ptx_texts, ptx_coef, ptx_batch_size, self.seed)

    def train(self, rollout: RolloutBatch) -> None:
        """`n_epochs` passes of clipped minibatch steps over one rollout, a batch of pretraining texts in each step."""
        self.clipped_epochs(rollout, self.targets(rollout), extra_losses=self.pretraining_losses)

    def pretraining_losses(self) -> Iterable[Tensor]:
        """The term −γ_ptx E log π of the next batch of texts, in micro-batches; nothing without texts."""
        if self.pretraining is None:
            return ()
        return self.pretraining.losses(self.policy, self.micro_batch_size, self.logger, self.micro_batch_tokens)

    def extra_state(self) -> dict[str, Any]:
        """Where it stands in the pretraining texts."""
        return {} if self.pretraining is None else {"pretraining": self.pretraining.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Goes on with the pretraining texts where a checkpoint stopped."""
        if self.pretraining is not None and "pretraining" in state:
            self.pretraining.load_state_dict(state["pretraining"])
