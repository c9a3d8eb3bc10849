"""NLPO on completions (Ramamurthy et al. 2023, arXiv:2210.01241): PPO on the actions that an earlier policy thinks probable.

Against PPO it adds a mask over the vocabulary, the top-p set of a lagged copy of the policy. The masked and renormalised policy is the
policy: it samples, both sides of the ratio are its probabilities, the KL term compares it with the reference under the same mask, and
it is what evaluation measures.
"""

from typing import Any, ClassVar, Unpack

from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from textgym.agents.clipped import ClippedAgent, ClippedOptions
from textgym.agents.common.batches import RolloutBatch
from textgym.agents.common.checks import check_count, check_number
from textgym.agents.common.lagged_mask import LaggedMask
from textgym.agents.common.masking import masked_mean
from textgym.agents.common.rollouts import RolloutCollector
from textgym.agents.common.sampling import count_kept
from textgym.agents.policy import CausalLMPolicy

LARGEST_FLOOR = 100  # tokens, what RL4LMs keeps at least


class NLPO(ClippedAgent):
    """Natural language policy optimisation, PPO on a part of the vocabulary.

        π_M(a|s) = π(a|s) 1[a ∈ M(s)] / Σ_{b ∈ M(s)} π(b|s),    M(s) = top-p set of π_lagged(·|s) ∪ {EOS}

    is the policy, and its objective E_{π_M}[r − β Σ_t log π_M/π_ref,M], with π_ref,M renormalised over the same M(s). π_lagged is a copy
    of π that is brought up to date every `mask_refresh_interval` iterations. EOS is always legal, so that every episode can end.

    Args:
        policy: the policy to train, in place. The agent sets its `mask`, so that `policy.generate`, `predict` and every score are those
            of π_M from then on; `policy.mask = None` takes it off. `save_pretrained` writes the model alone.
        env: an environment id, an `Env`, a `VectorEnv` or an SB3 `VecEnv`.
        learning_rate: a number or a schedule.
        top_p: probability mass of the set, in (0, 1]; 1 keeps every token (then there is no mask and no copy, and this is PPO).
        min_tokens_to_keep: so many of the most probable tokens are in M(s) whatever their mass, at most V; by default 100, and a tenth
            of a vocabulary smaller than 1000.
        mask_refresh_interval: iterations (rollouts) from one refresh of the copy to the next; None keeps the mask of the start for ever.
        **options: the arguments of `ClippedAgent`, as PPO takes them, and `AgentOptions`.

    Raises:
        ValueError: an argument breaks one of these rules, or `policy` carries the mask of another agent.
    """

    saved_arguments: ClassVar[tuple[str, ...]] = ("top_p", "min_tokens_to_keep", "mask_refresh_interval")

    def __init__(
        self,
        policy: CausalLMPolicy,
        env: Any,
        learning_rate: float | Schedule = 1e-5,
        *,
        top_p: float = 0.9,
        min_tokens_to_keep: int | None = None,
        mask_refresh_interval: int | None = 20,
        **options: Unpack[ClippedOptions],
    ) -> None:
        check_number("top_p", top_p, 0, 1, above=True)
        if min_tokens_to_keep is not None:
            check_count("min_tokens_to_keep", min_tokens_to_keep, "tokens")
        if mask_refresh_interval is not None:
            check_count("mask_refresh_interval", mask_refresh_interval, "iterations")
        self.top_p, self.min_tokens_to_keep, self.mask_refresh_interval = top_p, min_tokens_to_keep, mask_refresh_interval
        self.mask: LaggedMask | None = None
        self.mask_age = 0
        super().__init__(policy, env, learning_rate, **options)
        # Last, so that an agent that is refused leaves the policy as it was.
        self.policy.mask = self.mask

    def _setup_model(self) -> None:
        """Makes the lagged copy too, of the policy as it is now."""
        super()._setup_model()
        vocab_size = self.policy.vocab_size
        if self.min_tokens_to_keep is None:
            self.min_tokens_to_keep = min(LARGEST_FLOOR, -(-vocab_size // 10))
        check_number("min_tokens_to_keep", self.min_tokens_to_keep, 1, vocab_size)
        if self.top_p < 1:
            self.mask = LaggedMask(self.policy, self.top_p, self.min_tokens_to_keep, always=self.policy.eos_token_ids)

    def _make_collector(self) -> RolloutCollector:
        """Samples from the masked policy; the environment says which tokens end an episode."""
        collector = super()._make_collector()
        if self.mask is not None:
            self.mask.allow(collector.eos_token_ids)
        return collector

    def train(self, rollout: RolloutBatch) -> None:
        """PPO's update, over the tokens that the mask allowed when they were sampled; then the mask may be refreshed."""
        self.logger.record("train/mask_age", self.mask_age)
        if rollout.kept is not None:
            self.logger.record("train/mask_size", float(masked_mean(count_kept(rollout.kept).float(), rollout.completion_mask)))
        self.clipped_epochs(rollout, self.targets(rollout))
        self.mask_age += 1
        if self.mask is not None and self.mask_age == self.mask_refresh_interval:
            self.mask.refresh()
            self.mask_age = 0

    def extra_state(self) -> dict[str, Any]:
        """The age of the mask."""
        return {"mask_age": self.mask_age}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the age of the mask."""
        self.mask_age = state["mask_age"]

    def extra_tensors(self) -> dict[str, Tensor]:
        """The lagged copy: those of its parameters that are trained (of a LoRA policy the adapter's)."""
        return {} if self.mask is None else self.mask.tensors()

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores the lagged copy."""
        assert self.mask is not None, "a checkpoint has tensors only if there is a mask"
        self.mask.load_tensors(tensors)
