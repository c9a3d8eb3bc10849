"""GRPO: group-relative advantages (Shao et al. 2024, arXiv:2402.03300; DeepSeek-R1, arXiv:2501.12948).

Against RLOO the returns of a prompt's completions are standardised, each token has its own clipped ratio as in PPO, and the KL term stands
in the loss, as k3, instead of in the reward. It maximises no fixed J: its fixed point is its own (`textgym.exact.groups`).
"""

from typing import Any, ClassVar, Unpack, get_args

import torch
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from textgym.agents.common.advantages import AdvantageScale, group_normalized_advantages, group_std, whole_returns
from textgym.agents.common.batches import RolloutBatch, minibatches
from textgym.agents.common.checks import check_choice, check_count, check_generations
from textgym.agents.common.losses import (
    GRPOLoss,
    TokenReduction,
    clip_fractions,
    clipped_surrogate_loss,
    grpo_reduction,
    ratio_diagnostics,
    reference_kl_loss,
)
from textgym.agents.common.options import AgentOptions
from textgym.agents.common.rollout_scores import score_in_parts, score_rollout
from textgym.agents.common.schedules import as_schedule
from textgym.agents.online import Beta, OnlineAgent
from textgym.agents.policy import CausalLMPolicy


class GRPO(OnlineAgent):
    """Group relative policy optimisation: standardised returns, clipped token ratios, KL in the loss.

        L = −⟨min(ρ_t A_i, clip(ρ_t, 1−ε, 1+ε_high) A_i)⟩ + β ⟨π_ref/π − 1 − log π_ref/π⟩,    A_i = (R_i − mean R) / (std R + 1e-4)

    with ρ_t = π(a_t|s_t)/π_old(a_t|s_t), mean and std over the completions of the prompt, and ⟨⟩ the reduction `loss_type`.

    The environment must not have KL shaping: β is in the loss. k3 there follows KL(π_ref‖π), and standardised returns are no returns,
    so unlike that of PPO, REINFORCE, RLOO and REBEL the fixed point is not π_ref exp(r/β)/Z.

    Args:
        policy: the policy to train, in place.
        env: an environment id, an `Env`, a `VectorEnv` or an SB3 `VecEnv`, without KL shaping.
        learning_rate: a number or a schedule.
        beta: β of the KL term in the loss, in units of advantage per nat: a number, a schedule or an `AdaptiveKLController`; 0 for none.
        reference: π_ref; default a frozen copy of `policy`.
        gamma: γ per token, R = Σ_t γ^t r_t.
        n_epochs: passes over each rollout (TRL's `num_iterations`).
        batch_size: completions per optimiser step (default: the whole rollout); they need not be whole groups.
        clip_range: ε (TRL's `epsilon`), a number or a schedule; it matters only where a rollout has several updates.
        clip_range_high: ε_high (TRL's `epsilon_high`), a number or a schedule; None for ε.
        loss_type: the reduction of both terms.

            "grpo"     mean over the tokens of each completion, mean over completions (DeepSeek)
            "bnpo"     mean over all tokens of the minibatch
            "dr_grpo"  sum over tokens, divided by the most tokens a completion can have, mean over completions (Liu et al. 2025)
            "dapo"     mean over all tokens of the rollout (Yu et al. 2025): a minibatch divides by its share of them, its completions
                       times the rollout's mean length. The same as "bnpo" if the minibatch is the rollout

        scale_rewards: what R − mean is divided by: "group", the standard deviation over the prompt's completions (n − 1 in the
            denominator); "batch", that over the rollout; "none". True and False are "group" and "none". By default "group", and for
            "dr_grpo" "none", as that paper has it.
        **options: see `AgentOptions`; `num_generations` is at least 2, by default 8.

    Raises:
        ValueError: an argument breaks one of the rules above.
    """

    kl_in_reward = False
    compares_groups = True
    saved_arguments: ClassVar[tuple[str, ...]] = ("n_epochs", "batch_size", "clip_range", "clip_range_high", "loss_type", "scale_rewards")

    def __init__(
        self,
        policy: CausalLMPolicy,
        env: Any,
        learning_rate: float | Schedule = 1e-6,
        *,
        beta: Beta = 0.04,
        reference: Any = None,
        gamma: float = 1.0,
        n_epochs: int = 1,
        batch_size: int | None = None,
        clip_range: float | Schedule = 0.2,
        clip_range_high: float | Schedule | None = None,
        loss_type: GRPOLoss = "dapo",
        scale_rewards: AdvantageScale | bool | None = None,
        **options: Unpack[AgentOptions],
    ) -> None:
        check_generations(options.setdefault("num_generations", 8), "GRPO")
        check_count("n_epochs", n_epochs, "passes")
        if batch_size is not None:
            check_count("batch_size", batch_size, "completions")
        check_choice("loss_type", loss_type, get_args(GRPOLoss))
        if scale_rewards is None:
            scale_rewards = "none" if loss_type == "dr_grpo" else "group"
        elif isinstance(scale_rewards, bool):
            scale_rewards = "group" if scale_rewards else "none"
        check_choice("scale_rewards", scale_rewards, get_args(AdvantageScale))
        self.n_epochs, self.batch_size = n_epochs, batch_size
        self.clip_range = as_schedule("clip_range", clip_range)
        self.clip_range_high = None if clip_range_high is None else as_schedule("clip_range_high", clip_range_high)
        self.loss_type, self.scale_rewards = loss_type, scale_rewards
        super().__init__(policy, env, learning_rate, beta=beta, reference=reference, gamma=gamma, **options)

    def train(self, rollout: RolloutBatch) -> None:
        """`n_epochs` passes of minibatch steps over one rollout; a single step needs no old log-probs."""
        batch_size = min(self.batch_size or len(rollout), len(rollout))
        stale = self.n_epochs > 1 or batch_size < len(rollout)
        returns = whole_returns(self.shaped_rewards(rollout), rollout.lengths, gamma=self.gamma)
        advantages = group_normalized_advantages(returns, rollout.num_generations, scale=self.scale_rewards)
        self._record_groups(returns, rollout.num_generations)
        old_log_probs = self.old_log_probs(rollout) if stale else None
        max_length, mean_length = self.max_length(rollout), rollout.num_tokens / len(rollout)

        def loss(batch: RolloutBatch, rows: Tensor, sequences: int, tokens: int) -> Tensor:
            old = None if old_log_probs is None else old_log_probs[rows, : batch.completion_ids.shape[1]]
            reduction = grpo_reduction(self.loss_type, sequences=sequences, tokens=tokens, max_length=max_length, mean_length=mean_length)
            return self.loss(batch, old, advantages[rows], **reduction)

        for _ in range(self.n_epochs):
            for rows in minibatches(len(rollout), batch_size, self.minibatch_generator):
                self.update(rollout, loss, rows)

    @torch.no_grad()
    def old_log_probs(self, rollout: RolloutBatch) -> Tensor:
        """Scores log π_old of the tokens by the training pass, (B, T), so that the first ratio is 1 in any precision."""
        log_probs = score_in_parts(self.policy, rollout, None, self.micro_batch_size, self.micro_batch_tokens).log_probs
        self.check_sampling(rollout, log_probs)
        return log_probs

    def loss(self, batch: RolloutBatch, old_log_probs: Tensor | None, advantages: Tensor, **reduction: Unpack[TokenReduction]) -> Tensor:
        """The share of one micro-batch in the loss of its minibatch.

        Args:
            batch: the micro-batch, B rows.
            old_log_probs: (B, T); None if the samples are the policy's own.
            advantages: A, (B,).
            **reduction: see `grpo_reduction`.
        """
        log_probs, mask = score_rollout(self.policy, batch).log_probs, batch.completion_mask
        old = log_probs.detach() if old_log_probs is None else old_log_probs
        per_token = advantages[:, None].expand_as(log_probs)
        clip_range = self.clip_range(self._current_progress_remaining)
        clip_range_high = clip_range if self.clip_range_high is None else self.clip_range_high(self._current_progress_remaining)
        policy_loss = clipped_surrogate_loss(
            log_probs, old, per_token, mask, clip_range=clip_range, clip_range_high=clip_range_high, **reduction
        )
        self.logger.record_mean("train/policy_gradient_loss", float(policy_loss.detach()))
        if old_log_probs is not None:
            self.check_ratio(log_probs, old, mask)
            fractions = clip_fractions(log_probs, old, per_token, mask, clip_range=clip_range, clip_range_high=clip_range_high)
            self.logger.record_mean("train/approx_kl", float(ratio_diagnostics(log_probs, old, mask, clip_range=clip_range).approx_kl))
            self.logger.record_mean("train/clip_fraction_low", float(fractions.low))
            self.logger.record_mean("train/clip_fraction_high", float(fractions.high))
            self.logger.record("train/clip_range", clip_range)
        if not self.current_beta:
            return policy_loss
        assert batch.reference_log_probs is not None
        kl_loss = reference_kl_loss(log_probs, batch.reference_log_probs, mask, **reduction)
        self.logger.record_mean("train/kl_loss", float(kl_loss.detach()))
        return policy_loss + self.current_beta * kl_loss

    def _record_groups(self, returns: Tensor, num_generations: int) -> None:
        deviations = group_std(returns, num_generations)
        self.logger.record("rollout/group_reward_std", float(deviations.mean()))
        self.logger.record("rollout/frac_reward_zero_std", float((deviations == 0).float().mean()))
