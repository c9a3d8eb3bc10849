"""REINFORCE on completions (Williams 1992; for language models Ahmadian et al. 2024, arXiv:2402.14740).

The plain policy gradient: sample, weight ∇log π of each token by the return minus a baseline, step. PPO is this with a critic's
advantages and a clipped ratio; here several updates on one batch use importance weights instead, unbiased or truncated.
"""

from typing import Any, ClassVar, Literal, TypeAlias, Unpack, get_args

import torch
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from textgym.agents.common.advantages import importance_weighted_returns, leave_one_out_baseline, moving_average, rewards_to_go
from textgym.agents.common.batches import RolloutBatch, minibatches
from textgym.agents.common.checks import check_choice, check_count, check_number
from textgym.agents.common.critic import CriticSpec, explained_variance
from textgym.agents.common.importance import cumulative_ratios, restate_kl_rewards, token_ratios, truncated_cumulative_ratios
from textgym.agents.common.losses import entropy_bonus, reinforce_loss, value_loss
from textgym.agents.common.masking import masked_mean
from textgym.agents.common.options import AgentOptions
from textgym.agents.common.rollout_scores import score_in_parts, score_rollout, values_in_parts
from textgym.agents.online import Beta, OnlineAgent
from textgym.agents.policy import CausalLMPolicy

Baseline: TypeAlias = Literal["none", "batch_mean", "moving_average", "value", "leave_one_out"]
Importance: TypeAlias = Literal["cumulative", "truncated", "token"]


class REINFORCE(OnlineAgent):
    """The Monte Carlo policy gradient of a language model.

        ∇J = E Σ_t ∇log π(a_t|s_t) (R_t − b_t)

    with R_t the whole return of the completion or its reward-to-go, and a baseline b_t that does not depend on a_t, so that the
    gradient is unbiased for each of them. Reduction: sum over tokens, mean over sequences.

    Args:
        policy: the policy to train, in place.
        env: an environment id, an `Env`, a `VectorEnv` or an SB3 `VecEnv`.
        learning_rate: a number or a schedule.
        beta: β of the KL shaping, in reward per nat: a number, a schedule or an `AdaptiveKLController`.
        reference: π_ref; default a frozen copy of `policy`.
        gamma: γ per token.
        baseline: b_t.

            "none"            0
            "batch_mean"      mean return of the *other* completions of the rollout (with the own one in it, the gradient would be
                              (1 − 1/B) ∇J)
            "moving_average"  exponential average of the mean returns of the rollouts before
            "value"           V(s_t) of a critic
            "leave_one_out"   mean return of the other completions of the same prompt; needs `num_generations` ≥ 2

        reward_to_go: weight a token by the rewards from it on, instead of by the whole return.
        n_epochs: updates on each rollout; from the second on the samples are stale.
        batch_size: completions per optimiser step (default: the whole rollout).
        importance: the weight of stale samples. "cumulative", Π_{u≤t} π/π_old, is unbiased; "truncated" caps it at `max_weight`;
            "token", π/π_old of the token alone, is PPO's. The last two are biased.
        max_weight: the cap of "truncated".
        moving_average_decay: of the "moving_average" baseline.
        ent_coef: weight of an entropy bonus.
        vf_coef: weight of the value loss ("value" only).
        critic: see `Critic` ("value" only).
        **options: see `AgentOptions`.
    """

    saved_arguments: ClassVar[tuple[str, ...]] = (
        "baseline",
        "reward_to_go",
        "n_epochs",
        "batch_size",
        "importance",
        "max_weight",
        "moving_average_decay",
        "ent_coef",
        "vf_coef",
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
        baseline: Baseline = "batch_mean",
        reward_to_go: bool = True,
        n_epochs: int = 1,
        batch_size: int | None = None,
        importance: Importance = "cumulative",
        max_weight: float = 2.0,
        moving_average_decay: float = 0.9,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        critic: CriticSpec = "head",
        **options: Unpack[AgentOptions],
    ) -> None:
        check_choice("baseline", baseline, get_args(Baseline))
        check_choice("importance", importance, get_args(Importance))
        check_number("ent_coef", ent_coef)
        check_number("vf_coef", vf_coef, 0)
        check_number("max_weight", max_weight, 1)
        check_number("moving_average_decay", moving_average_decay, 0, 0.9999)
        check_count("n_epochs", n_epochs, "passes")
        if batch_size is not None:
            check_count("batch_size", batch_size, "completions")
        if baseline == "leave_one_out" and options.get("num_generations", 1) < 2:
            raise ValueError(
                "`num_generations` must be at least 2 for the leave-one-out baseline: it averages the prompt's other completions."
            )
        self.baseline, self.reward_to_go, self.n_epochs, self.batch_size = baseline, reward_to_go, n_epochs, batch_size
        self.importance, self.max_weight, self.moving_average_decay = importance, max_weight, moving_average_decay
        self.ent_coef, self.vf_coef = ent_coef, vf_coef
        self._average_return: float | None = None
        self.compares_groups = baseline == "leave_one_out"
        critic_of_baseline = critic if baseline == "value" else None
        super().__init__(policy, env, learning_rate, beta=beta, reference=reference, gamma=gamma, critic=critic_of_baseline, **options)

    def extra_state(self) -> dict[str, Any]:
        """The moving average of the returns."""
        return {"average_return": self._average_return}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the moving average."""
        self._average_return = state["average_return"]

    def train(self, rollout: RolloutBatch) -> None:
        """`n_epochs` passes of minibatch steps over one rollout; a single step needs no importance weights."""
        batch_size = min(self.batch_size or len(rollout), len(rollout))
        stale = self.n_epochs > 1 or batch_size < len(rollout)
        rewards = self.shaped_rewards(rollout)
        returns = rewards_to_go(rewards, rollout.lengths, gamma=self.gamma)
        old_log_probs, baselines = self.estimate(rollout, returns, rescore=stale)
        self._record_baseline(rollout, returns, baselines)

        def loss(batch: RolloutBatch, rows: Tensor, sequences: int, tokens: int) -> Tensor:
            width = batch.completion_ids.shape[1]
            tables = (table[rows, :width] for table in (rewards, returns, baselines, old_log_probs))
            return self.loss(batch, *tables, sequences=sequences, stale=stale)

        for _ in range(self.n_epochs):
            for rows in minibatches(len(rollout), batch_size, self.minibatch_generator):
                self.update(rollout, loss, rows)

    def loss(
        self,
        batch: RolloutBatch,
        rewards: Tensor,
        returns: Tensor,
        baselines: Tensor,
        old_log_probs: Tensor,
        *,
        sequences: int,
        stale: bool,
    ) -> Tensor:
        """The share of one micro-batch in the loss of its minibatch of `sequences` completions; every table is (B, T)."""
        scores = score_rollout(self.policy, batch, self.critic, entropy=self.ent_coef != 0)
        mask = batch.completion_mask
        if stale:
            advantages = self.stale_advantages(batch, rewards, baselines, scores.log_probs.detach(), old_log_probs)
        else:
            advantages = (returns if self.reward_to_go else returns[:, :1]) - baselines
        total = reinforce_loss(scores.log_probs, advantages, mask, count=sequences)
        self.logger.record_mean("train/policy_gradient_loss", float(total.detach()))
        if scores.entropy is not None:
            total = total - self.ent_coef * entropy_bonus(scores.entropy, mask, reduction="sequence_sum", count=sequences)
            self.logger.record_mean("train/entropy", float(masked_mean(scores.entropy.detach(), mask)))
        if scores.values is not None:
            critic_loss = value_loss(scores.values, returns, mask, reduction="sequence_sum", count=sequences)
            self.logger.record_mean("train/value_loss", float(critic_loss.detach()))
            total = total + self.vf_coef * critic_loss
        return total

    def stale_advantages(self, batch: RolloutBatch, rewards: Tensor, baselines: Tensor, log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
        """Importance-weighted R_t − b_t of samples from an older policy, (B, T), for the policy with `log_probs`.

        With "cumulative" weights E_old Σ_t ∇log π_θ(a_t|s_t) Â_t = ∇J(π_θ) exactly, the KL term of J included.
        """
        mask, lengths = batch.completion_mask, batch.lengths
        rewards = restate_kl_rewards(rewards, log_probs, old_log_probs, mask, beta=self._beta_in_rewards(batch))
        if self.importance == "token":
            weights = token_ratios(log_probs, old_log_probs, mask)
            returns = rewards_to_go(rewards, lengths, gamma=self.gamma)
            return weights * ((returns if self.reward_to_go else returns[:, :1]) - baselines)
        if self.importance == "truncated":
            weights = truncated_cumulative_ratios(log_probs, old_log_probs, mask, max_weight=self.max_weight)
        else:
            weights = cumulative_ratios(log_probs, old_log_probs, mask)
        if self.reward_to_go:
            return importance_weighted_returns(rewards, weights, lengths, gamma=self.gamma) - weights * baselines
        # A past reward times a later ∇log π has mean zero only under the weight of the whole sequence.
        return weights[:, -1:] * (rewards_to_go(rewards, lengths, gamma=self.gamma)[:, :1] - baselines)

    def _beta_in_rewards(self, batch: RolloutBatch) -> float:
        """β as the rewards of this rollout carry it; whitening would have rescaled them."""
        return 0.0 if self.whiten_rewards else self.current_beta

    @torch.no_grad()
    def estimate(self, rollout: RolloutBatch, returns: Tensor, *, rescore: bool) -> tuple[Tensor, Tensor]:
        """Returns the old log-probs (by the training pass where `rescore`) and the baselines b_t, each (B, T)."""
        old_log_probs, values = rollout.log_probs, None
        if rescore:
            scores = score_in_parts(self.policy, rollout, self.critic, self.micro_batch_size, self.micro_batch_tokens)
            old_log_probs, values = scores.log_probs, scores.values
            self.check_sampling(rollout, old_log_probs)
        elif self.critic is not None:
            values = values_in_parts(self.policy, rollout, self.critic, self.micro_batch_size, self.micro_batch_tokens)
        return old_log_probs, self.baselines(rollout, returns, values)

    def baselines(self, rollout: RolloutBatch, returns: Tensor, values: Tensor | None) -> Tensor:
        """b_t of every token, (B, T); `returns` are rewards-to-go, `values` the critic's."""
        if self.baseline == "none":
            return torch.zeros_like(returns)
        if self.baseline == "moving_average":
            return torch.full_like(returns, self._average_return or 0.0)
        if self.baseline == "value":
            assert values is not None
            return values
        group = rollout.num_generations if self.baseline == "leave_one_out" else len(rollout)
        if group < 2:
            raise ValueError(
                f"`rollout_size` must be at least 2 for the baseline {self.baseline!r}, which averages the other completions, got {group}."
            )
        if self.reward_to_go:
            return leave_one_out_baseline(returns, group, rollout.lengths)
        return leave_one_out_baseline(returns[:, 0], group)[:, None].expand_as(returns)

    def _record_baseline(self, rollout: RolloutBatch, returns: Tensor, baselines: Tensor) -> None:
        """Logs, and moves the moving average: only after the baseline of this rollout was taken."""
        mask = rollout.completion_mask
        self.logger.record("train/baseline_mean", float(masked_mean(baselines, mask)))
        if self.critic is not None:
            self.logger.record("train/explained_variance", explained_variance(baselines, returns, mask))
        self._average_return = moving_average(self._average_return, float(returns[:, 0].mean()), decay=self.moving_average_decay)
