"""Scoring a rollout: log-probs, entropies and values of all its tokens, in one teacher-forced pass per model."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from textgym.agents.common.batches import RolloutBatch, StepObservations, micro_batches
from textgym.agents.common.critic import Critic
from textgym.agents.common.scoring import spread
from textgym.agents.policy import CausalLMPolicy


class RolloutScores(NamedTuple):
    """What models say of a rollout.

    Attributes:
        log_probs: log π(a_t|s_t) under the sampling distribution, (B, T), zero on padding.
        entropy: of the policy at s_t in nats, (B, T), zero on padding; None if not asked for.
        values: V(s_t), (B, T), zero on padding; None without a critic.
        end_values: V of the state after the last token, (B,); None unless asked for.
        kept: the packed kept sets that `log_probs` were renormalised over, (B, T, ceil(V/8)) uint8; None unless asked for, and when every
            token is kept.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None
    end_values: Tensor | None = None
    kept: Tensor | None = None

    def detach(self) -> "RolloutScores":
        """Returns the same without gradient."""
        return RolloutScores(*(None if table is None else table.detach() for table in self))  # type: ignore[arg-type]

    def select(self, rows: Tensor, width: int) -> "RolloutScores":
        """Returns rows `rows` of the tables over tokens, their first `width` tokens, with gradient."""
        log_probs, entropy, values = (
            None if table is None else table[rows, :width] for table in (self.log_probs, self.entropy, self.values)
        )
        assert log_probs is not None, "always there"
        return RolloutScores(log_probs, entropy, values)


def score_rollout(
    policy: CausalLMPolicy,
    batch: RolloutBatch,
    critic: Critic | None = None,
    *,
    entropy: bool = False,
    end_values: bool = False,
    return_kept: bool = False,
) -> RolloutScores:
    """Scores the tokens of `batch`, with gradient, over the kept sets that it carries.

    Args:
        policy: the language model.
        batch: episodes.
        critic: a value function; its pass is shared with the policy's where the trunk is.
        entropy: also return the entropies.
        end_values: also value the state after the last token (for rows that an outer time limit cut).
        return_kept: also return the kept sets.
    """
    if batch.steps is not None:
        return _score_steps(policy, batch, batch.steps, critic, entropy, end_values, return_kept)
    # One token more makes the state after the last token visible; which one does not matter, the models are causal.
    extra = int(end_values and critic is not None)
    completion_ids, lengths = pad(batch.completion_ids, (0, extra)), batch.lengths + extra
    kept = None if batch.kept is None else pad(batch.kept, (0, 0, 0, extra), value=255)
    hidden = critic is not None and critic.reads_policy
    scores = policy.score(
        batch.prompt_ids,
        batch.prompt_lengths,
        completion_ids,
        lengths,
        entropy=entropy,
        hidden=hidden,
        keep=kept,
        return_keep=return_kept,
    )
    width, mask = batch.completion_ids.shape[1], batch.completion_mask
    values = None
    if critic is not None:
        values = (
            critic.from_hidden(scores.hidden)
            if scores.hidden is not None
            else critic.network(batch.prompt_ids, batch.prompt_lengths, completion_ids, lengths)
        )
    return RolloutScores(
        log_probs=_masked(scores.log_probs[:, :width], mask),
        entropy=None if scores.entropy is None else _masked(scores.entropy[:, :width], mask),
        values=None if values is None else _masked(values[:, :width], mask),
        end_values=None if values is None or not extra else values.gather(1, batch.lengths[:, None]).squeeze(1),
        kept=None if scores.kept is None else scores.kept[:, :width],
    )


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, torch.zeros_like(values))


def _score_steps(
    policy: CausalLMPolicy,
    batch: RolloutBatch,
    steps: StepObservations,
    critic: Critic | None,
    entropy: bool,
    end_values: bool,
    return_kept: bool,
) -> RolloutScores:
    """The closed-loop form: every step is a sequence of its own, with one token to score."""
    width, mask = batch.completion_ids.shape[1], batch.completion_mask
    wanted = torch.arange(width + 1, device=mask.device) < batch.lengths[:, None] + int(end_values)  # (B, T + 1)
    attention = steps.attention_mask[wanted]  # (N, L)
    # A stable sort puts the masked-out columns first: whatever their places were, the rows are left-padded now.
    prompt_ids = steps.input_ids[wanted].gather(1, attention.long().argsort(dim=1, stable=True))
    prompt_lengths = attention.sum(1)
    tokens = pad(batch.completion_ids, (0, 1))[wanted][:, None]
    ones = torch.ones_like(prompt_lengths)
    hidden = critic is not None and critic.reads_policy
    keep = None if batch.kept is None else pad(batch.kept, (0, 0, 0, 1), value=255)[wanted][:, None]
    scores = policy.score(prompt_ids, prompt_lengths, tokens, ones, entropy=entropy, hidden=hidden, keep=keep, return_keep=return_kept)
    values = None
    if critic is not None:
        values = (
            critic.from_hidden(scores.hidden) if scores.hidden is not None else critic.network(prompt_ids, prompt_lengths, tokens, ones)
        )

    def table(flat: Tensor) -> Tensor:
        """(N, 1) -> (B, T + 1)."""
        return torch.zeros(wanted.shape, dtype=flat.dtype, device=flat.device).masked_scatter(wanted, flat[:, 0])

    value_table = None if values is None else table(values)
    return RolloutScores(
        log_probs=_masked(table(scores.log_probs)[:, :width], mask),
        entropy=None if scores.entropy is None else _masked(table(scores.entropy)[:, :width], mask),
        values=None if value_table is None else _masked(value_table[:, :width], mask),
        end_values=None if value_table is None or not end_values else value_table.gather(1, batch.lengths[:, None]).squeeze(1),
        kept=None if scores.kept is None else spread(scores.kept[:, 0], wanted)[:, :width],
    )


def score_in_parts(
    policy: CausalLMPolicy,
    batch: RolloutBatch,
    critic: Critic | None = None,
    part_size: int | None = None,
    part_tokens: int | None = None,
    *,
    entropy: bool = False,
    end_values: bool = False,
) -> RolloutScores:
    """As `score_rollout`, in parts of `part_size` rows and `part_tokens` tokens at most; meant for use without gradient."""
    width = batch.completion_ids.shape[1]
    chosen = micro_batches(batch.pass_tokens, part_size, part_tokens)
    own_order = torch.cat(chosen).argsort()
    parts = [score_rollout(policy, batch.select(rows), critic, entropy=entropy, end_values=end_values) for rows in chosen]

    def join(pieces: list[Tensor | None]) -> Tensor | None:
        tensors = [piece for piece in pieces if piece is not None]
        if not tensors:
            return None
        return torch.cat([t if t.dim() == 1 else pad(t, (0, width - t.shape[1])) for t in tensors])[own_order]

    joined = [join(list(column)) for column in zip(*parts, strict=True)]
    assert joined[0] is not None
    return RolloutScores(joined[0], *joined[1:])


@torch.no_grad()
def reference_log_probs(
    reference: CausalLMPolicy, batch: RolloutBatch, part_size: int | None = None, part_tokens: int | None = None
) -> Tensor:
    """Returns log π_ref(a_t|s_t) of a rollout's tokens, at the temperature and over the kept sets that were sampled from, (B, T).

    Args:
        reference: the frozen reference.
        batch: episodes.
        part_size: rows per pass, at most; None for no bound.
        part_tokens: tokens per pass, at most; None for no bound.
    """
    return score_in_parts(reference, batch, part_size=part_size, part_tokens=part_tokens).log_probs


def values_in_parts(
    policy: CausalLMPolicy, batch: RolloutBatch, critic: Critic, part_size: int | None = None, part_tokens: int | None = None
) -> Tensor:
    """The values of `score_in_parts`, (B, T), without the policy's pass where the critic does not need it."""
    if critic.reads_policy or batch.steps is not None:
        values = score_in_parts(policy, batch, critic, part_size, part_tokens).values
        assert values is not None
        return values
    parts, chosen = [], micro_batches(batch.pass_tokens, part_size, part_tokens)
    for rows in chosen:
        part = batch.select(rows)
        values = critic.network(part.prompt_ids, part.prompt_lengths, part.completion_ids, part.lengths)
        parts.append(pad(values, (0, batch.completion_ids.shape[1] - values.shape[1])))
    return torch.cat(parts)[torch.cat(chosen).argsort()]
