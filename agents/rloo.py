"""RLOO, REINFORCE leave-one-out on whole completions (Ahmadian et al. 2024, arXiv:2402.14740; Kool et al. 2019).

Against `REINFORCE(baseline="leave_one_out", reward_to_go=False)`, whose first step it takes, a completion is one action of a bandit:
its probability enters as a whole. Stale samples therefore have one ratio, that of the sequence, which can be clipped as PPO clips a
token's; and the baseline is always there, so a prompt always has several completions.
"""

from typing import Any, ClassVar, Unpack

import torch
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from textgym.agents.common.advantages import leave_one_out_baseline, whole_returns
from textgym.agents.common.batches import RolloutBatch, minibatches
from textgym.agents.common.checks import check_count, check_generations
from textgym.agents.common.importance import restate_kl_rewards
from textgym.agents.common.losses import ratio_diagnostics, sequence_surrogate_loss
from textgym.agents.common.options import AgentOptions
from textgym.agents.common.rollout_scores import score_in_parts, score_rollout
from textgym.agents.common.schedules import as_schedule
from textgym.agents.online import Beta, OnlineAgent
from textgym.agents.policy import CausalLMPolicy


class RLOO(OnlineAgent):
    """The policy gradient of whole completions, with the other completions of the same prompt as baseline.

        ∇J ≈ 1/B Σ_i (R_i − 1/(k−1) Σ_{j≠i} R_j) ∇log π(y_i|x_i),    R = Σ_t γ^t (r_t − β log π(y_t|s_t)/π_ref(y_t|s_t))

    With k = 2 a pair's mean is ½ (R₁ − R₂) (∇log π(y₁) − ∇log π(y₂)). Reduction: log π(y|x) is the sum over tokens; mean over completions.

    From the second update on a rollout π_old sampled what π learns from. The gradient is then weighted by the ratio of the whole
    sequence, and the KL term of R is restated for π, which makes it ∇J(π) exactly, with a variance that grows with the length. With
    `clip_range` the ratio is clipped instead and R stays that of π_old, as in PPO: biased, of bounded variance.

    Args:
        policy: the policy to train, in place.
        env: an environment id, an `Env`, a `VectorEnv` or an SB3 `VecEnv`.
        learning_rate: a number or a schedule.
        beta: β of the KL shaping, in reward per nat: a number, a schedule or an `AdaptiveKLController`.
        reference: π_ref; default a frozen copy of `policy`.
        gamma: γ per token.
        n_epochs: passes over each rollout (TRL's `num_iterations`).
        batch_size: completions per optimiser step (default: the whole rollout); they need not be whole groups.
        clip_range: ε of the sequence ratio (TRL's `epsilon`), a number or a schedule; None, the default, does not clip: unbiased. It
            matters only where a rollout has several updates. With these and completions of more than some tens of tokens give one
            (TRL's is 0.2): the ratio is a product over tokens.
        **options: see `AgentOptions`; `num_generations` is k, at least 2, by default 4.

    Raises:
        ValueError: an argument breaks one of the rules above.
    """

    compares_groups = True
    saved_arguments: ClassVar[tuple[str, ...]] = ("n_epochs", "batch_size", "clip_range")

    def __init__(
        self,
        policy: CausalLMPolicy,
        env: Any,
        learning_rate: float | Schedule = 1e-5,
        *,
        beta: Beta = 0.05,
        reference: Any = None,
        gamma: float = 1.0,
        n_epochs: int = 1,
        batch_size: int | None = None,
        clip_range: float | Schedule | None = None,
        **options: Unpack[AgentOptions],
    ) -> None:
        check_generations(options.setdefault("num_generations", 4), "RLOO")
        check_count("n_epochs", n_epochs, "passes")
        if batch_size is not None:
            check_count("batch_size", batch_size, "completions")
        self.n_epochs, self.batch_size = n_epochs, batch_size
        self.clip_range = None if clip_range is None else as_schedule("clip_range", clip_range)
        super().__init__(policy, env, learning_rate, beta=beta, reference=reference, gamma=gamma, **options)

    def train(self, rollout: RolloutBatch) -> None:
        """`n_epochs` passes of minibatch steps over one rollout; a single step needs no old log-probs."""
        batch_size = min(self.batch_size or len(rollout), len(rollout))
        stale = self.n_epochs > 1 or batch_size < len(rollout)
        rewards = self.shaped_rewards(rollout)
        baselines = leave_one_out_baseline(whole_returns(rewards, rollout.lengths, gamma=self.gamma), rollout.num_generations)
        self.logger.record("train/baseline_mean", float(baselines.mean()))
        old_log_probs = self.old_log_probs(rollout) if stale else None

        def loss(batch: RolloutBatch, rows: Tensor, sequences: int, tokens: int) -> Tensor:
            width = batch.completion_ids.shape[1]
            old = None if old_log_probs is None else old_log_probs[rows, :width]
            return self.loss(batch, rewards[rows, :width], baselines[rows], old, sequences=sequences)

        for _ in range(self.n_epochs):
            for rows in minibatches(len(rollout), batch_size, self.minibatch_generator):
                self.update(rollout, loss, rows)

    @torch.no_grad()
    def old_log_probs(self, rollout: RolloutBatch) -> Tensor:
        """Scores log π_old of the tokens by the training pass, (B, T), so that the first ratio is 1 in any precision."""
        log_probs = score_in_parts(self.policy, rollout, None, self.micro_batch_size, self.micro_batch_tokens).log_probs
        self.check_sampling(rollout, log_probs)
        return log_probs

    def loss(self, batch: RolloutBatch, rewards: Tensor, baselines: Tensor, old_log_probs: Tensor | None, *, sequences: int) -> Tensor:
        """The share of one micro-batch in the loss of its minibatch of `sequences` completions.

        Args:
            batch: the micro-batch, B rows.
            rewards: (B, T), the KL term of the policy that sampled in them.
            baselines: (B,).
            old_log_probs: (B, T); None if the samples are the policy's own.
            sequences: completions of the minibatch.
        """
        log_probs, mask = score_rollout(self.policy, batch).log_probs, batch.completion_mask
        old = log_probs.detach() if old_log_probs is None else old_log_probs
        clip_range = None if self.clip_range is None else self.clip_range(self._current_progress_remaining)
        if clip_range is None and not self.whiten_rewards:  # whitening would have rescaled the KL term
            rewards = restate_kl_rewards(rewards, log_probs, old, mask, beta=self.current_beta)
        advantages = whole_returns(rewards, batch.lengths, gamma=self.gamma) - baselines
        total = sequence_surrogate_loss(log_probs, old, advantages, mask, clip_range=clip_range, count=sequences)
        self.logger.record_mean("train/policy_gradient_loss", float(total.detach()))
        if old_log_probs is not None:
            self.check_ratio(log_probs, old, mask)
            self._record_ratios(log_probs.detach(), old, mask, clip_range)
        return total

    def _record_ratios(self, log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, clip_range: float | None) -> None:
        per_token = ratio_diagnostics(log_probs, old_log_probs, mask, clip_range=0.0)
        per_sequence = ratio_diagnostics(
            log_probs.sum(1, keepdim=True), old_log_probs.sum(1, keepdim=True), mask[:, :1], clip_range=clip_range or 0.0
        )
        self.logger.record_mean("train/approx_kl", float(per_token.approx_kl))
        self.logger.record_mean("train/sequence_ratio_mean", float(per_sequence.mean_ratio))
        if clip_range is not None:
            self.logger.record_mean("train/sequence_clip_fraction", float(per_sequence.clip_fraction))
            self.logger.record("train/clip_range", clip_range)
