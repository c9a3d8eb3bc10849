"""The sampling distribution: temperature, then the kept set (legal actions, top-k, top-p, min-p), then a draw from exactly that.

Generation and scoring both go through this module, so that the distribution that is sampled is the distribution that is scored.
A *kept set* is a boolean mask over the vocabulary, True = the token can be drawn; it travels packed, eight tokens to a byte.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SINGLE, BLOCK = 512, 128  # tokens: vocabularies up to the first are searched at once; any sizes give the same distribution


@dataclass(frozen=True)
class Sampling:
    """How a policy turns logits into a distribution. The defaults leave the model's own distribution untouched.

    The steps apply in this order, each to the renormalised outcome of the one before:

    Attributes:
        temperature: logits are divided by it; above 0, dimensionless.
        top_k: keep the k most probable tokens (ties with the k-th are kept too); 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches `top_p`, in (0, 1]; 1 keeps all.
        min_p: keep the tokens with at least `min_p` times the probability of the most probable one, in [0, 1); 0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Checks every field, so that a wrong one fails where it was written."""
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(
                f"`temperature` must be a finite number above 0, got {self.temperature}. "
                "For the most probable token use `generate(..., temperature=0)` or `predict(..., deterministic=True)`."
            )
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"`top_k` must be a whole number >= 0 (0 keeps every token), got {self.top_k}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"`top_p` must be in (0, 1] (1 keeps every token), got {self.top_p}.")
        if not 0.0 <= self.min_p < 1.0:
            raise ValueError(f"`min_p` must be in [0, 1) (0 keeps every token), got {self.min_p}.")

    @property
    def truncates(self) -> bool:
        """Whether some tokens can be left out of the distribution."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def scale_logits(logits: Tensor, temperature: float) -> Tensor:
    """Returns float32 logits of the sampling distribution before truncation, (..., V)."""
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature


def kept_tokens(logits: Tensor, sampling: Sampling, legal: Tensor | None = None) -> Tensor | None:
    """The set of tokens that can be drawn.

    Args:
        logits: after the temperature, float32, (..., V).
        sampling: top-k, top-p and min-p are read.
        legal: True = allowed before any truncation, broadcastable to `logits`, bool; None allows all.

    Returns:
        (..., V) bool, True = kept; None when nothing is left out.
    """
    if not sampling.truncates:
        return None if legal is None else legal.expand_as(logits)
    with torch.no_grad():
        logits = logits.detach()
        if legal is not None:
            logits = logits.masked_fill(~legal, -torch.inf)
        if 0 < sampling.top_k < logits.shape[-1]:
            kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if sampling.top_p < 1.0:
            probs = logits.softmax(-1)
            ordered = probs.sort(dim=-1, descending=True).values
            # A token stays while the mass before it is short of top_p. The cut is made on the probability of the last one that stays,
            # not on ranks, so that equal probabilities share one fate and the set does not depend on the order of a sort.
            stays = ordered.cumsum(-1) - ordered < sampling.top_p
            least = ordered.masked_fill(~stays, torch.inf).amin(-1, keepdim=True)
            logits = logits.masked_fill(probs < least, -torch.inf)
        if sampling.min_p > 0.0:
            cut = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
            logits = logits.masked_fill(logits < cut, -torch.inf)
        return logits > -torch.inf


class TokenRule:
    """Which tokens the logits of a model leave in: its truncated distribution, a smallest number of tokens, and some in any case.

    Args:
        sampling: temperature and truncation.
        min_tokens_to_keep: so many of the most probable tokens stay whatever the truncation says (ties with the last are kept too).
        always: ids that stay in any case.
    """

    def __init__(self, sampling: Sampling, min_tokens_to_keep: int = 1, always: Sequence[int] = ()) -> None:
        self.sampling, self.min_tokens_to_keep, self.always = sampling, min_tokens_to_keep, tuple(always)
        self._always: Tensor | None = None

    @torch.no_grad()
    def __call__(self, logits: Tensor) -> Tensor:
        """Returns (..., V) bool, True = left in, from a model's logits (..., V) before the temperature."""
        logits = scale_logits(logits, self.sampling.temperature)
        kept = kept_tokens(logits, self.sampling)
        if kept is None:
            return torch.ones_like(logits, dtype=torch.bool)
        if self.min_tokens_to_keep > 1:
            last = logits.topk(min(self.min_tokens_to_keep, logits.shape[-1]), dim=-1).values[..., -1:]
            kept = kept | (logits >= last)
        return kept | self._in_any_case(logits)

    def _in_any_case(self, logits: Tensor) -> Tensor:
        """(V,) bool, kept on the device: a list of ids would be sent there at every step."""
        if self._always is None or self._always.device != logits.device:
            self._always = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            self._always[list(self.always)] = True
        return self._always


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one token per row by inverting the cumulative distribution.

    One number per row is enough, so a row's draw depends on nothing but its own logits and its own number: the batch can be split,
    shuffled or thinned out without changing what any row gets. Cumulative sums run in float64, so that the rarest tokens keep their
    probability; first over blocks of the vocabulary, then inside the block that was hit, which touches a large vocabulary only once.

    Args:
        logits: float32, -inf outside the kept set, (B, V).
        uniforms: in [0, 1), float64, (B,).

    Returns:
        tokens (B,) int64 and their log-probs (B,) float32, under softmax(logits).
    """
    top = logits.amax(-1, keepdim=True)
    tokens, total = _invert_blocks((logits - top).exp_(), uniforms.unsqueeze(-1))
    log_probs = logits.gather(-1, tokens) - top - total.log().float()
    return tokens.squeeze(-1), log_probs.squeeze(-1)


def _invert_blocks(weights: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the token (B, 1) at a fraction (B, 1) of the sum of `weights` (B, V) float32, and that sum (B, 1) float64."""
    vocab_size = weights.shape[-1]
    if vocab_size <= SINGLE:
        tokens, _, total = _invert(weights, fraction)
        return tokens, total
    weights = torch.nn.functional.pad(weights, (0, -vocab_size % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = weights.sum(-1).double()
    block, cumulative, total = _invert(sums, fraction)
    weight = sums.gather(1, block)
    fraction = (fraction * total - (cumulative.gather(1, block) - weight)) / weight
    inside = weights.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1)
    tokens = block * BLOCK + _invert(inside, fraction)[0]
    # Where the model gave no numbers (NaN), any token will do, but it must be one.
    return tokens.clamp_(max=vocab_size - 1), total


def _invert(weights: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the cell (B, 1) of `weights` (B, N) at a fraction (B, 1) of their sum, never one of weight 0.

    Returns:
        the cell, the cumulative weights (B, N) and their sum (B, 1), both float64.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    cell = torch.searchsorted(cumulative, fraction * total, right=True)
    # By rounding the target can reach the total; the last cell of positive weight is then the right one.
    last = torch.searchsorted(cumulative, total).clamp_(max=weights.shape[-1] - 1)
    return torch.minimum(cell, last), cumulative, total


def draw_epsilon_greedy(logits: Tensor, uniforms: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Draws one token per row ε-greedily: with probability ε one of the kept tokens, each alike, else the most probable one.

    As in `draw`, one number per row is enough: below ε it also says which of the kept tokens is taken.

    Args:
        logits: float32, -inf outside the kept set, (B, V).
        uniforms: in [0, 1), float64, (B,).
        epsilon: ε in [0, 1].

    Returns:
        tokens (B,) int64 and the log-probs (B,) float32 of drawing them so.
    """
    kept = logits > -torch.inf
    count, best = kept.sum(-1), logits.argmax(-1)
    below = (uniforms / epsilon).clamp(max=1) if epsilon else torch.zeros_like(uniforms)
    rank = torch.minimum((below * count).long(), (count - 1).clamp(min=0))
    ranked = torch.searchsorted(kept.cumsum(-1), (rank + 1).unsqueeze(-1)).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    tokens = torch.where(uniforms < epsilon, ranked, best)
    probs = epsilon / count + (1 - epsilon) * (tokens == best)
    return tokens, probs.log().float()


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Returns log softmax(logits)[tokens], (...), for float32 logits (..., V) and tokens (...) int64. Differentiable."""
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")
    return -losses.view(tokens.shape)


def distribution_entropy(logits: Tensor) -> Tensor:
    """Returns the entropy of softmax(logits) in nats, (...), for float32 logits (..., V) that may hold -inf. Differentiable."""
    log_probs = logits.log_softmax(-1)
    # 0 log 0 = 0; without the fill, 0 * -inf would be NaN, in the value and in the gradient.
    log_probs = log_probs.masked_fill(logits == -torch.inf, 0.0)
    return -(logits.softmax(-1) * log_probs).sum(-1)


def packed_width(vocab_size: int) -> int:
    """Returns the bytes of one packed kept set, ceil(V / 8)."""
    return -(-vocab_size // 8)


def pack_kept(kept: Tensor) -> Tensor:
    """Packs kept sets (..., V) bool into bits (..., ceil(V/8)) uint8; token v is bit v % 8 of byte v // 8 (numpy's bitorder "little")."""
    vocab_size = kept.shape[-1]
    bits = torch.nn.functional.pad(kept.to(torch.uint8), (0, -vocab_size % 8)).unflatten(-1, (-1, 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=kept.device)
    packed: Tensor = (bits << shifts).sum(-1, dtype=torch.uint8)
    return packed


def unpack_kept(packed: Tensor, vocab_size: int) -> Tensor:
    """Undoes `pack_kept`: (..., ceil(V/8)) uint8 to (..., V) bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :vocab_size].bool()


def count_kept(packed: Tensor) -> Tensor:
    """Returns how many tokens packed sets hold: (..., ceil(V/8)) uint8 to (...) int64."""
    # The bits of each byte are added up pairwise, in place of a table of V booleans.
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(-1)
