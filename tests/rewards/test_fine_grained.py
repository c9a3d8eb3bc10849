"""Fine-grained rewards: r_t = Σ_k Σ_j 1[t = T_j^k] w_k R_k(x, y_≤t, j), on texts scored by hand; and weights that change."""

import pickle

import numpy as np
import pytest

from textgym.errors import RewardError
from textgym.rewards import (
    EpisodeBatch,
    FineGrainedReward,
    LexiconReward,
    Objective,
    RewardSet,
    TokenCount,
    check_causal,
    segment_level,
    token_level,
)

TEXT = "ab, c. de"  # tokens are characters; EOS behind them
SENTENCES, SUB_SENTENCES = {5: "ab, c.", 9: " de"}, {2: "ab,", 5: " c.", 9: " de"}


def length(completions):
    return [float(len(text)) for text in completions]


def number(completion_ids, segment_index):
    return [100.0 * index + len(ids) for ids, index in zip(completion_ids, segment_index, strict=True)]


def paid(reward, batch, name=None):
    """What is paid at each token of each row."""
    totals, raw = RewardSet.build(reward).dense_sequence(batch, np.ones(len(batch), dtype=bool))
    return [row.tolist() for row in (totals if name is None else raw[name])]


def at(places):
    return [float(places.get(t, 0.0)) for t in range(len(TEXT) + 1)]


def test_each_objective_has_its_segments_and_its_weight(make_batch):
    reward = FineGrainedReward(
        [
            Objective(length, "sentence", weight=1.0, name="prefixes"),
            Objective(length, "sub_sentence", weight=10.0, name="segments", sees="segment"),
            Objective(length, TokenCount(4), weight=-1.0),
            Objective(length, "whole", name="once"),
        ]
    )
    assert reward.names == ("prefixes", "segments", "length", "once") and reward.weights == (1.0, 10.0, -1.0, 1.0)
    batch = make_batch(TEXT)
    assert paid(reward, batch, "prefixes") == [at({5: 6, 9: 9})]
    assert paid(reward, batch, "segments") == [at({2: 3, 5: 2, 9: 2})]  # white space at the edges is taken off
    assert paid(reward, batch, "length") == [at({3: 4, 7: 8, 9: 9})]
    assert paid(reward, batch, "once") == [at({9: 9})]
    assert paid(reward, batch) == [at({2: 30, 3: -4, 5: 6 + 20, 7: -8, 9: 9 + 20 - 9 + 9})]
    check_causal(reward, make_batch(TEXT, "x", ".", "a.b.c", ""))


def test_what_a_segment_looks_like_to_a_reward(make_batch):
    seen = {}

    def look(prompts, completions, completion_ids, segments, segment_ids, segment_index, answer):
        seen.update(locals())
        return [0.0] * len(prompts)

    batch = make_batch(TEXT, answer=["right"])
    paid(FineGrainedReward([Objective(look, "sentence")]), batch)
    assert (seen["completions"], seen["segments"]) == (["ab, c.", "ab, c. de"], ["ab, c.", " de"])
    assert seen["segment_ids"] == [[ord(c) for c in "ab, c."], [*(ord(c) for c in " de"), 1]]
    assert seen["completion_ids"][1] == batch.completion_ids[0] and seen["segment_index"] == [0, 1] and seen["answer"] == ["right"] * 2
    paid(FineGrainedReward([Objective(look, "sentence", sees="segment")]), batch)
    assert seen["completions"] == ["ab, c.", "de"] and seen["completion_ids"] == seen["segment_ids"]
    chat = make_batch(TEXT, prompts=[[{"role": "user", "content": "hi"}]], answer=["right"])
    paid(FineGrainedReward([Objective(look, "sentence", sees="segment")]), chat)
    assert seen["completions"][1] == [{"role": "assistant", "content": "de"}]


def test_paid_at_the_end_it_is_the_same_sum_without_the_credit(make_batch):
    batch = make_batch(TEXT, "a. b. c.", "")
    for sees in ("prefix", "segment"):
        dense, late = (FineGrainedReward([Objective(number, "sentence", sees=sees, paid=when)]) for when in ("segment", "end"))
        for early, last in zip(paid(dense, batch), paid(late, batch), strict=True):
            assert last[:-1] == [0.0] * (len(last) - 1) and last[-1] == sum(early)
        assert dense.counts == late.counts == {"number": (1, 6)}, "the same scores were asked for"
        check_causal(late, batch)
    unfinished, _ = late.dense_sequence(batch, np.zeros(3, dtype=bool))
    assert not any(row.any() for row in unfinished), "an episode that was cut has no end"


def test_objectives_without_a_segmenter(make_batch):
    @token_level
    def each(completion_ids):
        return [[1.0] * len(ids) for ids in completion_ids]

    @segment_level("sentence")
    def every(segments):
        return [float(len(text)) for text in segments]

    reward = FineGrainedReward([Objective(length, weight=2.0), Objective(each), Objective(every), Objective("length", name="tokens")])
    batch = make_batch(TEXT)
    assert paid(reward, batch, "each") == [[1.0] * 10] and paid(reward, batch, "every") == [at({5: 6, 9: 3})]
    totals, parts = reward.terminal(batch)
    assert totals.tolist() == [2 * 9 + 10] and set(parts) == {"length", "tokens"}
    with pytest.raises(ValueError, match="objective `each` is marked as dense already"):
        FineGrainedReward([Objective(each, "sentence")])


def test_one_reward_for_several_objectives(make_batch):
    lexicon = LexiconReward({"good": 1.0, "bad": -1.0}, normalise="mean")
    reward = FineGrainedReward([Objective(lexicon, "sentence", sees="segment"), Objective(lexicon, "whole", weight=0.5)])
    assert reward.names == ("LexiconReward", "LexiconReward_2")
    row = paid(reward, make_batch("good. bad. bad"))[0]
    assert [value for value in row if value] == [1.0, -1.0, pytest.approx(-1.0 - 0.5 / 3)]
    assert not RewardSet.build(lexicon).has_dense, "the reward itself was marked"


async def slow(completions):
    return [1.0] * len(completions)


@pytest.mark.parametrize("sees", ["prefix", "segment"])
def test_async_functions_and_pickles(make_batch, sees):
    reward = FineGrainedReward([Objective(slow, "sentence", sees=sees), Objective(length, "sentence", weight=3.0, sees=sees)])
    again = pickle.loads(pickle.dumps(reward))
    assert paid(reward, make_batch(TEXT)) == paid(again, make_batch(TEXT)) and again.weights == (1.0, 3.0)


def test_in_a_list_of_rewards(make_batch):
    fine = FineGrainedReward([Objective(length, "sentence", weight=2.0), Objective(number, "whole")])
    both = RewardSet.build(["length", fine], [1.0, 10.0])
    assert both.names == ("length", "length_2", "number") and both.weights == (1.0, 20.0, 10.0)
    assert RewardSet.build(fine) is fine
    with pytest.raises(ValueError, match="belong to the making of a RewardSet"):
        RewardSet.build(fine, [1.0, 2.0])


def test_a_missing_column_is_named():
    def graded(completions, answer):
        return [0.0] * len(completions)

    batch = EpisodeBatch(["p"], [[97]], {}, decode=lambda prompts, rows: ["a"] * len(rows))
    with pytest.raises(RewardError, match="reward `graded` asks for `answer`"):
        paid(FineGrainedReward([Objective(graded, "sentence", sees="segment")]), batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(length, "sentence", sees="text"), "`sees` must be 'prefix' or 'segment', got 'text'"),
        (lambda: Objective(length, "sentence", paid="start"), "`paid` must be 'segment' or 'end', got 'start'"),
        (lambda: Objective(length, "paragraph"), r"`segmenter` must be one of .* or a function, got 'paragraph'"),
        (lambda: Objective(length, paid="end"), "so a `segmenter` must be given too"),
        (lambda: FineGrainedReward([]), "`objectives` must be a list of at least one `Objective`"),
        (lambda: FineGrainedReward([length]), "`objectives` must be a list of at least one `Objective`"),
        (lambda: FineGrainedReward([Objective(length, weight=float("nan"))]), "`weights` must be finite"),
        (lambda: FineGrainedReward([Objective("bleuu")]), "Did you mean 'bleu'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- Weights --------------------------------------------------------------------------------------------------------------------


def test_weights_change_from_the_next_payment_on(make_batch):
    rewards = RewardSet.build([length, segment_level("sentence")(lambda segments: [1.0] * len(segments))], [1.0, 2.0], ["a", "b"])
    batch = make_batch(TEXT)
    assert rewards.terminal(batch)[0].tolist() == [9.0] and paid(rewards, batch) == [at({5: 2, 9: 2})]
    rewards.set_weights({"b": -1.0})
    assert rewards.weights == (1.0, -1.0) and paid(rewards, batch) == [at({5: -1, 9: -1})]
    rewards.set_weights((0.5, 0.0))
    totals, parts = rewards.terminal(batch)
    assert totals.tolist() == [4.5] and parts["a"].tolist() == [9.0], "the parts are before weighting"


def test_vector_of_objectives():
    rewards = RewardSet.build([length, number], [1.0, 2.0])
    np.testing.assert_array_equal(rewards.vector({"number": 3.0, "length": 1.0}), [1.0, 3.0])
    np.testing.assert_array_equal(rewards.vector({"number": 3.0}), [0.0, 3.0])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"longer": 1.0}, "`weights` must name parts of the reward, length, number, got 'longer'"),
        ([1.0], "`weights` must hold one number per reward: 2 rewards"),
        ([1.0, float("inf")], "`weights` must be finite"),
        ({"length": "much"}, "`weights` must hold numbers"),
    ],
)
def test_bad_weights_change_nothing(weights, message):
    rewards = RewardSet.build([length, number])
    with pytest.raises(ValueError, match=message):
        rewards.set_weights(weights)
    assert rewards.weights == (1.0, 1.0)


def test_named_in_a_file_it_is_the_object_of_that_file(tmp_path, monkeypatch):
    (tmp_path / "my_objectives.py").write_text(
        "from textgym.rewards import FineGrainedReward, Objective\nall_of_them = FineGrainedReward([Objective('length', 'sentence')])\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    rewards = RewardSet.build("my_objectives:all_of_them")
    import my_objectives

    assert rewards is my_objectives.all_of_them
    assert RewardSet.build(["my_objectives:all_of_them", "length"]).names == ("length", "length_2")
