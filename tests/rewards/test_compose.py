"""Reward sets: weights, None, names, logs, counts, copies."""

import copy
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from textgym.errors import RewardError
from textgym.rewards import EpisodeBatch, LengthReward, RewardSet, segment_level, token_level


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def sometimes(completions):
    return [None if len(text) < 3 else 3.0 for text in completions]


@token_level
def ones(completion_ids):
    return [[1.0] * len(ids) for ids in completion_ids]


@segment_level("whole")
def once(segments):
    return [10.0] * len(segments)


def test_weighted_sum_and_raw_parts(make_batch):
    def answer_length(completions, answer):
        return [len(a) for a in answer]

    rewards = RewardSet.build([length, answer_length], [2.0, -0.5])
    totals, raw = rewards.terminal(make_batch("four", "seventy", answer=["a", "bbb"]))
    np.testing.assert_array_equal(totals, [2 * 4 - 0.5, 2 * 7 - 1.5])
    np.testing.assert_array_equal(raw["length"], [4, 7])
    np.testing.assert_array_equal(raw["answer_length"], [1, 3])
    assert totals.dtype == np.float64


def test_calls_and_rows_are_counted(make_batch):
    rewards = RewardSet.build([length, sometimes, once])
    assert (rewards.calls, rewards.rows) == (0, 0)
    rewards.terminal(make_batch("four", "seventy"))
    assert rewards.counts == {"length": (1, 2), "sometimes": (1, 2), "once": (0, 0)}
    rewards.dense_step(make_batch("no end", eos=False), np.array([False]))
    assert rewards.counts["once"] == (0, 0)  # no segment closed, so nothing was asked
    rewards.dense_step(make_batch("end", "no end"), np.array([True, False]))
    assert rewards.counts["once"] == (1, 1)
    assert (rewards.calls, rewards.rows) == (3, 5)


def test_none_drops_the_part_for_that_row(make_batch):
    totals, raw = RewardSet.build([length, sometimes], [1.0, 10.0]).terminal(make_batch("ab", "abc"))
    np.testing.assert_array_equal(totals, [2.0, 33.0])
    assert math.isnan(raw["sometimes"][0])
    assert raw["sometimes"][1] == 3.0


def test_all_parts_none_names_the_row_and_its_text(make_batch):
    with pytest.raises(RewardError, match=r"every reward \(sometimes\) returned None for row 1 \(prompt 'a prompt', completion 'ab'\)"):
        RewardSet.build(sometimes).terminal(make_batch("first", "ab"))


def test_all_parts_none_is_allowed_beside_a_dense_part(make_batch):
    totals, raw = RewardSet.build([sometimes, ones]).terminal(make_batch("ab"))
    assert totals[0] == 0.0
    assert math.isnan(raw["sometimes"][0])
    assert set(raw) == {"sometimes"}


def test_kinds_of_parts():
    rewards = RewardSet.build([length, ones, once])
    assert (rewards.has_terminal, rewards.has_dense) == (True, True)
    assert (RewardSet.build(ones).has_terminal, RewardSet.build(length).has_dense) == (False, False)


def test_a_set_without_parts_of_a_kind_pays_zero(make_batch):
    totals, raw = RewardSet.build(ones).terminal(make_batch("ab", "c"))
    assert (totals.tolist(), raw) == ([0.0, 0.0], {})
    totals, raw = RewardSet.build(length).dense_step(make_batch("ab", "c"), np.array([True, True]))
    assert (totals.tolist(), raw) == ([0.0, 0.0], {})


def test_an_empty_batch_calls_nothing(make_batch):
    rewards = RewardSet.build([length, ones])
    assert rewards.terminal(make_batch())[0].shape == (0,)
    assert rewards.dense_step(make_batch(), np.zeros(0, bool))[0].shape == (0,)
    assert rewards.dense_sequence(make_batch(), np.zeros(0, bool)) == ([], {"ones": []})
    assert rewards.calls == 0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"`reward_weights` must hold one number per reward: 2 rewards, got \[1.0\]"),
        ([1.0, 2.0, 3.0], "2 rewards, got"),
        ([1.0, math.nan], "`reward_weights` must be finite"),
        ([[1.0, 2.0]], "one number per reward"),
        (["a", 1.0], "`reward_weights` must hold numbers, one per reward, got"),
        (1.0, "`reward_weights` must hold one number per reward: 2 rewards, got 1.0"),
    ],
)
def test_wrong_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        RewardSet.build([length, sometimes], weights)


def test_names_can_be_given():
    rewards = RewardSet.build([LengthReward(5, 5), LengthReward(9, 5)], names=["short", "long"])
    assert rewards.names == ("short", "long")
    with pytest.raises(ValueError, match="`names` must hold one distinct name per reward: 2 rewards"):
        RewardSet.build([length, length], names=["same", "same"])


def test_an_empty_list_is_an_error():
    with pytest.raises(ValueError, match="`reward` must not be an empty list"):
        RewardSet.build([])


def test_a_reward_set_is_taken_as_it_is():
    rewards = RewardSet.build(length)
    assert RewardSet.build(rewards) is rewards
    with pytest.raises(ValueError, match="`reward` is one already"):
        RewardSet.build(rewards, [1.0])


def test_copies_are_the_same_object():
    rewards = RewardSet.build(length)
    assert copy.deepcopy({"reward": rewards})["reward"] is rewards
    assert copy.copy(rewards) is rewards


def test_pickles_when_its_parts_do(make_batch):
    rewards = RewardSet.build([length, ones, once, LengthReward(4, 4)], [1.0, 2.0, 3.0, 4.0])
    batch, finished = make_batch("some text"), np.array([True])
    rewards.dense_step(batch, finished)
    again = pickle.loads(pickle.dumps(rewards))
    assert again.names == rewards.names
    assert again.weights == rewards.weights
    assert again.terminal(batch)[0] == rewards.terminal(batch)[0]
    np.testing.assert_array_equal(again.dense_step(batch, finished)[0], rewards.dense_step(batch, finished)[0])


def test_what_functions_log_is_read_and_forgotten(make_batch):
    def logging(completions, trainer_state, log_extra, log_metric):
        log_extra("words", [text.upper() for text in completions])
        log_metric("step", trainer_state.global_step)
        return [0.0] * len(completions)

    rewards = RewardSet.build(logging)
    for step in (1, 2):
        rewards.trainer_state = SimpleNamespace(global_step=step)
        rewards.terminal(make_batch("a", "b"))
    assert rewards.drain_logs() == ({"step": 1.5}, {"words": ["A", "B", "A", "B"]})
    assert rewards.drain_logs() == ({}, {})


def test_logs_that_nobody_reads_do_not_grow_without_bound(make_batch):
    rewards = RewardSet.build(lambda completions, log_extra: log_extra("n", range(8_000)) or [0.0])
    rewards.terminal(make_batch("a"))
    rewards.terminal(make_batch("a"))
    assert len(rewards.drain_logs()[1]["n"]) == 10_000


def test_batches_check_their_columns(make_batch):
    with pytest.raises(ValueError, match="column 'answer' must hold one value per completion: 2 completions, 1 values"):
        make_batch("a", "b", answer=[1])
    with pytest.raises(ValueError, match="a column 'completions', a name that rewards use for something else"):
        make_batch("a", completions=["x"])
    with pytest.raises(ValueError, match="2 completions, 1 prompts"):
        EpisodeBatch(["p"], [[1], [2]], decode=lambda prompts, rows: [""] * len(rows))
