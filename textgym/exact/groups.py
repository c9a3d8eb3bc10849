"""What GRPO does on a token tree, exactly: its expected advantages, its expected update, and where that vanishes.

GRPO maximises no objective. Its first-step update has an expectation all the same, over groups of G independent completions, and the
policy at which that is zero is what an agent must end up with. Everything here is of a tabular softmax policy, whose zero is that of
any model able to hold it.
"""

from typing import Any, Literal, TypeAlias

import numpy as np

from textgym.exact.tree import Table, TokenTree
from textgym.types import IntArray

GroupReduction: TypeAlias = Literal["sequence_mean", "sequence_sum"]
MAX_GROUPS = 5_000_000


class GroupAdvantages:
    """E[A | y] of GRPO for each completion y: the group standardised, its other members drawn from the policy.

    All multisets of G completions are written down once, (C + G − 1 choose G) of them; a policy then only weights them.

    Args:
        tree: the MDP.
        num_generations: G, at least 2.
        scale: whether deviations from the group's mean are divided by its standard deviation (G − 1 in the denominator) plus `eps`.
        eps: see `scale`.

    Raises:
        ValueError: there are more than `MAX_GROUPS` multisets.
    """

    def __init__(self, tree: TokenTree, num_generations: int, *, scale: bool = True, eps: float = 1e-4) -> None:
        if num_generations < 2:
            raise ValueError(f"`num_generations` must be at least 2: a group is compared with itself, got {num_generations}.")
        self.tree = tree
        self.members = _multisets(tree.num_completions, num_generations)
        # The orders a multiset can be drawn in: G! / Π (multiplicities)!. Members are sorted, so runs are the multiplicities.
        self.log_orders = np.zeros(len(self.members))
        run = np.ones(len(self.members))
        for column in range(1, num_generations):
            run = np.where(self.members[:, column] == self.members[:, column - 1], run + 1, 1)
            self.log_orders += np.log(column + 1) - np.log(run)
        self.advantages = [self._standardised(rewards, scale, eps) for rewards in tree.rewards]

    def _standardised(self, rewards: Table, scale: bool, eps: float) -> Table:
        groups = rewards[self.members]
        deviations = groups - groups.mean(axis=1, keepdims=True)
        return np.asarray(deviations / (groups.std(axis=1, ddof=1, keepdims=True) + eps) if scale else deviations)

    def __call__(self, log_probs: Table) -> Table:
        """Returns π(y|x) E[A | y], (N, C); it sums to zero for each prompt.

        Args:
            log_probs: log π(y|x), (N, C).
        """
        count, size = self.members.shape[1], self.tree.num_completions
        weighted = []
        for own, advantages in zip(log_probs, self.advantages, strict=True):
            probabilities = np.exp(self.log_orders + own[self.members].sum(axis=1))
            terms = (probabilities[:, None] * advantages / count).ravel()
            weighted.append(np.bincount(self.members.ravel(), weights=terms, minlength=size))
        return np.stack(weighted)


def _multisets(size: int, count: int) -> IntArray:
    """All sorted tuples of `count` numbers below `size`, (M, count)."""
    total = 1
    for i in range(count):
        total = total * (size + i) // (i + 1)
    if total > MAX_GROUPS:
        raise ValueError(
            f"`num_generations` must be small enough for all groups to be written down, at most {MAX_GROUPS:,}; {count} of {size} "
            f"completions make {total:,}. Take a smaller group or tree."
        )
    rows = np.arange(size)[:, None]
    for _ in range(count - 1):
        reach = size - rows[:, -1]  # the next member is not smaller than the last
        offsets = np.arange(reach.sum()) - np.repeat(np.cumsum(reach) - reach, reach)
        repeated = np.repeat(rows, reach, axis=0)
        rows = np.concatenate([repeated, (repeated[:, -1] + offsets)[:, None]], axis=1)
    return rows.astype(np.int64)


def grpo_token_weights(
    advantages: GroupAdvantages, policy: Any, reference: Any, beta: float, *, reduction: GroupReduction = "sequence_sum"
) -> Table:
    """Returns the weight of ∇log π(y_t|s_t) in GRPO's expected first step, (N, C, H), zero behind the end of each completion.

        π(y|x) / N · w(y) · (E[A | y] − β (1 − π_ref(y_t|s_t)/π(y_t|s_t)))

    with w = 1/|y| ("sequence_mean", the loss type "grpo") or 1 ("sequence_sum": "dr_grpo" up to its constant; "bnpo" and "dapo" in
    the limit of large batches, where the tokens of a batch are a constant).

    Args:
        advantages: of the tree, its G and its scale.
        policy: π.
        reference: π_ref.
        beta: β of the k3 term in the loss.
        reduction: w.
    """
    tree = advantages.tree
    log_probs = tree.log_probs(policy)
    table, reference_table = (tree.tabular(tree.log_probs(p)) for p in (policy, reference))
    probabilities = np.exp(log_probs)
    excess = 1 - np.exp(_at_tokens(tree, reference_table) - _at_tokens(tree, table))
    weights = advantages(log_probs)[..., None] - beta * probabilities[..., None] * excess
    if reduction == "sequence_mean":
        weights = weights / tree.lengths[:, None]
    return np.asarray(np.where(tree.mask, weights, 0.0) / tree.num_prompts)


def _at_tokens(tree: TokenTree, table: Table) -> Table:
    """(N, S, V) to (N, C, H): the entry of each token of each completion, 0 behind the end."""
    picked = table[:, np.where(tree.mask, tree.state_of, 0), tree.completions]
    return np.asarray(np.where(tree.mask, picked, 0.0))


def grpo_logit_gradient(
    advantages: GroupAdvantages, policy: Any, reference: Any, beta: float, *, reduction: GroupReduction = "sequence_sum"
) -> Table:
    """Returns GRPO's expected first step in the logits of a tabular softmax policy, −E[∂L/∂logit(s,a)], (N, S, V).

    Arguments as for `grpo_token_weights`.
    """
    tree = advantages.tree
    by_action = _by_action(tree, grpo_token_weights(advantages, policy, reference, beta, reduction=reduction))
    table = tree.tabular(tree.log_probs(policy))
    return np.asarray(by_action - np.exp(table) * by_action.sum(axis=-1, keepdims=True))


def grpo_fixed_point(
    advantages: GroupAdvantages,
    reference: Any,
    beta: float,
    *,
    reduction: GroupReduction = "sequence_sum",
    tolerance: float = 1e-6,
    max_iterations: int = 10_000,
) -> Table:
    """Returns the tabular policy at which GRPO's expected step vanishes, (N, S, V), found by taking these steps.

    Each step is divided by the probability of its state and action (a natural gradient), which turns hundreds of thousands of plain
    steps into tens; what it divides by is positive, so the zeros are the same.

    Args:
        advantages: of the tree, its G and its scale.
        reference: π_ref, where the iteration starts.
        beta: β > 0 of the k3 term in the loss.
        reduction: see `grpo_token_weights`.
        tolerance: of the largest such step, in nats.
        max_iterations: steps to try.

    Raises:
        ValueError: β is not positive: without the KL term the steps do not end.
        RuntimeError: `max_iterations` were not enough.
    """
    if not beta > 0:
        raise ValueError(
            f"`beta` must be positive: without the KL term GRPO goes on until nothing is sampled but one completion, got {beta}."
        )
    tree = advantages.tree
    policy = tree.tabular(tree.log_probs(reference))
    for _ in range(max_iterations):
        gradient = grpo_logit_gradient(advantages, policy, reference, beta, reduction=reduction)
        reached = np.where(tree.mask, np.exp(tree.log_probs(policy))[..., None], 0.0)
        step = gradient * tree.num_prompts / _by_action(tree, reached)
        if np.abs(step).max() < tolerance:
            return policy
        # Half of it, at most one nat: far away the advantages change faster than the linear step knows.
        policy = policy + np.clip(0.5 * step, -1.0, 1.0)
        policy = policy - np.logaddexp.reduce(policy, axis=-1, keepdims=True)
    raise RuntimeError(f"GRPO's steps did not come to rest in {max_iterations} iterations; the last was {np.abs(step).max():.1e} nats.")


def _by_action(tree: TokenTree, weights: Table) -> Table:
    """Adds up (N, C, H) over the completions that take an action in a state: (N, S, V)."""
    summed = np.zeros((tree.num_prompts, tree.num_states, tree.vocab_size))
    states, actions = tree.state_of[tree.mask], tree.completions[tree.mask]
    for prompt in range(tree.num_prompts):
        np.add.at(summed[prompt], (states, actions), weights[prompt][tree.mask])
    return summed
