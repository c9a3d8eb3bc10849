"""Supervised fine-tuning: cross-entropy on the tokens of given completions. What comes out is the π_ref of everything else.

Against the online algorithms it needs no reward and samples nothing; the prompt is read, not learned.
"""

from typing import Any, ClassVar, Unpack, get_args

from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from textgym.agents.common.checks import check_choice
from textgym.agents.common.masking import Reduction
from textgym.agents.common.offline_batches import ExampleBatch, ExampleSet
from textgym.agents.common.offline_rows import supervised_row
from textgym.agents.common.options import CommonOptions
from textgym.agents.common.supervised_losses import cross_entropy_loss
from textgym.agents.offline import MicroBatchShare, OfflineAgent, Share
from textgym.agents.policy import CausalLMPolicy


class SFT(OfflineAgent):
    """Supervised fine-tuning of a language model on completions.

        L = −1/n Σ_i w_i Σ_t log π(y_{i,t} | x_i, y_{i,<t}),      n the tokens of the batch

    Args:
        policy: the policy to train, in place.
        examples: rows with `prompt` and `completion`; with `text`, of which all tokens count; with `messages`, of which the last one, the
            assistant's, is learned; or with `prompt_ids` and `completion_ids`. `weight` is w_i. See `OfflineAgent` for the sources.
        learning_rate: a number or a schedule.
        n_epochs: passes over the examples.
        batch_size: examples per optimiser step.
        loss_reduction: "token_mean" divides by the tokens of the batch, "sequence_sum" by its examples, "sequence_mean" takes the mean over
            the tokens of each example first.
        reference: who KL is measured to by an `evaluation`; None measures none. The loss has no reference.
        append_eos: put EOS behind completions given as texts.
        max_tokens: leave out examples that are longer, prompt included.
        packing: several examples in one row of the model's input.
        **options: see `CommonOptions`.
    """

    loss_has_reference = False
    parse = staticmethod(supervised_row)
    saved_arguments: ClassVar[tuple[str, ...]] = ("loss_reduction",)

    def __init__(
        self,
        policy: CausalLMPolicy,
        examples: Any,
        learning_rate: float | Schedule = 1e-5,
        *,
        n_epochs: int = 3,
        batch_size: int = 16,
        loss_reduction: Reduction = "token_mean",
        reference: CausalLMPolicy | None = None,
        append_eos: bool = True,
        max_tokens: int | None = None,
        packing: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        check_choice("loss_reduction", loss_reduction, get_args(Reduction))
        self.loss_reduction = loss_reduction
        super().__init__(
            policy,
            examples,
            learning_rate,
            n_epochs=n_epochs,
            batch_size=batch_size,
            reference=reference,
            append_eos=append_eos,
            max_tokens=max_tokens,
            packing=packing,
            **options,
        )

    def minibatch_loss(self, examples: ExampleSet, rows: Tensor) -> MicroBatchShare:
        """The cross-entropy of a minibatch: divided by its tokens (or its examples), whatever the micro-batch."""
        tokens = int(examples.num_tokens[rows].sum())
        count = tokens if self.loss_reduction == "token_mean" else len(rows)

        def share(batch: ExampleBatch) -> Share:
            log_probs = batch.gather(self.score(self.policy, batch.completions))[:, 0]  # (B, 1, T) -> (B, T)
            mask = batch.gather(batch.completions.completion_mask)[:, 0]
            loss = cross_entropy_loss(log_probs, mask, weights=batch.weights, reduction=self.loss_reduction, count=count)
            # Unweighted and per token, whatever the loss is: what perplexities are computed from.
            nats = cross_entropy_loss(log_probs.detach(), mask, count=tokens)
            return Share(loss, {"train/nats_per_token": nats})

        return share
