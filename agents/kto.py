"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306): completions that are labelled good or bad, one by one, without pairs.

Against DPO the other completion is missing; its place takes a reference point z₀, what an answer to this prompt is worth on average:
gains and losses are counted from there, and count less the larger they are.
"""

from typing import Any, ClassVar, Unpack

import numpy as np
import torch
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from textgym.agents.common.batches import micro_batches
from textgym.agents.common.checks import check_number
from textgym.agents.common.implicit_reward import ImplicitReward
from textgym.agents.common.offline_batches import ExampleBatch, ExampleSet
from textgym.agents.common.offline_rows import labelled_row
from textgym.agents.common.options import CommonOptions
from textgym.agents.common.preference_losses import kto_loss, weighted_mean
from textgym.agents.offline import MicroBatchShare, OfflineAgent, Share
from textgym.agents.policy import CausalLMPolicy


class KTO(OfflineAgent):
    """Kahneman–Tversky optimisation of a language model, on completions labelled desirable or not.

        L = λ_y − v,    v = λ_D σ(β (h − z₀)) or λ_U σ(β (z₀ − h)),    h = log π(y|x) − log π_ref(y|x),    mean over the batch

    z₀ = max(0, mean h of *mismatched* pairs: the prompts of the batch, each with the completion of the next) estimates
    KL(π ‖ π_ref); it is worked out once per batch and carries no gradient. Steps have at least two examples; `evaluate` of a single one,
    which has no mismatched pair, takes z₀ = 0. Where every y is labelled desirable with a probability p(x, y),
    mass moves to those with p λ_D > (1 − p) λ_U.

    Args:
        policy: the policy to train, in place.
        examples: rows with `prompt`, `completion`, `label` (true: desirable), or `prompt_ids`, `completion_ids`, `label`; `weight` is how
            much a row counts; or `Label`s. See `OfflineAgent`.
        learning_rate: a number or a schedule.
        beta: β per nat; smaller goes further from π_ref.
        desirable_weight: λ_D. Of unequal numbers n_D, n_U of examples the paper wants λ_D n_D / (λ_U n_U) between 1 and 4/3.
        undesirable_weight: λ_U.
        reference: π_ref; default a frozen copy of `policy` as it is now.
        n_epochs: passes over the examples.
        batch_size: examples per optimiser step, at least 2; a step has one more where a single example would be left for the last one.
        append_eos: put EOS behind completions given as texts.
        max_tokens: leave out rows that are longer, prompt included.
        packing: several completions in one row of the model's input.
        **options: see `CommonOptions`.
    """

    parse = staticmethod(labelled_row)
    smallest_step = 2
    saved_arguments: ClassVar[tuple[str, ...]] = ("beta", "desirable_weight", "undesirable_weight")

    def __init__(
        self,
        policy: CausalLMPolicy,
        examples: Any,
        learning_rate: float | Schedule = 1e-6,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reference: CausalLMPolicy | None = None,
        n_epochs: int = 1,
        batch_size: int = 16,
        append_eos: bool = True,
        max_tokens: int | None = None,
        packing: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        check_number("beta", beta, 0, above=True)
        check_number("desirable_weight", desirable_weight, 0)
        check_number("undesirable_weight", undesirable_weight, 0)
        check_number("batch_size", batch_size, 2)  # one example has no other whose completion it could be given
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight
        super().__init__(
            policy,
            examples,
            learning_rate,
            n_epochs=n_epochs,
            batch_size=batch_size,
            reference=policy.reference() if reference is None and isinstance(policy, CausalLMPolicy) else reference,
            append_eos=append_eos,
            max_tokens=max_tokens,
            packing=packing,
            **options,
        )

    def minibatch_loss(self, examples: ExampleSet, rows: Tensor) -> MicroBatchShare:
        """The mean loss of a minibatch, whose z₀ all its micro-batches share."""
        kl, count = self.estimate_kl(examples, rows), len(rows)
        desirable = int(examples.labels[rows].sum())

        def share(batch: ExampleBatch) -> Share:
            assert batch.reference_log_probs is not None
            log_probs = self.score(self.policy, batch.completions).sum(1)
            log_ratios = batch.gather(log_probs - batch.reference_log_probs)[:, 0]
            losses = kto_loss(
                log_ratios,
                batch.labels,
                kl=kl,
                beta=self.beta,
                desirable_weight=self.desirable_weight,
                undesirable_weight=self.undesirable_weight,
            )
            rewards = self.beta * log_ratios.detach()
            metrics = {"train/kl": rewards.new_tensor(kl * len(batch) / count)}
            if desirable:
                metrics["rewards/chosen"] = (rewards * batch.labels).sum() / desirable
            if desirable < count:
                metrics["rewards/rejected"] = (rewards * (1 - batch.labels)).sum() / (count - desirable)
            return Share(weighted_mean(losses, batch.weights, count), metrics)

        return share

    @torch.no_grad()
    def estimate_kl(self, examples: ExampleSet, rows: Tensor) -> float:
        """Returns z₀ of a minibatch, in nats: the mean log-ratio of each prompt with the next example's completion, at least 0.

        Of a single example, which has no next one, it is 0.
        """
        assert self.reference is not None
        if len(rows) == 1:  # its own completion would be the next one's
            return 0.0
        own = examples.index[rows, 0].numpy()
        prompts, completions = examples.prompt_of[own], np.roll(own, -1)
        limit = self.policy.backbone.max_positions
        if limit is not None:  # each fits behind its own prompt, and need not behind another
            fits = examples.prompts.lengths[prompts] + examples.completions.lengths[completions] <= limit
            prompts, completions = prompts[fits], completions[fits]
        total = 0.0
        lengths = torch.from_numpy(examples.prompts.lengths[prompts] + examples.completions.lengths[completions])
        for part in micro_batches(lengths, self.micro_batch_size or len(rows), self.micro_batch_tokens):
            batch = examples.pair(prompts[part.numpy()], completions[part.numpy()], self.policy.device)
            total += float((self.score(self.policy, batch) - self.score(self.reference, batch)).sum())
        return max(0.0, total / max(len(prompts), 1))

    def implicit_reward(self, batch_size: int = 64) -> ImplicitReward:
        """Returns β log π(y|x)/π_ref(y|x) as a reward for `TextGen-v0(reward=...)`; see `DPO.implicit_reward`."""
        assert self.reference is not None
        return ImplicitReward(self.policy, self.reference, self.beta, batch_size)
