from itertools import product

import numpy as np
import pytest

from textgym.exact import TokenTree, best_of_n, completion_distance, completion_kl, hard_solution, hard_tree
from textgym.kl import best_of_n_kl


@pytest.fixture
def tree():
    return hard_tree(0, vocab_size=3, horizon=2)


def with_ties(tree):
    """The same tree with rewards of three levels."""
    return TokenTree(
        tree.vocab_size,
        tree.horizon,
        tree.eos_token_id,
        tree.prompts,
        np.sign(np.round(tree.rewards - tree.rewards.mean(axis=1, keepdims=True))),
    )


def by_enumeration(tree, policy, n, choose):
    """Adds up the probabilities of all n-tuples of completions; `choose` says who is kept of those with the highest reward."""
    found = np.zeros(tree.rewards.shape)
    for prompt, log_probs in enumerate(tree.log_probs(policy)):
        for sample in product(range(tree.num_completions), repeat=n):
            rewards = tree.rewards[prompt, list(sample)]
            best = [place for place in range(n) if rewards[place] == rewards.max()]
            for place, share in choose(best):
                found[prompt, sample[place]] += share * np.exp(log_probs[list(sample)].sum())
    return np.log(found)


def first(best):
    return [(best[0], 1.0)]


def at_random(best):
    return [(place, 1 / len(best)) for place in best]


@pytest.mark.parametrize("choose", [first, at_random])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_it_is_the_sum_over_all_samples(tree, n, ties, choose):
    tree = with_ties(tree) if ties else tree
    assert len(np.unique(tree.rewards[0])) == (3 if ties else tree.num_completions)
    policy = tree.random_policy(0)
    np.testing.assert_allclose(best_of_n(tree, policy, n), by_enumeration(tree, policy, n, choose), atol=1e-10)


def test_one_sample_is_the_policy_and_many_are_the_best_completion(tree):
    policy = tree.random_policy(1)
    np.testing.assert_allclose(best_of_n(tree, policy, 1), tree.log_probs(policy), atol=1e-12)
    many = best_of_n(tree, policy, 10_000)
    assert (many.argmax(axis=1) == hard_solution(tree).completions).all()
    assert np.exp(many.max(axis=1)).min() > 0.999


@pytest.mark.parametrize("n", [1, 2, 3, 8, 100])
def test_the_kl_is_within_its_bound(n):
    for seed in range(5):
        tree = hard_tree(seed)
        policy = tree.random_policy(seed)
        for one in (tree, with_ties(tree)):
            log_probs = best_of_n(one, policy, n)
            np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1.0, atol=1e-9)
            kl = completion_kl(log_probs, one.log_probs(policy))
            assert (kl <= best_of_n_kl(n) + 1e-12).all()
            assert n == 1 or (kl > 0).all()


def test_the_bound_is_reached_where_no_samples_tie():
    """1,365 completions of distinct rewards and about equal probability: two samples hardly ever tie."""
    shape = TokenTree(5, 5, 4, [[0]], lambda i, y: 0.0)
    tree = TokenTree(5, 5, 4, [[0]], np.random.default_rng(0).standard_normal(shape.rewards.shape))
    flat = np.full(tree.rewards.shape, -np.log(tree.num_completions))
    for n in (2, 4, 8):
        kl = completion_kl(best_of_n(tree, tree.tabular(flat), n), flat)[0]
        assert kl == pytest.approx(best_of_n_kl(n), rel=2e-3)
    # With two levels of reward most samples tie, and the KL is far below.
    coarse = TokenTree(5, 5, 4, [[0]], np.sign(tree.rewards))
    assert completion_kl(best_of_n(coarse, coarse.tabular(flat), 8), flat)[0] < 0.6 * best_of_n_kl(8)


def test_completions_without_probability_stay_so(tree):
    policy = tree.log_probs(tree.random_policy(2)).copy()
    best = tree.rewards.argmax(axis=1)
    policy[np.arange(len(best)), best] = -np.inf
    policy -= np.logaddexp.reduce(policy, axis=1, keepdims=True)
    log_probs = best_of_n(tree, tree.tabular(policy), 4)
    assert (log_probs[np.arange(len(best)), best] == -np.inf).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1.0)
    assert completion_distance(log_probs, policy).min() > 0.1


def test_the_bound_by_hand():
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == pytest.approx(np.log(4) - 0.75)
    with pytest.raises(ValueError, match="`n`"):
        best_of_n_kl(0)
    with pytest.raises(ValueError, match="`n`"):
        best_of_n(hard_tree(0), hard_tree(0).uniform_policy(), 0)
