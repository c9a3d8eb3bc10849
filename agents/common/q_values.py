"""What models say of every state of a batch of completions, over the set of tokens that may be taken there.

The states are s_0 .. s_{T−1}, in which tokens were taken, and on request s_T behind the last one. No (B, T, V) float32 tensor is made: the
logits come chunk by chunk, and of each only the numbers below are kept.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from textgym.agents.common.batches import RolloutBatch
from textgym.agents.common.critic import Critic
from textgym.agents.common.layout import Rows, lay_out
from textgym.agents.common.sampling import scale_logits, token_log_probs, unpack_kept
from textgym.agents.common.scoring import in_chunks, spread
from textgym.agents.common.token_mask import TokenMask
from textgym.agents.common.value_heads import ValueModel
from textgym.agents.policy import CausalLMPolicy


@dataclass(frozen=True, eq=False)
class States:
    """The states of a batch, N of them over all rows, in row-major order.

    Attributes:
        layout: the sequences; `targets` are the tokens taken, and 0 in a state behind the last token.
        taken: (N,) bool, False in the states behind the last token.
        kept: the tokens that may be taken, packed, (N, ceil(V/8)) uint8; None for the whole vocabulary.
    """

    layout: Rows
    taken: Tensor
    kept: Tensor | None = None


class StateScores(NamedTuple):
    """What a policy and a critic say of the states, each (B, T), or (B, T + 1) with the states behind the last token; zero elsewhere.

    Attributes:
        log_probs: log π of the token taken, or of the one asked about, renormalised over the set; means nothing in a state behind the
            last token, unless asked about.
        best: the most probable token of the set, int64; None unless asked for.
        best_log_probs: its log-prob, without gradient; None unless asked for.
        values: V(s_t).
    """

    log_probs: Tensor
    best: Tensor | None
    best_log_probs: Tensor | None
    values: Tensor


def states_of(batch: RolloutBatch, mask: TokenMask | None, *, end_states: bool) -> States:
    """Lays out the states of a batch, with the set of tokens that may be taken in each.

    Args:
        batch: episodes.
        mask: says which; None allows all.
        end_states: also the states behind the last token (for rows that an outer time limit cut).
    """
    extra = int(end_states)
    layout = lay_out(batch.prompt_ids, batch.prompt_lengths, pad(batch.completion_ids, (0, extra)), batch.lengths + extra)
    return States(layout, pad(batch.completion_mask, (0, extra))[layout.mask], None if mask is None else mask.along(layout))


def score_states(
    policy: CausalLMPolicy, critic: Critic, states: States, *, tokens: Tensor | None = None, best: bool = False
) -> StateScores:
    """Scores states in one pass of the policy (and one of the critic, where it has a trunk of its own), with gradient.

    Args:
        policy: the language model.
        critic: the value function.
        states: from `states_of`.
        tokens: the log-probs of these are given, (B, T) int64, in the place of those taken.
        best: also find the most probable token of each state's set.
    """
    layout, backbone = states.layout, policy.backbone
    features, hidden = backbone.predictors(layout)
    chosen = layout.targets if tokens is None else tokens[layout.mask]
    # Rounding may put a token at the edge of the set on the other side than when it was taken; it was taken, so it was in.
    forced = states.taken if tokens is None else torch.zeros_like(states.taken)

    def statistics(features: Tensor, chosen: Tensor, forced: Tensor, kept: Tensor | None) -> tuple[Tensor, ...]:
        logits = scale_logits(backbone.logits(features), policy.sampling.temperature)
        if kept is not None:
            inside = unpack_kept(kept, backbone.vocab_size)
            here = chosen.unsqueeze(-1)
            inside = inside.scatter(-1, here, inside.gather(-1, here) | forced.unsqueeze(-1))
            logits = logits.masked_fill(~inside, -torch.inf)
        if not best:
            return (token_log_probs(logits, chosen),)
        top = logits.detach().argmax(-1)
        return token_log_probs(logits, chosen), top, token_log_probs(logits.detach(), top)

    found = in_chunks(statistics, backbone.vocab_size, features, chosen, forced, states.kept)
    values = _values(critic, states, hidden)
    tables = [spread(column, layout.mask) for column in found]
    return StateScores(tables[0], tables[1] if best else None, tables[2] if best else None, values)


def state_values(policy: CausalLMPolicy, critic: Critic, states: States) -> Tensor:
    """Returns the `values` of `score_states` alone, without a single logit; the policy is run only where the critic reads its states."""
    hidden = policy.backbone.predictors(states.layout)[1] if critic.reads_policy else None
    return _values(critic, states, hidden)


def _values(critic: Critic, states: States, hidden: Tensor | None) -> Tensor:
    if isinstance(critic.network, ValueModel):
        return critic.network.values_of(states.layout)
    assert hidden is not None, "a head reads the policy's hidden states"
    return spread(critic.from_hidden(hidden).float(), states.layout.mask)
