"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): preferences without a reward model and without sampling.

The optimum of E[r] − β KL is π* = π_ref exp(r/β)/Z, so r = β log π*/π_ref + β log Z: put into Bradley–Terry, in whose differences log Z
drops out, the policy is its own reward model. Against SFT it also learns what *not* to say, and how far from π_ref to go.
"""

from typing import Any, ClassVar, Literal, TypeAlias, Unpack, get_args

import torch
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from textgym.agents.common.checks import check_choice, check_number
from textgym.agents.common.implicit_reward import ImplicitReward
from textgym.agents.common.offline_batches import ExampleBatch, ExampleSet
from textgym.agents.common.offline_rows import preference_row
from textgym.agents.common.options import CommonOptions
from textgym.agents.common.preference_losses import dpo_loss, ipo_loss, plackett_luce_loss, robust_dpo_loss, weighted_mean
from textgym.agents.offline import Metrics, MicroBatchShare, OfflineAgent, Share
from textgym.agents.policy import CausalLMPolicy

ROUNDING = 1e-4  # nats by which two passes over one completion may differ
LossType: TypeAlias = Literal["sigmoid", "robust", "ipo"]


class DPO(OfflineAgent):
    """Direct preference optimisation of a language model, on pairs or rankings.

        L = −log σ(β Δ),    Δ = [log π(y_w|x) − log π_ref(y_w|x)] − [log π(y_l|x) − log π_ref(y_l|x)],    mean over the pairs of a batch

    Args:
        policy: the policy to train, in place.
        preferences: rows with `prompt`, `chosen`, `rejected`; with `prompt` and `completions`, best first (Plackett–Luce); the same as ids
            (`prompt_ids`, `chosen_ids`, `rejected_ids` or `completion_ids`); or conversations `chosen` and `rejected` that begin alike;
            or `Comparison`s and `Ranking`s without ties. `ranks` (1 the best) say the order of completions that are not best first.
            `preference` is P(chosen ≻ rejected) if it is known (default 1), `weight` how much a row counts. See `OfflineAgent`.
        learning_rate: a number or a schedule.
        beta: β, in reward per nat; smaller goes further from π_ref.
        loss_type: "sigmoid"; "robust", unbiased for labels flipped with probability `label_smoothing`; "ipo", (Δ − 1/(2β))².
        label_smoothing: ε in [0, ½), the probability that a label is wrong: conservative DPO with "sigmoid".
        reference: π_ref; default a frozen copy of `policy` as it is now. Scored once, before training.
        n_epochs: passes over the preferences.
        batch_size: pairs or rankings per optimiser step.
        append_eos: put EOS behind completions given as texts.
        max_tokens: leave out rows with a longer completion, prompt included.
        packing: several completions in one row of the model's input, each prompt once.
        **options: see `CommonOptions`.
    """

    argument = "preferences"
    parse = staticmethod(preference_row)
    saved_arguments: ClassVar[tuple[str, ...]] = ("beta", "loss_type", "label_smoothing")

    def __init__(
        self,
        policy: CausalLMPolicy,
        preferences: Any,
        learning_rate: float | Schedule = 1e-6,
        *,
        beta: float = 0.1,
        loss_type: LossType = "sigmoid",
        label_smoothing: float = 0.0,
        reference: CausalLMPolicy | None = None,
        n_epochs: int = 1,
        batch_size: int = 16,
        append_eos: bool = True,
        max_tokens: int | None = None,
        packing: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        check_number("beta", beta, 0, above=True)
        check_choice("loss_type", loss_type, get_args(LossType))
        check_number("label_smoothing", label_smoothing, 0)
        if label_smoothing >= 0.5:
            raise ValueError(f"`label_smoothing` must be below 0.5 (labels that say nothing), got {label_smoothing}.")
        if label_smoothing and loss_type == "ipo":
            raise ValueError("`label_smoothing` must be 0 with `loss_type='ipo'`; give the rows a `preference` instead.")
        self.beta, self.loss_type, self.label_smoothing = beta, loss_type, label_smoothing
        super().__init__(
            policy,
            preferences,
            learning_rate,
            n_epochs=n_epochs,
            batch_size=batch_size,
            reference=policy.reference() if reference is None and isinstance(policy, CausalLMPolicy) else reference,
            append_eos=append_eos,
            max_tokens=max_tokens,
            packing=packing,
            **options,
        )

    def check_examples(self, examples: ExampleSet) -> None:
        """Rankings of more than two are for the plain loss only."""
        if examples.index.shape[1] > 2 and (self.loss_type != "sigmoid" or self.label_smoothing):
            raise ValueError("`preferences` with rankings of more than two need `loss_type='sigmoid'` and `label_smoothing=0`; give pairs.")

    def minibatch_loss(self, examples: ExampleSet, rows: Tensor) -> MicroBatchShare:
        """The mean loss of a minibatch of pairs or rankings."""
        count = len(rows)

        def share(batch: ExampleBatch) -> Share:
            assert batch.reference_log_probs is not None
            log_probs = self.score(self.policy, batch.completions).sum(1)  # (U,)
            log_ratios = batch.gather(log_probs - batch.reference_log_probs)  # (B, K)
            loss = weighted_mean(self.losses(log_ratios, batch), batch.weights, count)
            return Share(loss, self.metrics(batch, log_ratios.detach(), batch.gather(log_probs.detach()), count))

        return share

    def losses(self, log_ratios: Tensor, batch: ExampleBatch) -> Tensor:
        """The loss of each row, (B,), of log-ratios (B, K)."""
        margins = log_ratios[:, 0] - log_ratios[:, 1]
        if self.loss_type == "ipo":
            return ipo_loss(margins, batch.labels, beta=self.beta)
        loss = robust_dpo_loss if self.loss_type == "robust" else dpo_loss
        of_pairs = loss(margins, batch.labels, beta=self.beta, label_smoothing=self.label_smoothing)
        if log_ratios.shape[1] == 2:
            return of_pairs
        return torch.where(batch.present[:, 2], plackett_luce_loss(log_ratios, batch.present, beta=self.beta), of_pairs)

    def metrics(self, batch: ExampleBatch, log_ratios: Tensor, log_probs: Tensor, count: int) -> Metrics:
        """What TRL logs too: implicit rewards βh of the best and the worst completion, how often their order is right, log-probs."""
        last = batch.present.sum(1, keepdim=True) - 1
        rewards = self.beta * log_ratios
        best, worst = rewards[:, 0], rewards.gather(1, last)[:, 0]
        # Equal but for rounding, as before the first step, is half right.
        order = torch.where((best - worst).abs() < self.beta * ROUNDING, 0.5, (best > worst).float())
        means = {
            "rewards/chosen": best,
            "rewards/rejected": worst,
            "rewards/margins": best - worst,
            "rewards/accuracies": batch.labels * order + (1 - batch.labels) * (1 - order),
            "logps/chosen": log_probs[:, 0],
            "logps/rejected": log_probs.gather(1, last)[:, 0],
        }
        return {name: weighted_mean(values, batch.weights, count) for name, values in means.items()}

    def implicit_reward(self, batch_size: int = 64) -> ImplicitReward:
        """Returns β log π(y|x)/π_ref(y|x) as a reward for `TextGen-v0(reward=...)`; it follows the policy as that is when asked.

        Args:
            batch_size: completions scored at once.
        """
        assert self.reference is not None
        return ImplicitReward(self.policy, self.reference, self.beta, batch_size)
