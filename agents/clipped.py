"""`ClippedAgent`: a critic's advantages and the clipped ratio, for the algorithms that share them (PPO, NLPO).

Once per rollout it is valued (`targets`); then `clipped_epochs` takes minibatch steps on the clipped surrogate and the value loss.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, TypedDict, Unpack, get_args

import torch
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from textgym.agents.common.advantages import generalized_advantages
from textgym.agents.common.batches import RolloutBatch, micro_batches, minibatches
from textgym.agents.common.checks import check_choice, check_count, check_number
from textgym.agents.common.critic import CriticSpec, explained_variance
from textgym.agents.common.losses import clipped_surrogate_loss, entropy_bonus, ratio_diagnostics, value_loss
from textgym.agents.common.masking import Reduction, masked_mean, masked_whiten
from textgym.agents.common.options import AgentOptions
from textgym.agents.common.rollout_scores import RolloutScores, score_in_parts, score_rollout
from textgym.agents.common.schedules import as_schedule
from textgym.agents.online import Beta, OnlineAgent
from textgym.agents.policy import CausalLMPolicy


class ClippedOptions(AgentOptions, total=False):
    """The arguments of `ClippedAgent`, which says what they are, for its subclasses to take by keyword and pass on."""

    beta: Beta
    reference: Any
    gamma: float
    gae_lambda: float
    n_epochs: int
    batch_size: int | None
    clip_range: float | Schedule
    clip_range_vf: float | Schedule | None
    ent_coef: float
    vf_coef: float
    critic: CriticSpec
    normalize_advantage: bool
    target_kl: float | None
    loss_reduction: Reduction


class ClippedAgent(OnlineAgent):
    """An actor with a critic that takes several epochs of clipped steps on each rollout, one token a step. Abstract.

        L = −E[min(ρ_t Â_t, clip(ρ_t, 1−ε, 1+ε) Â_t)] + c₁ ½ E[(V(s_t) − R̂_t)²] − c₂ E[H(π(·|s_t))]

    Args:
        policy: the policy to train, in place.
        env: an environment id, an `Env`, a `VectorEnv` or an SB3 `VecEnv`.
        learning_rate: a number or a schedule.
        beta: β of the KL shaping, in reward per nat: a number, a schedule or an `AdaptiveKLController`.
        reference: π_ref; default a frozen copy of `policy`.
        gamma: γ per token.
        gae_lambda: λ of the advantages; 1 is return − value, unbiased whatever the critic.
        n_epochs: passes over each rollout.
        batch_size: completions per optimiser step (default: the whole rollout).
        clip_range: ε of the ratio, a number or a schedule.
        clip_range_vf: ε of the value clipping in units of reward, a number or a schedule; None for none.
        ent_coef: c₂.
        vf_coef: c₁.
        critic: "head", "joint", "separate" or a `ValueModel`, see `Critic`.
        normalize_advantage: whiten the advantages of a rollout (masked, population variance). Off: J's own scale.
        target_kl: stop the epochs of a rollout once the approximate KL to the sampling policy exceeds 1.5 × this, in nats per token.
        loss_reduction: of all three terms; "sequence_sum" (over tokens, then mean over sequences) is J's gradient when lengths vary,
            "token_mean" is what most implementations do.
        **options: see `AgentOptions`.

    The old log-probs are those of the training pass before the first step, so the first ratio is 1 to rounding in any precision.
    A subclass says in `train` how it uses `targets` and `clipped_epochs`.
    """

    saved_arguments: ClassVar[tuple[str, ...]] = (
        "gae_lambda",
        "n_epochs",
        "batch_size",
        "clip_range",
        "clip_range_vf",
        "ent_coef",
        "vf_coef",
        "normalize_advantage",
        "target_kl",
        "loss_reduction",
    )

    def __init__(
        self,
        policy: CausalLMPolicy,
        env: Any,
        learning_rate: float | Schedule = 1e-5,
        *,
        beta: Beta = 0.05,
        reference: Any = None,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        n_epochs: int = 4,
        batch_size: int | None = None,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        critic: CriticSpec = "head",
        normalize_advantage: bool = False,
        target_kl: float | None = None,
        loss_reduction: Reduction = "sequence_sum",
        **options: Unpack[AgentOptions],
    ) -> None:
        check_number("gae_lambda", gae_lambda, 0, 1)
        check_number("ent_coef", ent_coef)
        check_number("vf_coef", vf_coef, 0)
        check_count("n_epochs", n_epochs, "passes")
        if batch_size is not None:
            check_count("batch_size", batch_size, "completions")
        if target_kl is not None:
            check_number("target_kl", target_kl, 0, above=True)
        check_choice("loss_reduction", loss_reduction, get_args(Reduction))
        self.gae_lambda, self.n_epochs, self.batch_size = gae_lambda, n_epochs, batch_size
        self.clip_range = as_schedule("clip_range", clip_range)
        self.clip_range_vf = None if clip_range_vf is None else as_schedule("clip_range_vf", clip_range_vf)
        self.ent_coef, self.vf_coef, self.target_kl = ent_coef, vf_coef, target_kl
        self.normalize_advantage, self.loss_reduction = normalize_advantage, loss_reduction
        super().__init__(policy, env, learning_rate, beta=beta, reference=reference, gamma=gamma, critic=critic, **options)

    def targets(self, rollout: RolloutBatch) -> "Targets":
        """Values a rollout, once: what its epochs hold fixed."""
        first = self._first_scores(rollout)
        old, advantages = self.estimate(rollout, first)
        self.check_sampling(rollout, old.log_probs)
        assert old.values is not None
        mask = rollout.completion_mask
        returns = advantages + old.values
        self.logger.record("train/explained_variance", explained_variance(old.values, returns, mask))
        if self.normalize_advantage:
            advantages = masked_whiten(advantages, mask)
        return Targets(old.log_probs, old.values, advantages, returns, first)

    def clipped_epochs(self, rollout: RolloutBatch, targets: "Targets", extra_losses: Callable[[], Iterable[Tensor]] = tuple) -> None:
        """`n_epochs` passes of minibatch steps over one rollout, cut short where the target KL is exceeded.

        Args:
            rollout: the whole rollout.
            targets: its targets.
            extra_losses: asked once per step for further scalars that are added to its loss.
        """
        first = targets.first_scores
        for epoch in range(self.n_epochs):
            for rows in minibatches(len(rollout), self.batch_size or len(rollout), self.minibatch_generator):
                if not self._step(rollout, targets, rows, extra_losses(), first):
                    self.logger.record("train/epochs", epoch)
                    return
                first = None
        self.logger.record("train/epochs", self.n_epochs)

    def _first_scores(self, rollout: RolloutBatch) -> RolloutScores | None:
        """Scores a rollout with gradient if the first step is on all of it in one pass, which its targets can then share."""
        if self.batch_size is not None and self.batch_size < len(rollout):
            return None
        if len(micro_batches(rollout.pass_tokens, self.micro_batch_size, self.micro_batch_tokens)) > 1:
            return None
        return score_rollout(self.policy, rollout, self.critic, entropy=self.ent_coef != 0, end_values=bool(rollout.truncated.any()))

    def _step(
        self, rollout: RolloutBatch, targets: "Targets", rows: Tensor, extra_losses: Iterable[Tensor], first: RolloutScores | None
    ) -> bool:
        """One optimiser step on a minibatch; False, and no step, if the policy is beyond the target KL already."""
        kl = 0.0

        def loss(batch: RolloutBatch, micro_rows: Tensor, sequences: int, tokens: int) -> Tensor:
            nonlocal kl
            width = batch.completion_ids.shape[1]
            scores = None if first is None else first.select(micro_rows, width)
            total, approx_kl = self.loss(batch, targets.select(micro_rows, width), sequences, tokens, scores)
            kl += approx_kl * batch.num_tokens / tokens
            return total

        def within() -> bool:
            return self.target_kl is None or kl <= 1.5 * self.target_kl

        return self.update(rollout, loss, rows, proceed=within, extra_losses=extra_losses)

    def loss(
        self, batch: RolloutBatch, targets: "Targets", sequences: int, tokens: int, scores: RolloutScores | None = None
    ) -> tuple[Tensor, float]:
        """The share of one micro-batch in the loss of its minibatch, and the approximate KL of its tokens.

        Args:
            batch: the micro-batch.
            targets: its targets.
            sequences: completions of the minibatch.
            tokens: tokens of the minibatch.
            scores: what the policy as it is now says of the micro-batch, with gradient, if that is known.
        """
        if scores is None:
            scores = score_rollout(self.policy, batch, self.critic, entropy=self.ent_coef != 0)
        assert scores.values is not None
        mask, clip_range = batch.completion_mask, self.clip_range(self._current_progress_remaining)
        clip_range_vf = None if self.clip_range_vf is None else self.clip_range_vf(self._current_progress_remaining)
        reduction: _Reduction = {
            "reduction": self.loss_reduction,
            "count": tokens if self.loss_reduction == "token_mean" else sequences,
        }
        policy_loss = clipped_surrogate_loss(
            scores.log_probs, targets.log_probs, targets.advantages, mask, clip_range=clip_range, **reduction
        )
        critic_loss = value_loss(scores.values, targets.returns, mask, old_values=targets.values, clip_range=clip_range_vf, **reduction)
        total = policy_loss + self.vf_coef * critic_loss
        if scores.entropy is not None:
            bonus = entropy_bonus(scores.entropy, mask, **reduction)
            total = total - self.ent_coef * bonus
            self.logger.record_mean("train/entropy", float(masked_mean(scores.entropy.detach(), mask)))
        self.check_ratio(scores.log_probs, targets.log_probs, mask)
        diagnostics = ratio_diagnostics(scores.log_probs, targets.log_probs, mask, clip_range=clip_range)
        self.logger.record_mean("train/policy_gradient_loss", float(policy_loss.detach()))
        self.logger.record_mean("train/value_loss", float(critic_loss.detach()))
        self.logger.record_mean("train/approx_kl", float(diagnostics.approx_kl))
        self.logger.record_mean("train/clip_fraction", float(diagnostics.clip_fraction))
        self.logger.record_mean("train/ratio_mean", float(diagnostics.mean_ratio))
        self.logger.record("train/clip_range", clip_range)
        return total, float(diagnostics.approx_kl)

    @torch.no_grad()
    def estimate(self, rollout: RolloutBatch, scores: RolloutScores | None = None) -> tuple[RolloutScores, Tensor]:
        """Scores a rollout under the policy that sampled it, and returns the scores and the advantages Â, (B, T); both without gradient.

        Args:
            rollout: the whole rollout.
            scores: what that policy says of it, if that is known.
        """
        cut = bool(rollout.truncated.any())
        if scores is None:
            scores = score_in_parts(self.policy, rollout, self.critic, self.micro_batch_size, self.micro_batch_tokens, end_values=cut)
        scores = scores.detach()
        assert scores.values is not None
        advantages = generalized_advantages(
            self.shaped_rewards(rollout),
            scores.values,
            rollout.lengths,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            truncated=rollout.truncated if cut else None,
            bootstrap_values=scores.end_values,
        )
        return scores, advantages


class _Reduction(TypedDict):
    reduction: Reduction
    count: float


class Targets(NamedTuple):
    """What a rollout's epochs hold fixed, each (B, T): old log-probs, old values, advantages and returns.

    `first_scores` are those they were worked out from, with gradient, where the first step can go on from them.
    """

    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    first_scores: RolloutScores | None = None

    def select(self, rows: Tensor, width: int) -> "Targets":
        """Returns rows `rows`, the first `width` tokens."""
        log_probs, values, advantages, returns = (
            table[rows, :width] for table in (self.log_probs, self.values, self.advantages, self.returns)
        )
        return Targets(log_probs, values, advantages, returns)
