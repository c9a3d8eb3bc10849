import doctest
import itertools
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

import textgym.exact.tree
from textgym.exact import TokenTree, TreeReward, hard_tree


def small_tree(reward=lambda i, y: float(len(y) + i)):
    return TokenTree(vocab_size=3, horizon=2, eos_token_id=2, prompts=[[0], [0, 1]], reward=reward)


def brute_force_completions(vocab_size, horizon, eos):
    """Every string over the vocabulary, cut behind its first EOS, or of full length: an independent enumeration."""
    cut = set()
    for ids in itertools.product(range(vocab_size), repeat=horizon):
        cut.add(ids[: ids.index(eos) + 1] if eos in ids else ids)
    return sorted(cut)


@pytest.mark.parametrize(("vocab_size", "horizon", "eos"), [(2, 1, 0), (3, 2, 2), (3, 4, 1), (5, 3, 4), (4, 3, 0)])
def test_every_completion_is_there_once(vocab_size, horizon, eos):
    prompt = [(eos + 1) % vocab_size]
    tree = TokenTree(vocab_size, horizon, eos, [prompt], lambda i, y: 0.0)
    assert [tree.ids(j) for j in range(tree.num_completions)] == brute_force_completions(vocab_size, horizon, eos)
    assert tree.num_states == sum((vocab_size - 1) ** t for t in range(horizon))


def test_hard_tree_has_85_completions_and_21_states():
    tree = hard_tree(0)
    assert (tree.num_prompts, tree.num_completions, tree.num_states) == (3, 85, 21)
    assert sorted(len(ids) for ids in tree.prompts) == [1, 2, 3]
    assert np.bincount(tree.lengths).tolist() == [0, 1, 4, 80]


def test_paths_lead_through_the_states():
    tree = hard_tree(1)
    for j in range(tree.num_completions):
        ids = tree.ids(j)
        assert [tree.states[s] for s in tree.state_of[j, : len(ids)]] == [ids[:t] for t in range(len(ids))]
        assert (tree.state_of[j, len(ids) :] == -1).all()
        state = 0
        for token in ids[:-1]:
            assert tree.completion_of[state, token] == -1
            state = tree.next_state[state, token]
        assert tree.completion_of[state, ids[-1]] == j
        assert tree.next_state[state, ids[-1]] == -1


def test_log_probs_multiply_along_the_path():
    tree = small_tree()
    policy = tree.random_policy(0, scale=2.0)
    start, after_one = tree.states.index(()), tree.states.index((1,))
    expected = policy[1, start, 1] + policy[1, after_one, 0]
    assert tree.log_probs(policy)[1, 3] == pytest.approx(expected)  # completion (1, 0)
    assert tree.log_probs(policy)[1, 6] == pytest.approx(policy[1, start, 2])  # EOS at once
    np.testing.assert_allclose(np.exp(tree.log_probs(policy)).sum(axis=1), 1.0)


def test_tabular_inverts_log_probs():
    tree = hard_tree(2)
    policy = tree.random_policy(3, scale=2.0)
    np.testing.assert_allclose(tree.tabular(tree.log_probs(policy)), policy, atol=1e-12)


def test_tabular_is_uniform_where_nothing_arrives():
    tree = small_tree()
    only_eos = np.full((2, 7), -np.inf)
    only_eos[:, 6] = 0.0
    table = tree.tabular(only_eos)
    np.testing.assert_allclose(np.exp(table[:, 0]), [[0, 0, 1], [0, 0, 1]])
    np.testing.assert_allclose(np.exp(table[:, 1:]), 1 / 3)


class TablePolicy:
    """A policy by protocol, which also checks what it is given."""

    def __init__(self, tree, table):
        self.tree, self.table = tree, table

    def sequence_log_probs(self, prompt_ids, prompt_lengths, actions, lengths):
        result = np.full(actions.shape, 123.0)  # behind the end anything may stand
        for row in range(len(actions)):
            prompt = tuple(prompt_ids[row, prompt_ids.shape[1] - prompt_lengths[row] :].tolist())
            for t in range(lengths[row]):
                state = self.tree.states.index(tuple(actions[row, :t].tolist()))
                result[row, t] = self.table[self.tree.prompts.index(prompt), state, actions[row, t]]
        return result


def test_a_policy_enters_by_protocol():
    tree = hard_tree(0)
    table = tree.random_policy(5)
    np.testing.assert_allclose(tree.token_log_probs(TablePolicy(tree, table)), tree.token_log_probs(table))


def test_reward_function_in_trl_form():
    tree = hard_tree(0)
    reward = tree.reward_function()
    texts = tree.prompt_texts
    assert reward(prompts=[texts[2], texts[0]], completions=["", ""], completion_ids=[[4], [3, 3, 3]]) == [
        tree.rewards[2, tree.completion_of[0, 4]],
        tree.rewards[0, [tree.ids(j) for j in range(85)].index((3, 3, 3))],
    ]
    assert reward.num_queries == 2
    assert isinstance(pickle.loads(pickle.dumps(reward)), TreeReward)
    with pytest.raises(ValueError, match=r"`completion_ids` must be completions of the tree .* got \(1, 2\)"):
        reward(prompts=texts[:1], completion_ids=[[1, 2]])


def test_tokenizer_has_the_ids_of_the_tree():
    tree = TokenTree(4, 2, 1, [[0, 2, 3], [3]], lambda i, y: 0.0)
    tokenizer = tree.tokenizer()
    assert len(tokenizer) == 4
    assert tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id is None
    assert [tuple(tokenizer(text)["input_ids"]) for text in tree.prompt_texts] == list(tree.prompts)
    assert tokenizer.decode([3, 0, 1], skip_special_tokens=True) == "w3 w0"


def test_neither_the_tree_nor_its_tokenizer_loads_torch():
    code = "import sys, textgym.exact as e; t = e.hard_tree(0); t.tokenizer(); t.reward_function(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_hard_tree_is_seeded_and_shifted():
    rewards = hard_tree(4).rewards
    assert np.array_equal(rewards, hard_tree(4).rewards)
    assert not np.array_equal(rewards, hard_tree(5).rewards)
    assert rewards.mean(axis=1) == pytest.approx([0, 3, -3], abs=0.4)


def test_docstring_example():
    results = doctest.testmod(textgym.exact.tree)
    assert results.attempted >= 4
    assert results.failed == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 1}, "`vocab_size` must be at least 2"),
        ({"horizon": 0}, "`horizon` must be at least 1, got 0"),
        ({"eos_token_id": 3}, r"`eos_token_id` must be in \[0, 3\), got 3"),
        ({"horizon": 40}, "`vocab_size` and `horizon` must be small: 3 and 40"),
        ({"prompts": []}, "`prompts` must not be empty"),
        ({"prompts": [[0], []]}, "`prompts` must be non-empty .* 1 is"),
        ({"prompts": [[0, 2]]}, "without EOS 2; 0 is"),
        ({"prompts": [[1], [0], [1]]}, r"`prompts` must all be different, got \(1,\) twice"),
        ({"reward": [[1.0, 2.0]]}, r"`reward` must be a function or a table of \(prompts, completions\) = \(2, 7\), got shape \(1, 2\)"),
        (
            {"reward": lambda i, y: math.nan if y == (1, 2) else 0.0},
            r"`reward` must be finite, got nan for prompt 0 and completion \(1, 2\)",
        ),
    ],
)
def test_errors_name_the_argument(arguments, message):
    right = {"vocab_size": 3, "horizon": 2, "eos_token_id": 2, "prompts": [[0], [0, 1]], "reward": lambda i, y: 0.0}
    with pytest.raises(ValueError, match=message):
        TokenTree(**(right | arguments))


def test_wrong_policies_are_named():
    tree = small_tree()
    with pytest.raises(ValueError, match=r"shape \(N, S, V\) = \(2, 3, 3\), got \(2, 7\)"):
        tree.log_probs(np.zeros((2, 7)))
    with pytest.raises(ValueError, match=r"must be a tabular policy or have `sequence_log_probs.*got str"):
        tree.log_probs("policy")
    with pytest.raises(ValueError, match="`vocab_size` must be at least 3"):
        hard_tree(0, vocab_size=2)
