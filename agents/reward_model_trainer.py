"""`RewardModelTrainer`: learning a reward from feedback of every form.

    A against B, ties, soft labels        Bradley–Terry                      Christiano et al. 2017 (arXiv:1706.03741) eq. 1
    K answers compared pairwise           the mean over the C(K,2) pairs     Ouyang et al. 2022 (arXiv:2203.02155) eq. 1
    rankings, with ties                   Plackett–Luce                      Plackett 1975
    good / bad                            Bernoulli, or cross-entropy        (a head with one output, with two)
    segments of trajectories              Bradley–Terry of summed r̂(s, a)    Christiano et al. 2017
    spans with categories                 Bernoulli per category, segment    Wu et al. 2023 (arXiv:2306.01693)

Against DPO, which learns from the same comparisons, the reward is a model of its own: it can score what no policy has been trained on.
"""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias, Unpack, get_args

import numpy as np
import torch
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from textgym.agents.common.batches import micro_batches
from textgym.agents.common.checks import check_choice, check_count, check_number
from textgym.agents.common.feedback_sets import Entry, FeedbackBatch, FeedbackSet, Group, LeftOut, check_entries, read_entry
from textgym.agents.common.options import CommonOptions
from textgym.agents.common.preference_losses import weighted_mean
from textgym.agents.common.progress import counting_bar
from textgym.agents.common.reward_losses import (
    centering_penalty,
    classifier_loss,
    compared_loss,
    label_loss,
    pair_differences,
    ranking_loss,
    span_loss,
)
from textgym.agents.common.same_sides import check_sides
from textgym.agents.offline_learner import SCORED_AT_ONCE, Metrics, MicroBatchShare, OfflineLearner, Share
from textgym.agents.reward_model import RewardModel
from textgym.evaluation.reward_model_report import Decisions, RewardModelReport, best_direction
from textgym.feedback.reading import read_feedback
from textgym.feedback.records import Comment
from textgym.rewards.segmenters import Segmenter, find_segmenter

RankingLoss: TypeAlias = Literal["plackett_luce", "pairwise"]


class RewardModelTrainer(OfflineLearner):
    """Trains a reward model on feedback.

        L = 1/n Σ_i w_i [ ℓ(record i) + c C(record i) ],    ℓ the loss of the record's form, C the centring penalty of its answers

    A record is one batch element, however many answers it has. Records of different forms may be mixed.

    Args:
        reward_model: the `RewardModel` to train, in place. Labels train a model with one output as a Bernoulli's logit, one with two as a
            classifier. Markings need one output per category, of its name; segments a per-token model.
        feedback: a list of records of `textgym.feedback` or of dicts, the path of a .jsonl or .jsonl.gz file, a `datasets.Dataset`, or what
            `read_feedback` returned. None where `connect` gives it later. Comments, and records whose answers are all the same tokens, are
            left out; `examples.left_out` counts them. If all records are of that kind they stay, with a warning.
        learning_rate: a number or an SB3 schedule of the progress remaining, 1 at the first step.
        n_epochs: passes over the feedback. One is usual: with more, reward models learn their comparisons by heart.
        batch_size: records per optimiser step, at most.
        ranking_loss: "plackett_luce", ties averaged over the orderings that they allow; or "pairwise", the mean over the pairs of different
            rank, ties dropped.
        center_coef: c of the penalty (r_a + r_b)² that keeps rewards near zero (Eisenstein et al. 2023); 0 for none, TRL's usual is 0.01.
        margin_scale: how much the records' margins count: Bradley–Terry of Δ − `margin_scale` · margin; 0 ignores them.
        segmenter: where the segments of markings end: "sub_sentence", "sentence", "whole" or a function, as of `segment_level`.
        max_tokens: records with a longer text, prompt included, are left out and counted; None takes all, and one too long for the model
            is an error.
        **options: see `CommonOptions`; `evaluation` is a `HeldOut` here.

    Raises:
        ValueError: an argument breaks one of the rules above, or a record does not suit the model; which one and how is said.
    """

    policy: RewardModel  # type: ignore[assignment]
    examples: FeedbackSet | None
    trains = RewardModel
    trained = "reward_model"
    argument = "feedback"
    saved_arguments: ClassVar[tuple[str, ...]] = ("ranking_loss", "center_coef", "margin_scale", "segmenter", "max_tokens")

    def __init__(
        self,
        reward_model: RewardModel,
        feedback: Any,
        learning_rate: float | Schedule = 1e-5,
        *,
        n_epochs: int = 1,
        batch_size: int = 64,
        ranking_loss: RankingLoss = "plackett_luce",
        center_coef: float = 0.0,
        margin_scale: float = 1.0,
        segmenter: str | Segmenter = "sub_sentence",
        max_tokens: int | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        check_choice("ranking_loss", ranking_loss, get_args(RankingLoss))
        check_number("center_coef", center_coef, 0)
        check_number("margin_scale", margin_scale, 0)
        find_segmenter(segmenter)  # raises where there is none
        if max_tokens is not None:
            check_count("max_tokens", max_tokens, "tokens")
        self.ranking_loss, self.center_coef, self.margin_scale = ranking_loss, center_coef, margin_scale
        self.segmenter, self.max_tokens = segmenter, max_tokens
        super().__init__(reward_model, learning_rate, n_epochs=n_epochs, batch_size=batch_size, reference=None, **options)
        if feedback is not None:
            self.connect(feedback)

    @property
    def reward_model(self) -> RewardModel:
        """The model that is trained."""
        return self.policy

    # -- feedback ---------------------------------------------------------------------------------------------------

    def connect(self, source: Any, *, sampled: bool = False) -> None:
        """Takes feedback; see `OfflineLearner.connect`. Of records that are left out, and of nothing but ties, a warning speaks."""
        super().connect(source, sampled=sampled)
        assert self.examples is not None
        if not sampled:
            names = [*self.examples.same_answers, *self.examples.names]
            check_sides(np.arange(len(names)) < len(self.examples.same_answers), names, self.argument)
        if all(entry.is_tie and not entry.same_answers for entry in self.examples.entries):
            warnings.warn(
                f"`feedback` holds {len(self.examples)} records, all of them ties: from these a reward model learns that answers are "
                "equally good, and nothing else.",
                stacklevel=2,
            )

    def read(self, source: Any) -> FeedbackSet:
        """Reads and tokenises feedback, as in the constructor; what was read by this trainer comes back as it is."""
        if isinstance(source, FeedbackSet):
            return source
        records = read_feedback(source).records
        entries = self._entries(records)
        # Where nothing else is there they stay, so that a loop whose policy says one thing only goes on; else `connect` refuses them.
        different = [number for number, entry in entries.items() if not entry.same_answers] or list(entries)
        kept = [number for number in different if self.max_tokens is None or entries[number].longest <= self.max_tokens]
        if not kept:
            shortest, limit = min(entries[number].longest for number in different), self.policy.limit
            if limit is not None and shortest > limit:
                raise ValueError(
                    f"`feedback` must have a record within the {limit} tokens that the reward model reads, but the shortest of these "
                    f"{len(different)} has {shortest}, prompt included; take a model that reads more, or shorter texts."
                )
            raise ValueError(
                f"`max_tokens` must be at least {shortest} to leave one of these {len(different)} records of `feedback`, got "
                f"{self.max_tokens}: the longest text of each, prompt included, is longer."
            )
        self._check(entries, kept)
        left_out = LeftOut(len(different) - len(kept), len(entries) - len(different), len(records) - len(entries))
        names = {number: f"record {number} of `feedback`" for number in entries}
        return FeedbackSet(
            [entries[number] for number in kept],
            self.policy.num_outputs,
            left_out,
            names=[names[number] for number in kept],
            same_answers=[names[number] for number in entries if number not in set(different)],
        )

    def _entries(self, records: list[Any]) -> dict[int, Entry]:
        """Tokenises the records from which something can be learned, by their places."""
        segmenter, entries = find_segmenter(self.segmenter), {}
        for number, record in enumerate(records):
            if isinstance(record, Comment):
                continue
            try:
                entries[number] = read_entry(record, self.policy, segmenter)
            except ValueError as error:
                joint = " " if str(error).startswith(("is ", "has ", "marks ")) else ": "
                raise ValueError(f"record {number} of `feedback`{joint}{error}") from error
        if not entries:
            raise ValueError(
                f"`feedback` must hold a record that a reward is learned from, got {len(records)} comments only; a judge turns them into "
                "another form (`textgym.feedback.comments_to_records`)."
            )
        check_entries(entries, self.policy.tokenizer)
        return entries

    def _check(self, entries: dict[int, Entry], kept: list[int]) -> None:
        limit = self.policy.limit
        too_long = [number for number in kept if limit is not None and entries[number].longest > limit]
        if too_long:
            raise ValueError(
                f"record {too_long[0]} of `feedback` has {entries[too_long[0]].longest} tokens, but the reward model reads {limit}; pass "
                f"`max_tokens={limit}` to leave out what is longer, {len(too_long)} of {len(entries)} records."
            )
        if not any(entries[number].weight for number in kept):
            raise ValueError("`feedback` must have at least one record with a `weight` above 0.")
        for number in kept:
            if not entries[number].pairs and entries[number].kind == "ranked" and self.ranking_loss == "pairwise":
                raise ValueError(f"record {number} of `feedback` is one tie, which has no pairs; use `ranking_loss='plackett_luce'`.")
            if entries[number].kind != "marked":
                self.policy.reward_output  # noqa: B018  (raises where no output was chosen)

    # -- the loss ---------------------------------------------------------------------------------------------------

    def minibatch_loss(self, examples: FeedbackSet, rows: Tensor) -> MicroBatchShare:
        """The mean loss of a minibatch of records."""
        count = len(rows)

        def share(batch: FeedbackBatch) -> Share:
            scores = batch.scores(self.policy)  # (I, C)
            loss, metrics = scores.new_zeros(()), {name: scores.new_zeros(()) for name in self._metric_names()}
            for group in batch.groups:
                penalty = self._centering(group, scores)
                losses = self.losses(group, scores) + self.center_coef * penalty
                loss = loss + weighted_mean(losses, group.weights, count)
                for name, values in self._metrics(group, scores.detach(), penalty.detach()).items():
                    metrics[name] += weighted_mean(values, group.weights, count)
            return Share(loss, metrics)

        return share

    def losses(self, group: Group, scores: Tensor) -> Tensor:
        """The loss of each record of one form, (B',), of the scores of the pieces (I, C)."""
        if group.kind == "marked":
            return span_loss(scores[group.places], group.clean, group.present).sum(1)
        rewards = scores[:, self.policy.reward_output][group.places]  # (B', K)
        if group.kind == "labelled":
            if self.policy.num_outputs == 2:
                return classifier_loss(scores[group.places[:, 0]], group.clean[:, 0, 0], positive=self.policy.reward_output)
            return label_loss(rewards[:, 0], group.clean[:, 0, 0])
        if group.kind == "ranked" and self.ranking_loss == "plackett_luce":
            return ranking_loss(rewards, group.ranks, group.present)
        return compared_loss(rewards, group.preferences, group.judged, self.margin_scale * group.margins)

    def _record_losses(self, group: Group, scores: Tensor) -> Tensor:
        """The loss of each record with its penalty, (B',)."""
        return self.losses(group, scores) + self.center_coef * self._centering(group, scores)

    def _centering(self, group: Group, scores: Tensor) -> Tensor:
        """The centring penalty of each record, (B',); 0 for verdicts, which fix the level by themselves."""
        if group.kind in ("marked", "labelled"):
            return scores.new_zeros(len(group.rows))
        return centering_penalty(scores[:, self.policy.reward_output][group.places], group.present)

    def _metric_names(self) -> list[str]:
        names = ["train/accuracy", "train/reward_margin", "train/reward_mean"]
        return [*names, "train/centering"] if self.center_coef else names

    def _metrics(self, group: Group, scores: Tensor, penalty: Tensor) -> Metrics:
        """By log key, one number per record, (B',).

        accuracy: the share of its decisions that are right; reward_margin: the mean of (2p − 1) Δ, how far apart the reward holds what the
        label holds apart; reward_mean: over its texts.
        """
        differences, outcomes, records = self.decisions(group, scores)
        right = torch.where(differences > 0, outcomes, torch.where(differences < 0, 1 - outcomes, 0.5))
        counts = torch.bincount(records, minlength=len(group.rows))

        def mean(values: Tensor, without: float) -> Tensor:
            sums = values.new_zeros(len(group.rows)).index_add(0, records, values)
            return torch.where(counts > 0, sums / counts.clamp(min=1), without)

        column = 0 if group.kind == "marked" else self.policy.reward_output
        values = scores[group.places].mean(2) if group.kind == "marked" else scores[group.places][..., column]
        metrics = {
            "train/accuracy": mean(right, 0.5),
            "train/reward_margin": mean((2 * outcomes - 1) * differences, 0.0),
            "train/reward_mean": (values * group.present).sum(1) / group.present.sum(1),
        }
        return {**metrics, "train/centering": penalty} if self.center_coef else metrics

    def decisions(self, group: Group, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the records of one form decide, one by one.

        Args:
            group: the records.
            scores: of the pieces, (I, C); rewards, or any other number of them.

        Returns:
            Δ of the scores, the probability p of the label, and the place of the record in the group, (M,) each: of every judged pair (of
            rankings: of different rank), of every label, of every segment and category of a marking.
        """
        if group.kind == "marked":
            places = (group.present[:, :, None] & torch.ones_like(group.clean)).nonzero(as_tuple=True)
            return scores[group.places][places], group.clean[places].float(), places[0]
        column = self.policy.reward_output
        rewards = scores[:, column][group.places]
        if group.kind == "labelled":
            other = scores[:, 1 - column][group.places[:, 0]] if self.policy.num_outputs == 2 else 0.0
            return rewards[:, 0] - other, group.clean[:, 0, 0].float(), torch.arange(len(rewards), device=rewards.device)
        places = group.judged.nonzero(as_tuple=True)
        return pair_differences(rewards)[places], group.preferences[places], places[0]

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, held_out: Any, *, progress_bar: bool = False) -> RewardModelReport:
        """Measures the reward model on feedback that it was not trained on.

        Args:
            held_out: feedback, in any form that the constructor takes, or what `read` returned.
            progress_bar: show one, on a terminal.
        """
        data = self.read(held_out)
        median = self._median_length(self.examples or data)
        with counting_bar("measuring", len(data), shown=progress_bar) as advance:
            decisions, rewards, loss = self._decide(data, median, advance=advance)
        longer = best_direction(decisions if self.examples is None else self._decide(self.examples, median, by_length=True)[0])
        return RewardModelReport.of(
            decisions, rewards, num_records=len(data), loss=loss, longer_wins=longer, left_out=data.left_out._asdict()
        )

    def _median_length(self, data: FeedbackSet) -> float:
        return float(np.median([piece.end - (piece.start if self.policy.per_token else 0) for one in data.entries for piece in one.pieces]))

    @torch.no_grad()
    def _decide(
        self, data: FeedbackSet, median: float, by_length: bool = False, advance: Callable[[int], None] = lambda count: None
    ) -> tuple[Decisions, np.ndarray, float]:
        """Returns all decisions of a data set, the rewards of its pieces and the loss; with `by_length` the model is not asked."""
        columns: list[list[np.ndarray]] = [[], [], [], []]
        clusters: list[str] = []
        categories: list[str] = []
        rewards, loss = [], 0.0
        for rows in micro_batches(data.pass_tokens, self.micro_batch_size or SCORED_AT_ONCE, self.micro_batch_tokens):
            batch = data.select(rows, self.policy.device)
            lengths = (batch.ends - (batch.starts if self.policy.per_token else 0) - median)[:, None].float()
            by_column = lengths.expand(-1, self.policy.num_outputs).clone()
            if self.policy.num_outputs == 2 and self.policy.label is not None:
                by_column[:, 1 - self.policy.label] = 0.0  # the two logits are compared with each other
            scores = by_column if by_length else batch.scores(self.policy)
            rewards.append(scores.flatten() if self.policy.label is None else scores[:, self.policy.label])
            for group in batch.groups:
                loss += float(weighted_mean(self._record_losses(group, scores), group.weights, len(data)))
                differences, outcomes, records = self.decisions(group, scores)
                weights = group.weights[records] / torch.bincount(records, minlength=len(group.rows))[records]
                found = (differences, outcomes, weights, self.decisions(group, by_column)[0])
                for column, values in zip(columns, found, strict=True):
                    column.append(values.double().cpu().numpy())
                clusters += [data.entries[number].prompt for number in group.rows[records.cpu()].tolist()]
                categories += self._categories(group, len(differences))
            advance(len(rows))
        deltas, labels, shares, by_length_deltas = (np.concatenate(column) for column in columns)
        decisions = Decisions(deltas, labels, shares, by_length_deltas, clusters, categories if any(categories) else ())
        return decisions, torch.cat(rewards).double().cpu().numpy(), loss

    def _categories(self, group: Group, count: int) -> list[str]:
        """Returns the category that each of the `count` decisions of a group is about, in their order; "" where it is about none."""
        if group.kind != "marked":
            return [""] * count
        outputs = (group.present[:, :, None] & torch.ones_like(group.clean)).nonzero(as_tuple=True)[2]
        return [self.policy.output_names[place] for place in outputs.tolist()]
