"""Teacher-forced scoring: log-probs, entropies, values and divergences of whole completions in one pass of the model.

The head is applied where a completion token is predicted and nowhere else. Once the logits of all those positions would be large they
are made chunk by chunk, and made again in the backward pass, so that no (B, T, V) float32 tensor ever exists.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.layout import Rows
from textgym.agents.common.sampling import (
    Sampling,
    TokenRule,
    distribution_entropy,
    kept_tokens,
    pack_kept,
    scale_logits,
    token_log_probs,
    unpack_kept,
)

# Up to so many float32 logits (64 MB) are held at once, and kept for the backward pass; beyond it, chunks of so many are made (40 MB).
# A chunk is larger than 32 MB: below that glibc puts it on the heap, whose holes then add up to several times what is in use.
PLAIN_LOGITS = 2**24
CHUNK_LOGITS = 10 * 2**20


@dataclass(eq=False)
class Scores:
    """What a policy says about completions. Everything is zero from `lengths` on.

    Attributes:
        log_probs: log π(y_t|s_t) under the sampling distribution, in nats, (B, T) float32.
        entropy: entropy of the sampling distribution at s_t, in nats, (B, T) float32; None unless asked for.
        hidden: last hidden state at s_t, the position that predicts token t, (B, T, H) in the model's dtype; None unless asked for.
        values: what the value head given says at s_t, (B, T) float32; None without one.
        kept: the packed kept sets that `log_probs` were renormalised over, (B, T, ceil(V/8)) uint8; None unless asked for, and when
            every token is kept.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    hidden: Tensor | None = None
    values: Tensor | None = None
    kept: Tensor | None = None


def score_completions(
    backbone: Backbone,
    layout: Rows,
    sampling: Sampling,
    *,
    kept: Tensor | None = None,
    legal: Tensor | None = None,
    entropy: bool = False,
    hidden: bool = False,
    value_head: nn.Module | None = None,
    return_kept: bool = False,
) -> Scores:
    """Scores completions in one pass, with gradients where they are enabled.

    Args:
        backbone: the model.
        layout: from `lay_out`.
        sampling: temperature and truncation of the distribution that is scored.
        kept: packed kept sets to renormalise over, (B, T, ceil(V/8)) uint8, as generation returned them; they take the place of top-k,
            top-p and min-p. None: the kept set is worked out from the present logits. Either way a token that was chosen counts as kept.
        legal: packed sets of the tokens that are allowed before any truncation, (N, ceil(V/8)) uint8, one per completion token; None
            allows all. Not asked where `kept` is given, which has it in it.
        entropy: also give entropies.
        hidden: also give hidden states.
        value_head: (N, H) to (N,); also give its values.
        return_kept: also give the packed kept sets.
    """
    features, states = backbone.predictors(layout)
    kept_rows = None if kept is None else kept[layout.mask]

    def statistics(features: Tensor, targets: Tensor, kept: Tensor | None, legal: Tensor | None) -> tuple[Tensor, ...]:
        logits, kept_now = _sampling_logits(backbone, features, targets, sampling, kept, legal)
        found = [token_log_probs(logits, targets)]
        if entropy:
            found.append(distribution_entropy(logits))
        if return_kept and kept_now is not None:
            found.append(pack_kept(kept_now))
        return tuple(found)

    found = list(in_chunks(statistics, backbone.vocab_size, features, layout.targets, kept_rows, legal))
    log_probs = found.pop(0)
    return Scores(
        log_probs=spread(log_probs, layout.mask),
        entropy=spread(found.pop(0), layout.mask) if entropy else None,
        hidden=spread(states, layout.mask) if hidden else None,
        values=None if value_head is None else spread(value_head(states).float(), layout.mask),
        kept=spread(found.pop(0), layout.mask) if found else None,
    )


def paired_log_probs(
    backbone: Backbone,
    features: Tensor,
    other: Backbone,
    other_features: Tensor,
    targets: Tensor,
    sampling: Sampling,
    legal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` (N,) under two models at one temperature, both renormalised over the tokens that the first one keeps.

    Those are taken from the packed sets `legal` (N, ceil(V/8)) if given.

    Returns:
        (N,) and (N,) float32.
    """

    def statistics(features: Tensor, other_features: Tensor, targets: Tensor, legal: Tensor | None) -> tuple[Tensor, ...]:
        allowed = None if legal is None else unpack_kept(legal, backbone.vocab_size)
        logits, other_logits = paired_distributions(backbone.logits(features), other.logits(other_features), sampling, targets, allowed)
        return token_log_probs(logits, targets), token_log_probs(other_logits, targets)

    first, second = in_chunks(statistics, backbone.vocab_size, features, other_features, targets, legal)
    return first, second


def full_kl(
    backbone: Backbone, features: Tensor, other: Backbone, other_features: Tensor, sampling: Sampling, legal: Tensor | None = None
) -> Tensor:
    """Returns KL(first ‖ other) over the whole vocabulary at each of N states, in nats, (N,) float32; see `paired_log_probs`."""

    def statistics(features: Tensor, other_features: Tensor, legal: Tensor | None) -> tuple[Tensor, ...]:
        allowed = None if legal is None else unpack_kept(legal, backbone.vocab_size)
        return (divergence(*paired_distributions(backbone.logits(features), other.logits(other_features), sampling, legal=allowed)),)

    return in_chunks(statistics, backbone.vocab_size, features, other_features, legal)[0]


@torch.no_grad()
def kept_along(backbone: Backbone, layout: Rows, rule: TokenRule) -> Tensor:
    """Returns the packed sets that `rule` leaves in at the state of each completion token, (N, ceil(V/8)) uint8; one pass of the model."""
    features, _ = backbone.predictors(layout)
    return in_chunks(lambda features: (pack_kept(rule(backbone.logits(features))),), backbone.vocab_size, features)[0]


def _sampling_logits(
    backbone: Backbone, features: Tensor, targets: Tensor, sampling: Sampling, kept: Tensor | None, legal: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns float32 logits with -inf outside the kept set, and that set; both (N, V)."""
    logits = scale_logits(backbone.logits(features), sampling.temperature)
    if kept is not None:
        mask: Tensor | None = unpack_kept(kept, backbone.vocab_size)
    else:
        mask = kept_tokens(logits, sampling, None if legal is None else unpack_kept(legal, backbone.vocab_size))
    if mask is None:
        return logits, None
    # Rounding may put a token at the edge of the set on the other side than at sampling; it was drawn, so it was in.
    mask = mask.scatter(-1, targets.unsqueeze(-1), True)
    return logits.masked_fill(~mask, -torch.inf), mask


def paired_distributions(
    logits: Tensor, other_logits: Tensor, sampling: Sampling, targets: Tensor | None = None, legal: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Brings the logits (N, V) of two models to one temperature and one kept set.

    That is the first one's, out of the tokens `legal` (N, V) if given, and `targets` (N,) if given.
    """
    logits, other_logits = scale_logits(logits, sampling.temperature), scale_logits(other_logits, sampling.temperature)
    mask = kept_tokens(logits, sampling, legal)
    if mask is None:
        return logits, other_logits
    if targets is not None:
        mask = mask.scatter(-1, targets.unsqueeze(-1), True)
    return logits.masked_fill(~mask, -torch.inf), other_logits.masked_fill(~mask, -torch.inf)


def divergence(logits: Tensor, other_logits: Tensor) -> Tensor:
    """Returns KL(softmax(logits) ‖ softmax(other_logits)) in nats, (...), float32 from (..., V); -inf at the same places in both."""
    log_ratio = logits.log_softmax(-1) - other_logits.log_softmax(-1)
    return (logits.softmax(-1) * log_ratio.masked_fill(logits == -torch.inf, 0.0)).sum(-1)


def in_chunks(function: Callable[..., tuple[Tensor, ...]], vocab_size: int, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Applies `function` to N positions: at once while their logits are few, else in chunks that the backward pass makes again."""
    first = inputs[0]
    assert first is not None, "the first input has one line per position"
    positions = first.shape[0]
    if positions * vocab_size <= PLAIN_LOGITS:
        return function(*inputs)
    size = max(1, CHUNK_LOGITS // vocab_size)
    pieces = []
    for start in range(0, positions, size):
        chunk = [None if tensor is None else tensor[start : start + size] for tensor in inputs]
        if torch.is_grad_enabled():
            pieces.append(checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(function(*chunk))
    return tuple(torch.cat(piece) for piece in zip(*pieces, strict=True))


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """Puts (N, ...) back into (B, T, ...), zero elsewhere. Differentiable."""
    return flat.new_zeros((*mask.shape, *flat.shape[1:])).index_put((mask,), flat)
