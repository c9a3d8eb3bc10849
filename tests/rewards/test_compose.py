"""Reward sets: what functions are given, how their results are checked and added up."""

import math

import numpy as np
import pytest

from textgym.errors import RewardError
from textgym.rewards import RewardSet


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def test_weighted_sum_and_raw_parts(make_batch):
    def answer_length(completions, answer):
        return [len(a) for a in answer]

    rewards = RewardSet.build([length, answer_length], [2.0, -0.5])
    totals, raw = rewards.terminal(make_batch("four", "seventy", answer=["a", "bbb"]))
    np.testing.assert_array_equal(totals, [2 * 4 - 0.5, 2 * 7 - 1.5])
    np.testing.assert_array_equal(raw["length"], [4, 7])
    np.testing.assert_array_equal(raw["answer_length"], [1, 3])
    assert totals.dtype == np.float64
    assert (rewards.calls, rewards.rows) == (2, 4)
    assert rewards.counts == {"length": (1, 2), "answer_length": (1, 2)}


def test_none_drops_the_part_for_that_row(make_batch):
    def sometimes(completions):
        return [None, 3.0]

    totals, raw = RewardSet.build([length, sometimes], [1.0, 10.0]).terminal(make_batch("ab", "abc"))
    np.testing.assert_array_equal(totals, [2.0, 33.0])
    assert math.isnan(raw["sometimes"][0])
    assert raw["sometimes"][1] == 3.0


def test_all_parts_none_names_the_row_and_its_text(make_batch):
    def never(completions):
        return [1.0, None]

    with pytest.raises(RewardError, match=r"every reward \(never\) returned None for row 1 \(prompt 'a prompt', completion 'second'\)"):
        RewardSet.build(never).terminal(make_batch("first", "second"))
