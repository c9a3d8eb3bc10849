"""The losses of learning a reward from feedback: pure functions of rewards, one number per record.

A reward r is a model's score of a text or of a piece of one. Losses are returned per record, (B,), so that a data set can weigh them;
`preference_losses.weighted_mean` reduces them. K answers of one prompt are one record, whatever K is.
"""

from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from textgym.agents.common.masking import check_one_per_row, check_same_shape, masked_mean, masked_sum
from textgym.agents.common.preference_losses import dpo_loss, plackett_luce_loss

LARGEST_TIE = 12  # answers that share a rank; the exact loss looks at 2^12 sets of them


def bradley_terry_loss(differences: Tensor, preferences: Tensor, margins: Tensor | None = None) -> Tensor:
    """Bradley–Terry with soft labels, and with Llama 2's margin (Touvron et al. 2023, arXiv:2307.09288, eq. 2).

        L = −p log σ(Δ − m) − (1 − p) log σ(m − Δ),    Δ = r_w − r_l

    With p = 1 and m = 0 it is −log σ(r_w − r_l) (Ouyang et al. 2022, arXiv:2203.02155, eq. 1 at K = 2). A tie, p = ½, gives
    ½(−log σ(Δ) − log σ(−Δ)). The minimum is at Δ = m + log p/(1 − p). Of segments (Christiano et al. 2017, arXiv:1706.03741, eq. 1) r is
    the sum of the rewards of their tokens.

    Args:
        differences: Δ, any shape.
        preferences: p = P(w ≻ l) in [0, 1], the same shape.
        margins: m, the same shape; None for 0.

    Returns:
        The loss of each pair, in the shape of `differences`.
    """
    check_same_shape(differences=differences, preferences=preferences, margins=margins)
    return dpo_loss(differences if margins is None else differences - margins, preferences, beta=1.0)


def compared_loss(rewards: Tensor, preferences: Tensor, judged: Tensor, margins: Tensor | None = None) -> Tensor:
    """All pairs of one prompt as one record, Ouyang et al. 2022 (InstructGPT, arXiv:2203.02155) eq. 1.

        L = 1/|P| Σ_{(i,j) ∈ P} ℓ(r_i − r_j),    P the pairs that were judged, C(K,2) of them if all were;  ℓ Bradley–Terry's

    Args:
        rewards: r of the K answers, (B, K).
        preferences: P(i ≻ j), (B, K, K); looked at where `judged` is True.
        judged: the pairs of P, each in one of its two orders, (B, K, K) bool.
        margins: m_ij of each pair, (B, K, K); None for 0.

    Returns:
        (B,), the mean over the judged pairs of each record; 0 where there is none.
    """
    check_same_shape(preferences=preferences, judged=judged, margins=margins)
    check_same_shape(differences=pair_differences(rewards), judged=judged)
    return masked_mean(bradley_terry_loss(pair_differences(rewards), preferences, margins), judged, dim=(1, 2))


def pair_differences(rewards: Tensor) -> Tensor:
    """Returns r_i − r_j of the K answers of each record, (B, K, K), from (B, K)."""
    return rewards[:, :, None] - rewards[:, None, :]


def ranking_loss(rewards: Tensor, ranks: Tensor, present: Tensor) -> Tensor:
    """Plackett–Luce with ties: the mean of −log PL over all orderings that the ties allow.

        L = E_τ −Σ_i [ r_τ(i) − log Σ_{j≥i} exp r_τ(j) ],    τ uniform over the orderings in which better ranks come first

    At K = 2 it is Bradley–Terry, a tie the label ½. The mean is exact: where m answers share a rank, those of them that are still there
    when s are left are a random set of s, so the m! orderings come down to 2^m sets.

    Args:
        rewards: r, (B, K).
        ranks: 1 for the best, equal numbers are ties, (B, K) integers.
        present: False where a record has fewer answers, (B, K) bool.

    Returns:
        (B,), the sum over the places of each ranking.

    Raises:
        ValueError: more than `LARGEST_TIE` answers share a rank.
    """
    check_same_shape(rewards=rewards, ranks=ranks, present=present)
    last = ranks.max() + 1
    order = torch.where(present, ranks, last).argsort(dim=1, stable=True)
    rewards, ranks, present = (table.gather(1, order) for table in (rewards, ranks, present))
    losses = plackett_luce_loss(rewards, present, beta=1.0)
    tied = ((ranks[:, 1:] == ranks[:, :-1]) & present[:, 1:]).any(dim=1)
    if not tied.any():
        return losses
    rows = list(losses.unbind())
    for row in tied.nonzero()[:, 0].tolist():
        count = int(present[row].sum())
        rows[row] = _tied_ranking_loss(rewards[row, :count], ranks[row, :count])
    return torch.stack(rows)


def _tied_ranking_loss(rewards: Tensor, ranks: Tensor) -> Tensor:
    """The loss of one ranking, best first, scalar from (K,)."""
    loss = rewards.new_zeros(())
    worse = rewards.new_full((), -torch.inf)  # log Σ exp r over the groups below
    sizes = torch.unique_consecutive(ranks, return_counts=True)[1].tolist()
    for group in reversed(rewards.split(sizes)):
        loss = loss + _expected_log_sums(group, worse) - group.sum()
        worse = torch.cat([group, worse[None]]).logsumexp(0)
    return loss


def _expected_log_sums(group: Tensor, worse: Tensor) -> Tensor:
    """Σ over s = 1..m of the mean of log(Σ_{j∈S} exp r_j + exp `worse`) over the sets S of s members of `group`, (m,) to a scalar."""
    count = len(group)
    if count > LARGEST_TIE:
        raise ValueError(
            f"`ranks` must have at most {LARGEST_TIE} equal ones (the exact loss of m ties takes 2^m terms), got {count}; "
            "train on the pairs of that ranking instead (`ranking_loss='pairwise'`)."
        )
    total = group.new_zeros(())
    for size in range(1, count + 1):
        members = torch.tensor(list(combinations(range(count), size)), device=group.device)  # (sets, size)
        sums = torch.logaddexp(group[members].logsumexp(1), worse) if torch.isfinite(worse) else group[members].logsumexp(1)
        total = total + sums.mean()
    return total


def label_loss(rewards: Tensor, good: Tensor) -> Tensor:
    """+1 or −1 from a contextual bandit's user: Bernoulli with P(z = 1) = σ(r).

        L = −log σ(z r)

    Args:
        rewards: r, any shape.
        good: True where z = 1, False where z = −1, the same shape.

    Returns:
        The loss of each label, in the shape of `rewards`.
    """
    check_same_shape(rewards=rewards, good=good)
    return -logsigmoid(torch.where(good.bool(), rewards, -rewards))


def classifier_loss(logits: Tensor, good: Tensor, *, positive: int) -> Tensor:
    """Cross-entropy of a classifier with two classes; its reward is the logit of the positive one.

    Args:
        logits: (B, 2).
        good: True for the positive class, (B,).
        positive: which of the two that is, 0 or 1.

    Returns:
        (B,), in nats.
    """
    check_one_per_row(logits, good=good)
    return cross_entropy(logits, torch.where(good.bool(), positive, 1 - positive), reduction="none")


def span_loss(rewards: Tensor, clean: Tensor, present: Tensor) -> Tensor:
    """One reward per category and segment, Wu et al. 2023 (Fine-Grained RLHF, arXiv:2306.01693) §3.1: is the segment free of it?

        L_k = 1/S Σ_j −log σ(z_jk r_jk),    z_jk = 1 where no span of category k touches segment j, else −1

    Args:
        rewards: r_jk, (B, S, C).
        clean: True where z = 1, (B, S, C).
        present: False behind the last segment of a text, (B, S) bool.

    Returns:
        (B, C): each category's own loss, the mean over the segments of each text.
    """
    check_same_shape(rewards=rewards, clean=clean)
    return masked_mean(label_loss(rewards, clean), present[:, :, None].expand_as(rewards), dim=1)


def centering_penalty(rewards: Tensor, present: Tensor) -> Tensor:
    """What keeps rewards near zero, Eisenstein et al. 2023 (arXiv:2312.09244) §3: comparisons fix the differences only.

        C = mean over the pairs {i, j} of (r_i + r_j)²

    Args:
        rewards: r of the answers of each prompt, (B, K).
        present: False where a record has fewer answers, (B, K) bool.

    Returns:
        (B,), the mean over the pairs of each record.
    """
    check_same_shape(rewards=rewards, present=present)
    sums = rewards[:, :, None] + rewards[:, None, :]
    pairs = (present[:, :, None] & present[:, None, :]).triu(diagonal=1)
    return masked_sum(sums.square(), pairs, dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)
