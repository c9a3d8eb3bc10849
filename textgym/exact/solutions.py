"""What can be computed exactly on a token tree: optima, values, objective, divergences, the policy gradient.

Policies are given as `TokenTree` takes them (tabular or with `sequence_log_probs`), numbers come back one per prompt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from textgym.exact.tree import Table, TokenTree
from textgym.types import BoolArray


class SoftSolution(NamedTuple):
    """The maximiser of J(π) = E[r] − β KL(π ‖ π_ref) and its soft values; with γ < 1, of E[Σ_t γ^t (r_t − β log(π/π_ref)(a_t|s_t))].

    Attributes:
        log_probs: log π*(y|x), (N, C).
        policy: log π*(a|s), tabular, (N, S, V).
        log_z: log Z(x), (N,); with γ < 1, V*(s_0)/β.
        state_values: V*(s) = β log Σ_a π_ref(a|s) exp(Q*(s,a)/β), (N, S); V*(s_0) = β log Z(x).
        action_values: Q*(s,a), (N, S, V): the reward where a ends the completion, else γ V* of the next state.
        objective: J(π*) = β log Z(x), (N,).
    """

    log_probs: Table
    policy: Table
    log_z: Table
    state_values: Table
    action_values: Table
    objective: Table


class HardSolution(NamedTuple):
    """The maximiser of the reward alone.

    Attributes:
        completions: index of the best completion of each prompt, the first of several, (N,) int64.
        state_values: V*(s) = max_a Q*(s,a), (N, S).
        action_values: Q*(s,a), (N, S, V): the reward where a ends the completion, else γ V* of the next state.
        greedy: (N, S, V) bool, True at the actions that attain the maximum.
    """

    completions: Table
    state_values: Table
    action_values: Table
    greedy: Table


def soft_solution(tree: TokenTree, reference: Any, beta: float, gamma: float = 1.0) -> SoftSolution:
    """Solves the KL-regularised problem: in closed form, π*(y|x) = π_ref(y|x) exp(r(x,y)/β) / Z(x), for γ = 1, else by backward induction.

    Args:
        tree: the MDP.
        reference: π_ref.
        beta: β > 0, in reward per nat.
        gamma: γ, discount per token, of the reward and of the KL terms.
    """
    if not beta > 0:
        raise ValueError(f"`beta` must be positive (`hard_solution` is the limit β = 0), got {beta}.")
    reference_log_probs = tree.log_probs(reference)
    reference_table = tree.tabular(reference_log_probs)
    state_values, action_values = _backward(tree, lambda state, q: soft_value(q, reference_table[:, state], beta), gamma)
    policy = reference_table + (action_values - state_values[..., None]) / beta
    if gamma == 1:
        unnormalised = reference_log_probs + tree.rewards / beta
        log_z = np.logaddexp.reduce(unnormalised, axis=-1)
        log_probs = unnormalised - log_z[:, None]
    else:
        log_z, log_probs = state_values[:, 0] / beta, tree.log_probs(policy)
    return SoftSolution(log_probs, policy, log_z, state_values, action_values, beta * log_z)


def soft_value(action_values: Table, reference: Table, beta: float) -> Table:
    """Returns V(s) = β log Σ_a π_ref(a|s) exp(Q(s,a)/β) of rows Q(s,·) and log π_ref(·|s), (..., V) twice to (...)."""
    return np.asarray(beta * np.logaddexp.reduce(reference + action_values / beta, axis=-1))


def hard_solution(tree: TokenTree, gamma: float = 1.0) -> HardSolution:
    """Maximises the (discounted) reward by backward induction.

    Args:
        tree: the MDP.
        gamma: γ, discount per token; the reward is paid at the last one.
    """
    state_values, action_values = _backward(tree, lambda _, q: q.max(axis=-1), gamma)
    discounted = tree.rewards * gamma ** (tree.lengths - 1)
    return HardSolution(discounted.argmax(axis=-1), state_values, action_values, action_values == state_values[..., None])


def _backward(tree: TokenTree, state_value: Any, gamma: float = 1.0, action_reward: Table | None = None) -> tuple[Table, Table]:
    """Backward induction: Q(s,a) = r(s,a) + γ V(s'), V(s) = state_value(s, Q(s,·))."""
    state_values = np.zeros((tree.num_prompts, tree.num_states))
    action_values = np.zeros((tree.num_prompts, tree.num_states, tree.vocab_size))
    for state in reversed(range(tree.num_states)):  # children have larger indices than their parents
        ends = tree.completion_of[state]
        values = np.where(ends >= 0, tree.rewards[:, ends], gamma * state_values[:, tree.next_state[state]])
        action_values[:, state] = values if action_reward is None else values + action_reward[:, state]
        state_values[:, state] = state_value(state, action_values[:, state])
    return state_values, action_values


def policy_values(tree: TokenTree, policy: Any, reference: Any = None, beta: float = 0.0) -> tuple[Table, Table]:
    """Returns V^π (N, S) and Q^π (N, S, V) of the shaped reward r' = r − β (log π − log π_ref), held fixed.

    Q contains the penalty of its own action, so that V(s) = Σ_a π(a|s) Q(s,a) and V(s_0) = J(π).

    Args:
        tree: the MDP.
        policy: π.
        reference: π_ref; needed if `beta` is not 0.
        beta: β, in reward per nat.
    """
    table = tree.tabular(tree.log_probs(policy))
    penalty = None
    if beta:
        penalty = -beta * (table - tree.tabular(tree.log_probs(reference)))
    return _backward(tree, lambda state, q: (np.exp(table[:, state]) * q).sum(axis=-1), action_reward=penalty)


def expected_reward(tree: TokenTree, policy: Any) -> Table:
    """Returns E_{y~π} r(x,y) of each prompt, (N,)."""
    return np.asarray((np.exp(tree.log_probs(policy)) * tree.rewards).sum(axis=-1))


def kl_divergence(tree: TokenTree, policy: Any, reference: Any) -> Table:
    """Returns KL(π ‖ π_ref) over whole completions in nats, (N,)."""
    return completion_kl(tree.log_probs(policy), tree.log_probs(reference))


def completion_kl(log_probs: Table, other_log_probs: Table) -> Table:
    """Returns Σ_y p(y) (log p(y) − log q(y)) of distributions over completions, (N, C) twice to (N,), in nats."""
    probs = np.exp(log_probs)
    with np.errstate(invalid="ignore"):  # −inf − (−inf) where p is zero: replaced
        terms = np.where(probs > 0, probs * (log_probs - other_log_probs), 0.0)
    return np.asarray(terms.sum(axis=-1))


def objective(tree: TokenTree, policy: Any, reference: Any, beta: float) -> Table:
    """Returns J(π) = E_{y~π} [r(x,y) − β log(π(y|x)/π_ref(y|x))] of each prompt, (N,)."""
    return expected_reward(tree, policy) - beta * kl_divergence(tree, policy, reference)


def total_variation(tree: TokenTree, policy: Any, other: Any) -> Table:
    """Returns ½ Σ_y |π(y|x) − π'(y|x)| of each prompt, (N,), in [0, 1]."""
    return completion_distance(tree.log_probs(policy), tree.log_probs(other))


def completion_distance(log_probs: Table, other_log_probs: Table) -> Table:
    """Returns the total variation of distributions over completions, (N, C) twice to (N,)."""
    return np.asarray(0.5 * np.abs(np.exp(log_probs) - np.exp(other_log_probs)).sum(axis=-1))


def restrict(policy: Table, kept: BoolArray) -> Table:
    """Renormalises a tabular policy over a part of the actions of each state: what a mask or truncated sampling makes of it.

    π_K(a|s) = π(a|s) / Σ_{b ∈ K(s)} π(b|s) for a in K(s), else 0. With the reference restricted alike, `soft_solution` gives the best
    of all policies that stay inside: J_K(π) = E_π [r − β Σ_t log π(y_t|s_t)/π_ref,K(y_t|s_t)] is J of another reference.

    Args:
        policy: tabular, log π(a|s), (N, S, V).
        kept: K, True = the action stays, (N, S, V) or (S, V); at least one in each state.

    Returns:
        Tabular policy, −∞ outside K, (N, S, V).
    """
    kept = np.broadcast_to(kept, policy.shape)
    if not kept.any(axis=-1).all():
        raise ValueError(f"`kept` must keep at least one action in each state, got none at {np.argwhere(~kept.any(axis=-1))[0].tolist()}.")
    inside = np.where(kept, policy, -np.inf)
    return np.asarray(inside - np.logaddexp.reduce(inside, axis=-1, keepdims=True))


class FrontierPoint(NamedTuple):
    """One point of the best reward that can be had at a KL; means over the prompts.

    Attributes:
        beta: the β whose optimum it is.
        kl: KL(π* ‖ π_ref) in nats per sequence.
        reward: E_{π*} r.
    """

    beta: float
    kl: float
    reward: float


def frontier(tree: TokenTree, reference: Any, betas: Sequence[float]) -> list[FrontierPoint]:
    """Returns the reward-KL frontier: no policy has more reward at the KL of one of these points.

    Args:
        tree: the MDP.
        reference: π_ref.
        betas: the values of β, each positive.
    """
    reference_log_probs = tree.log_probs(reference)
    points = []
    for beta in betas:
        log_probs = soft_solution(tree, reference, beta).log_probs
        reward = (np.exp(log_probs) * tree.rewards).sum(axis=-1)
        points.append(FrontierPoint(beta, float(completion_kl(log_probs, reference_log_probs).mean()), float(reward.mean())))
    return points


def frontier_reward(tree: TokenTree, reference: Any, kl: float) -> float:
    """Returns the most mean reward that a policy can have whose mean KL to the reference is at most `kl`.

    It is that of π_ref exp(r/β)/Z with the β at which its KL is `kl`, found by bisection.

    Args:
        tree: the MDP.
        reference: π_ref.
        kl: mean over the prompts of KL(π ‖ π_ref), in nats per sequence, at least 0.
    """
    if not kl >= 0:
        raise ValueError(f"`kl` must be a number of at least 0, got {kl}.")
    low, high = 1e-3 * float(np.ptp(tree.rewards, axis=1).max()), 1e6  # β: the KL falls with it
    for _ in range(100):
        middle = float(np.sqrt(low * high))
        (point,) = frontier(tree, reference, [middle])
        low, high = (middle, high) if point.kl > kl else (low, middle)
    return point.reward


def logit_gradient(tree: TokenTree, policy: Table, reference: Any, beta: float) -> Table:
    """Returns ∂J/∂logit(s,a) of a tabular softmax policy for the mean of J over the prompts, (N, S, V).

    The policy gradient theorem with nothing sampled: d^π(s) π(a|s) (Q^π(s,a) − V^π(s)) / N, where d^π(s) is the probability of
    visiting s.

    Args:
        tree: the MDP.
        policy: a tabular policy.
        reference: π_ref.
        beta: β, in reward per nat.
    """
    state_values, action_values = policy_values(tree, policy, reference, beta)
    visits = np.zeros((tree.num_prompts, tree.num_states))
    visits[:, 0] = 1.0
    for state in range(tree.num_states):
        for action in range(tree.vocab_size):
            child = tree.next_state[state, action]
            if child >= 0:
                visits[:, child] = visits[:, state] * np.exp(policy[:, state, action])
    advantages = action_values - state_values[..., None]
    return np.asarray(visits[..., None] * np.exp(policy) * advantages / tree.num_prompts)
