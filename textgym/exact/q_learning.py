"""Tabular Q-learning on a token tree (Watkins & Dayan 1992), hard and soft, and a proven bound on its error.

Transitions and rewards of a tree are deterministic. What is random here: which pairs are visited (`q_learning`), and noise that is
added to every reward that is paid, r + σ ε with ε ~ N(0, 1) drawn afresh (`reward_noise` = σ), as from a judge that is unsure.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from textgym.exact.solutions import hard_solution, soft_solution, soft_value
from textgym.exact.tree import Table, TokenTree
from textgym.types import IntArray

StepSize = Callable[[IntArray], Table]
"""α(n) in (0, 1] for the n-th update of a state-action pair, n = 1, 2, ..., elementwise."""


def polynomial_step_size(omega: float) -> StepSize:
    """Returns α(n) = n^(−ω) (Even-Dar & Mansour 2003).

    Args:
        omega: ω, in (1/2, 1) against noise; with 1, the plain average, the updates needed are exponential in 1/(1 − γ); 0 is α = 1.
    """
    if not 0 <= omega <= 1:
        raise ValueError(f"`omega` must be in [0, 1], got {omega}. With ω > 1 the steps sum to a finite number and learning stops short.")
    return lambda count: np.asarray(count, dtype=np.float64) ** -omega


def rescaled_linear_step_size(gamma: float) -> StepSize:
    """Returns α(n) = 1 / (1 + (1 − γ) n), with which the error bound falls as 1/k and the noise as 1/√k (Wainwright 2019).

    Args:
        gamma: γ in [0, 1), that of the problem.
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"`gamma` must be in [0, 1), got {gamma}. With γ = 1 these steps do not fall; use `polynomial_step_size`.")
    return lambda count: np.asarray(1.0 / (1.0 + (1.0 - gamma) * np.asarray(count)))


class BellmanOperator:
    """The map T of action values whose only fixed point is Q*.

        (T Q)(s,a) = r(x,y)        where a ends the completion y
                     γ V_Q(s')     else, s' being the next state
        V_Q(s)     = max_a Q(s,a)                               hard, β = 0
                     β log Σ_a π_ref(a|s) exp(Q(s,a)/β)         soft, β > 0; the limit β → 0 is the hard one

    Both contract: ‖T Q − T Q'‖ ≤ γ ‖Q − Q'‖ in the maximum norm, since |V_Q(s) − V_Q'(s)| ≤ max_a |Q(s,a) − Q'(s,a)|. And H
    applications of T give Q* from any Q and for any γ, 1 included, H being the horizon.

    Args:
        tree: the MDP.
        gamma: γ in [0, 1], discount per token.
        reference: π_ref, tabular or with `sequence_log_probs`; given with β > 0 and only then.
        beta: β, in reward per nat.

    Attributes:
        optimum: Q*, (N, S, V), of `hard_solution` or `soft_solution`.

    Raises:
        ValueError: γ or β out of its range, or one of `reference` and `beta` without the other.
    """

    def __init__(self, tree: TokenTree, gamma: float, reference: Any = None, beta: float = 0.0) -> None:
        if not 0 <= gamma <= 1:
            raise ValueError(f"`gamma` must be in [0, 1], got {gamma}.")
        if not 0 <= beta < np.inf:
            raise ValueError(f"`beta` must be at least 0 and finite, got {beta}.")
        if (beta > 0) != (reference is not None):
            given = "none" if reference is None else "one"
            raise ValueError(f"`reference` must be given if and only if `beta` is positive, got `beta` = {beta} and {given}.")
        self.tree, self.gamma, self.beta = tree, gamma, beta
        self._reference = None if reference is None else tree.tabular(tree.log_probs(reference))
        solution = hard_solution(tree, gamma) if reference is None else soft_solution(tree, reference, beta, gamma)
        self.optimum: Table = solution.action_values

    def __call__(self, action_values: Table, rewards: Table | None = None) -> Table:
        """Returns T Q.

        Args:
            action_values: Q, (N, S, V).
            rewards: (N, C), in place of the tree's own: a noisy sample of them.
        """
        rewards = self.tree.rewards if rewards is None else rewards
        following = self.gamma * self.state_values(action_values)[:, self.tree.next_state]
        # Index -1 picks some completion or state where there is none: not used.
        return np.where(self.tree.completion_of >= 0, rewards[:, self.tree.completion_of], following)

    def state_values(self, action_values: Table, where: Any = ...) -> Table:
        """Returns V_Q of rows Q(s,·), (..., V) to (...); `where` are the (prompt, state) of the rows if they are not (N, S) of them."""
        if self._reference is None:
            return np.asarray(action_values.max(axis=-1))
        return soft_value(action_values, self._reference[where], self.beta)


class QLearningResult(NamedTuple):
    """What Q-learning ends with.

    Attributes:
        action_values: Q, (N, S, V).
        visits: n(s,a), the updates of each pair, (N, S, V) int64.
        errors: max |Q − Q*| at the start and after each update (synchronous) or episode, (updates + 1,) or (episodes + 1,).
    """

    action_values: Table
    visits: IntArray
    errors: Table


def synchronous_q_learning(
    operator: BellmanOperator,
    updates: int,
    step_size: StepSize,
    initial: npt.ArrayLike = 0.0,
    reward_noise: float = 0.0,
    seed: int = 0,
) -> QLearningResult:
    """Updates all pairs at once, each from one sample of its reward: Q_k = (1 − α_k) Q_{k−1} + α_k T_k Q_{k−1}.

    Args:
        operator: T; T_k is T with the noise of this update.
        updates: K, at least 1.
        step_size: α_k.
        initial: Q_0, a number or a table that broadcasts to (N, S, V).
        reward_noise: σ, standard deviation, in units of the reward.
        seed: of the noise.
    """
    steps = _checked_steps(step_size, updates, "updates")
    values, rng, tree = _start(operator, initial, reward_noise), np.random.default_rng(seed), operator.tree
    errors = np.empty(updates + 1)
    errors[0] = _distance(values, operator.optimum)
    for update, alpha in enumerate(steps, start=1):
        rewards = tree.rewards + reward_noise * rng.standard_normal(tree.rewards.shape) if reward_noise else None
        values = (1.0 - alpha) * values + alpha * operator(values, rewards)
        errors[update] = _distance(values, operator.optimum)
    return QLearningResult(values, np.full(values.shape, updates, dtype=np.int64), errors)


def q_learning(
    operator: BellmanOperator,
    episodes: int,
    step_size: StepSize,
    behaviour: float | Table,
    initial: npt.ArrayLike = 0.0,
    reward_noise: float = 0.0,
    seed: int = 0,
) -> QLearningResult:
    """Updates each pair (s, a) as it is visited, one token after the other: Q(s,a) ← (1 − α) Q(s,a) + α (r if y ends here else γ V_Q(s')).

    It converges to Q*, whatever the behaviour, as long as every pair is visited again and again (for σ > 0 with ω > 1/2 or rescaled linear
    steps). With α = 1 and σ = 0 a pair is exact from its first visit on that comes after those that make its next state exact.

    Args:
        operator: T.
        episodes: completions to generate, at least 1, each for a prompt drawn uniformly.
        step_size: α(n), n being the visits of the pair so far, this one included.
        behaviour: what chooses the tokens: log π(a|s) of a fixed policy, (N, S, V), or the ε in (0, 1] of ε-greedy in Q.
        initial: Q_0, a number or a table that broadcasts to (N, S, V).
        reward_noise: σ, standard deviation, in units of the reward.
        seed: of prompts, tokens and noise.
    """
    steps = _checked_steps(step_size, episodes, "episodes")  # a tree's path meets a pair at most once
    values, rng, tree = _start(operator, initial, reward_noise), np.random.default_rng(seed), operator.tree
    choose = _behaviour(behaviour, values, rng)
    visits = np.zeros(values.shape, dtype=np.int64)
    errors = np.empty(episodes + 1)
    errors[0] = _distance(values, operator.optimum)
    for episode in range(1, episodes + 1):
        prompt, state = int(rng.integers(tree.num_prompts)), 0
        while state >= 0:
            action = choose(prompt, state)
            completion, following = tree.completion_of[state, action], tree.next_state[state, action]
            if completion >= 0:
                target = tree.rewards[prompt, completion] + reward_noise * rng.standard_normal()
            else:
                target = operator.gamma * operator.state_values(values[prompt, following], (prompt, following))
            alpha = steps[visits[prompt, state, action]]
            visits[prompt, state, action] += 1
            values[prompt, state, action] = (1.0 - alpha) * values[prompt, state, action] + alpha * target
            state = following
        errors[episode] = _distance(values, operator.optimum)
    return QLearningResult(values, visits, errors)


def error_bound(operator: BellmanOperator, step_size: StepSize, updates: int, initial_error: float, reward_noise: float = 0.0) -> Table:
    """Bounds E max |Q_k − Q*| of `synchronous_q_learning` for k = 0 ... K; without noise it bounds the error itself.

    With P_k = (1 − α_k) P_{k−1} + α_k (noise), P_0 = 0, the averaged noise, the rest D_k = Q_k − Q* − P_k obeys
    D_k = (1 − α_k) D_{k−1} + α_k (T Q_{k−1} − T Q*), and T contracts, hence

        ‖Q_k − Q*‖ ≤ d_k + ‖P_k‖,    d_k = (1 − (1 − γ) α_k) d_{k−1} + γ α_k ‖P_{k−1}‖,    d_0 = ‖Q_0 − Q*‖

    for every course of the noise (Wainwright 2019, arXiv:1905.06265, in its simplest case). P_k is normal with variance σ² v_k,
    v_k = (1 − α_k)² v_{k−1} + α_k², in the M = N · C pairs that are paid a reward and 0 elsewhere, so that E ‖P_k‖ ≤ σ √(2 v_k log 2M),
    and d_k is linear in the norms. For rescaled linear steps this is at most

        ‖Q_0 − Q*‖ / (1 + (1 − γ) k)  +  (1 + γ)/(1 − γ) · σ √(2 log 2M) / √(1 + (1 − γ) k).

    Args:
        operator: T, with γ < 1.
        step_size: α_k.
        updates: K, at least 1.
        initial_error: ‖Q_0 − Q*‖, the first of `QLearningResult.errors`.
        reward_noise: σ.

    Returns:
        (K + 1,).
    """
    gamma = operator.gamma
    if not gamma < 1:
        raise ValueError(
            f"`operator` must have γ < 1, got {gamma}: with γ = 1 it is no contraction. Q* is exact after H updates with α = 1."
        )
    if not 0 <= initial_error < np.inf:
        raise ValueError(f"`initial_error` must be at least 0 and finite, got {initial_error}.")
    scale = _checked_noise(reward_noise) * np.sqrt(2.0 * np.log(2.0 * operator.tree.rewards.size))
    rest, variance, bound = initial_error, 0.0, [initial_error]
    for alpha in _checked_steps(step_size, updates, "updates"):
        rest = (1.0 - (1.0 - gamma) * alpha) * rest + gamma * alpha * scale * np.sqrt(variance)
        variance = (1.0 - alpha) ** 2 * variance + alpha**2
        bound.append(rest + scale * np.sqrt(variance))
    return np.array(bound)


def _behaviour(behaviour: float | Table, values: Table, rng: np.random.Generator) -> Callable[[int, int], int]:
    """Returns the choice of a token at (prompt, state); ε-greedy looks at `values` as they are at the time of the choice."""
    if isinstance(behaviour, np.ndarray):
        if behaviour.shape != values.shape:
            raise ValueError(f"`behaviour` must be a tabular policy of shape (N, S, V) = {values.shape}, got {behaviour.shape}.")
        cumulative = np.exp(behaviour).cumsum(axis=-1)
        if not np.allclose(cumulative[..., -1], 1.0):
            raise ValueError("`behaviour` must be log-probabilities that sum to 1 over the tokens, got a table that does not.")
        cumulative /= cumulative[..., -1:]
        return lambda prompt, state: int(np.searchsorted(cumulative[prompt, state], rng.random(), side="right"))
    if not 0 < behaviour <= 1:
        raise ValueError(
            f"`behaviour` must be a tabular policy or an ε in (0, 1], got {behaviour}. With ε = 0 some pairs are never visited."
        )
    num_tokens = values.shape[-1]
    return lambda prompt, state: int(rng.integers(num_tokens) if rng.random() < behaviour else values[prompt, state].argmax())


def _start(operator: BellmanOperator, initial: npt.ArrayLike, reward_noise: float) -> Table:
    _checked_noise(reward_noise)
    shape, table = operator.optimum.shape, np.asarray(initial, dtype=np.float64)
    try:
        values = np.broadcast_to(table, shape).copy()
    except ValueError:
        raise ValueError(
            f"`initial` must be a number or a table that broadcasts to (N, S, V) = {shape}, got shape {table.shape}."
        ) from None
    if not np.isfinite(values).all():
        raise ValueError(f"`initial` must be finite, got {table[~np.isfinite(table)][0]}.")
    return values


def _checked_noise(reward_noise: float) -> float:
    if not 0 <= reward_noise < np.inf:
        raise ValueError(f"`reward_noise` must be at least 0 and finite, got {reward_noise}.")
    return reward_noise


def _checked_steps(step_size: StepSize, count: int, name: str) -> Table:
    """Returns α(1) ... α(count)."""
    if count < 1:
        raise ValueError(f"`{name}` must be at least 1, got {count}.")
    steps = np.asarray(step_size(np.arange(1, count + 1)), dtype=np.float64)
    if steps.shape != (count,):
        raise ValueError(f"`step_size` must return one number for each count, here {count}, got shape {steps.shape}.")
    if not ((steps > 0) & (steps <= 1)).all():
        bad = int(np.argmin((steps > 0) & (steps <= 1)))
        raise ValueError(f"`step_size` must be in (0, 1], got {steps[bad]} for update {bad + 1}.")
    return steps


def _distance(values: Table, optimum: Table) -> float:
    return float(np.abs(values - optimum).max())
