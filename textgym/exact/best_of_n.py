"""Best-of-n on a token tree: the exact distribution of the best of n samples."""

from typing import Any

import numpy as np

from textgym.exact.tree import Table, TokenTree


def best_of_n(tree: TokenTree, policy: Any, n: int) -> Table:
    """Returns log π_n(y|x), the distribution of the completion with the highest reward among n independent samples of `policy`, (N, C).

        π_n(y|x) = π(y|x) / q(v) · [F(v)^n − (F(v) − q(v))^n],      v = r(x, y)

    with q(v) the probability of reward v under π and F(v) that of a reward of at most v: the highest of n rewards is v, and which of
    the completions with that reward it is does not depend on n. So it does not matter how ties are broken, as long as the rule looks at
    the places of the samples only (`textgym.agents.BestOfN`: the first; or at random).

    Its KL to π is at most `textgym.kl.best_of_n_kl(n)` (Beirami et al. 2024, arXiv:2401.01879).

    Args:
        tree: the MDP; only the order of its rewards matters.
        policy: π, as `TokenTree` takes it.
        n: samples per prompt, at least 1.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    log_probs = tree.log_probs(policy)
    return np.stack([_of_one_prompt(*row, n) for row in zip(log_probs, tree.rewards, strict=True)])


def _of_one_prompt(log_probs: Table, rewards: Table, n: int) -> Table:
    _, level = np.unique(rewards, return_inverse=True)  # (C,) place of each reward among the different ones, lowest first
    at = np.bincount(level, weights=np.exp(log_probs))  # q(v)
    at = at / at.sum()
    up_to = np.cumsum(at).clip(max=1.0)  # F(v)
    weight, there = np.zeros(len(at)), at > 0  # a completion without probability keeps its −∞
    with np.errstate(divide="ignore"):  # of the lowest level F = q: log 0
        # F^n − (F − q)^n, in a form that keeps the digits of a small q.
        rest = np.log1p(-np.minimum(at[there] / up_to[there], 1.0))
    weight[there] = n * np.log(up_to[there]) + np.log(-np.expm1(n * rest)) - np.log(at[there])
    return np.asarray(log_probs + weight[level])
