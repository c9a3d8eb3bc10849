"""REBEL: reinforcement learning by regressing relative rewards (Gao et al. 2024, arXiv:2404.16767).

Against RLOO, whose first gradient it takes up to a factor, it solves a least-squares problem per rollout, in several steps: the differences
of log-ratios between completions of a prompt shall be those of their returns. No ratio is clipped and nothing is importance-weighted.
"""

import warnings
from typing import Any, ClassVar, Unpack

import torch
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from textgym.agents.common.advantages import whole_returns
from textgym.agents.common.batches import RolloutBatch, micro_batches, minibatches
from textgym.agents.common.checks import check_count, check_generations, check_number
from textgym.agents.common.losses import ratio_diagnostics, rebel_loss
from textgym.agents.common.options import AgentOptions
from textgym.agents.common.rollout_scores import score_in_parts, score_rollout
from textgym.agents.online import Beta, OnlineAgent
from textgym.agents.policy import CausalLMPolicy


class REBEL(OnlineAgent):
    """Regression of relative returns onto relative log-ratios.

        L = E[ (1/η (log π(y|x)/π_t(y|x) − log π(y'|x)/π_t(y'|x)) − (R(x, y) − R(x, y')))² ],    R = Σ_t γ^t (r_t − β log π_t/π_ref)

    π_t is the policy that sampled the rollout; R is its, and constant. Reduction: log π(y|x) is the sum over tokens; mean over all pairs
    of completions of a prompt, mean over prompts. At π = π_t the gradient is 4/η times RLOO's.

    Solved exactly, log π_{t+1} = log π_t + η R + const: the distance of log π from that of the optimum π_ref exp(r/β)/Z is multiplied by
    1 − ηβ with every rollout. So ηβ = 1 gets there in one, and ηβ ≥ 2 never does.

    Args:
        policy: the policy to train, in place.
        env: an environment id, an `Env`, a `VectorEnv` or an SB3 `VecEnv`.
        learning_rate: a number or a schedule.
        beta: β of the KL shaping, in reward per nat: a number, a schedule or an `AdaptiveKLController`.
        reference: π_ref; default a frozen copy of `policy`.
        gamma: γ per token.
        eta: η, in nats per reward: how far one rollout moves the policy.
        n_epochs: passes over each rollout.
        batch_size: completions per optimiser step, a multiple of `num_generations`: groups stay whole (default: the whole rollout).
        **options: see `AgentOptions`; `num_generations` is at least 2, by default 2. A `micro_batch_size` is rounded up to whole groups,
            and `micro_batch_tokens` holds a group at least.

    Raises:
        ValueError: an argument breaks one of the rules above.
    """

    compares_groups = True
    saved_arguments: ClassVar[tuple[str, ...]] = ("eta", "n_epochs", "batch_size")

    def __init__(
        self,
        policy: CausalLMPolicy,
        env: Any,
        learning_rate: float | Schedule = 1e-5,
        *,
        beta: Beta = 0.05,
        reference: Any = None,
        gamma: float = 1.0,
        eta: float = 1.0,
        n_epochs: int = 4,
        batch_size: int | None = None,
        **options: Unpack[AgentOptions],
    ) -> None:
        check_generations(options.setdefault("num_generations", 2), "REBEL")
        check_number("eta", eta, 0, above=True)
        check_count("n_epochs", n_epochs, "passes")
        if batch_size is not None:
            check_count("batch_size", batch_size, "completions")
            if batch_size % options["num_generations"]:
                raise ValueError(
                    f"`batch_size` must be a multiple of `num_generations`, {options['num_generations']}, for REBEL, whose loss compares "
                    f"the completions of a prompt, got {batch_size}."
                )
        self.eta, self.n_epochs, self.batch_size = eta, n_epochs, batch_size
        super().__init__(policy, env, learning_rate, beta=beta, reference=reference, gamma=gamma, **options)
        if self.micro_batch_size is not None:
            self.micro_batch_size = -(-self.micro_batch_size // self.num_generations) * self.num_generations
        if self.eta * self.current_beta >= 2:
            warnings.warn(
                f"`eta` times `beta` is {self.eta * self.current_beta:g}. Each exact solve multiplies the distance to the optimum by "
                f"1 - eta * beta = {1 - self.eta * self.current_beta:g}, so REBEL does not converge from 2 on. Lower `eta`; eta = 1 / beta "
                "solves for the optimum at once.",
                stacklevel=2,
            )

    def train(self, rollout: RolloutBatch) -> None:
        """`n_epochs` passes of minibatch steps over one rollout, in minibatches of whole groups."""
        group = rollout.num_generations
        groups = len(rollout) // group
        batch_groups = min(self.batch_size or len(rollout), len(rollout)) // group
        returns = whole_returns(self.shaped_rewards(rollout), rollout.lengths, gamma=self.gamma)
        old_log_probs = self.old_log_probs(rollout)
        nothing_learned = float(rebel_loss(old_log_probs, old_log_probs, returns, rollout.completion_mask, num_generations=group))
        self.logger.record("train/relative_return", nothing_learned**0.5)

        def loss(batch: RolloutBatch, rows: Tensor, sequences: int, tokens: int) -> Tensor:
            old = old_log_probs[rows, : batch.completion_ids.shape[1]]
            return self.loss(batch, old, returns[rows], sequences=sequences)

        for _ in range(self.n_epochs):
            for chosen in minibatches(groups, batch_groups, self.minibatch_generator):
                rows = (chosen[:, None] * group + torch.arange(group)).flatten()  # (P,) -> (P * G,)
                self.update(rollout, loss, rows)

    def micro_batches(self, rollout: RolloutBatch, rows: Tensor) -> list[Tensor]:
        """Splits a minibatch into passes of whole groups."""
        groups = rows.view(-1, rollout.num_generations)
        lengths = rollout.num_generations * rollout.pass_tokens[groups].amax(1)
        size = None if self.micro_batch_size is None else self.micro_batch_size // rollout.num_generations
        return [groups[part].flatten() for part in micro_batches(lengths, size, self.micro_batch_tokens)]

    @torch.no_grad()
    def old_log_probs(self, rollout: RolloutBatch) -> Tensor:
        """Scores log π_t of the tokens by the training pass, (B, T), so that the first log-ratio is 0 in any precision."""
        log_probs = score_in_parts(self.policy, rollout, None, self.micro_batch_size, self.micro_batch_tokens).log_probs
        self.check_sampling(rollout, log_probs)
        return log_probs

    def loss(self, batch: RolloutBatch, old_log_probs: Tensor, returns: Tensor, *, sequences: int) -> Tensor:
        """The share of one micro-batch of whole groups in the loss of its minibatch of `sequences` completions.

        Args:
            batch: the micro-batch, B rows.
            old_log_probs: log π_t, (B, T).
            returns: R, (B,).
            sequences: completions of the minibatch.
        """
        log_probs, mask = score_rollout(self.policy, batch).log_probs, batch.completion_mask
        group = batch.num_generations
        total = rebel_loss(log_probs, old_log_probs, returns, mask, num_generations=group, eta=self.eta, count=sequences // group)
        self.check_ratio(log_probs, old_log_probs, mask)
        diagnostics = ratio_diagnostics(log_probs, old_log_probs, mask, clip_range=0.0)
        self.logger.record_mean("train/loss", float(total.detach()))
        self.logger.record_mean("train/approx_kl", float(diagnostics.approx_kl))
        return total
