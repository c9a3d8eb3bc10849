"""The tree that every agent is certified on."""

import numpy as np

from textgym.exact.tree import TokenTree

HARD_TREE_BETA = 0.5


def hard_tree(seed: int = 0, vocab_size: int = 5, horizon: int = 3) -> TokenTree:
    """Returns the hard tree: three prompts of different lengths whose rewards N(0, 1) are shifted by 0, +3 and −3.

    The shifts change no optimum and punish every algorithm that compares the completions of different prompts; the lengths 1, 2, 3
    of the prompts make left padding matter. Solve it with β = `HARD_TREE_BETA` and a reference far from uniform (`models.tiny_lm`, or
    `tree.random_policy`).

    Args:
        seed: of the rewards.
        vocab_size: V, at least 3; EOS is the last token.
        horizon: H, the most tokens of a completion.
    """
    if vocab_size < 3:
        raise ValueError(f"`vocab_size` must be at least 3 (EOS and two words for the prompts), got {vocab_size}.")
    words = vocab_size - 1
    # No prompt begins another: with [1, 0] and [1, 0, 0] the state after token 0 of the one would be the start of the other, and a
    # language model, which sees tokens only, could not be right at both.
    prompts = [[0], [1, 0], [1, min(2, words - 1), 0]]
    shape = TokenTree(vocab_size, horizon, words, prompts, lambda i, y: 0.0)
    rewards = np.random.default_rng(seed).standard_normal(shape.rewards.shape) + np.array([[0.0], [3.0], [-3.0]])
    return TokenTree(vocab_size, horizon, words, prompts, rewards)
