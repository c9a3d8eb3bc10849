"""Token- and segment-level rewards: their sum by hand, and the law that stepping and whole sequences pay the same."""

import functools
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.errors import RewardError
from textgym.rewards import EpisodeBatch, RewardSet, TokenCount, check_causal, segment_level, token_level
from textgym.rewards.dense import Segmentation, dense_kind
from textgym.rewards.segmenters import SEGMENTERS, sentence

EOS = 1


def decode_characters(prompts, rows):
    return ["".join(chr(i) for i in ids if i > 1) for ids in rows]


def decode_bytes(prompts, rows):
    """A byte-level tokenizer: half a character decodes to a replacement mark that later disappears again."""
    return [bytes(i for i in ids if i > 1).decode("utf-8", errors="replace") for ids in rows]


@token_level
def code_points(completion_ids, weight=1.0):
    return [[weight * i for i in ids] for ids in completion_ids]


@segment_level("sentence")
def sentence_length(prompts, completions, completion_ids, segments, segment_index):
    assert all(completion.endswith(segment) for completion, segment in zip(completions, segments, strict=True))
    return [len(segment) + 100.0 * index for segment, index in zip(segments, segment_index, strict=True)]


def test_the_formula_of_spec_7_by_hand(make_batch):
    @segment_level("sub_sentence")
    def per_clause(segments):
        return [1.0] * len(segments)

    @segment_level("whole")
    def per_text(completions):
        return [float(len(text)) for text in completions]

    rewards = RewardSet.build([sentence_length, per_clause, per_text], [1.0, 0.5, 10.0])
    totals, raw = rewards.dense_sequence(make_batch("A, b. Cd"), np.array([True]))
    # tokens:                                       A   ,    ' ' b  .    ' ' C  d  EOS
    np.testing.assert_array_equal(raw["sentence_length"][0], [0, 0, 0, 0, 5, 0, 0, 0, 103])
    np.testing.assert_array_equal(raw["per_clause"][0], [0, 1, 0, 0, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(raw["per_text"][0], [0, 0, 0, 0, 0, 0, 0, 0, 8])
    np.testing.assert_array_equal(totals[0], [0, 0.5, 0, 0, 5.5, 0, 0, 0, 103 + 0.5 + 80])


def test_what_a_segment_reward_is_given(make_batch):
    seen = {}

    @segment_level("sentence")
    def reward(prompts, completions, completion_ids, segments, segment_index, answer):
        seen.update(locals())
        return [0.0] * len(segments)

    batch = make_batch("Hi. Yo", "No", prompts=["p", [{"role": "user", "content": "q"}]], answer=[1, 2])
    RewardSet.build(reward).dense_sequence(batch, np.array([True, True]))
    assert seen["segments"] == ["Hi.", " Yo", "No"]
    assert seen["segment_index"] == [0, 1, 0]
    assert seen["completions"] == ["Hi.", "Hi. Yo", [{"role": "assistant", "content": "No"}]]
    assert seen["completion_ids"] == [[72, 105, 46], [72, 105, 46, 32, 89, 111, EOS], [78, 111, EOS]]
    assert seen["prompts"] == ["p", "p", [{"role": "user", "content": "q"}]]
    assert seen["answer"] == [1, 1, 2]


@pytest.mark.parametrize(
    ("text", "finished", "paid_at"),
    [
        ("Hi.", True, [2]),  # EOS after a closed sentence has no text: no second segment
        ("Hi. ", True, [2]),  # nor has a space
        ("Hi", True, [2]),  # the end closes the last segment, at the EOS
        ("Hi", False, []),  # cut from outside: it stays open
        ("", True, [0]),  # a completion without text is one segment
        ("..", True, [2]),
    ],
)
def test_the_end_closes_the_last_segment(make_batch, text, finished, paid_at):
    one_each = segment_level("sentence")(lambda segments: [1.0] * len(segments))
    totals, _ = RewardSet.build(one_each).dense_sequence(make_batch(text), np.array([finished]))
    assert np.flatnonzero(totals[0]).tolist() == paid_at


def test_none_pays_nothing(make_batch):
    @token_level
    def tokens(completion_ids):
        return [None, [1.0, None, 3.0]]

    @segment_level("whole")
    def segment(segments):
        return [None, 5.0]

    totals, _ = RewardSet.build([tokens, segment]).dense_sequence(make_batch("ab", "cd"), np.array([True, True]))
    np.testing.assert_array_equal(totals, [[0, 0, 0], [1, 0, 8]])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([[1.0, 2.0]], r"token-level reward `tokens` returned 2 numbers for the 3 tokens of row 0 \(prompt 'a prompt', completion 'ab'\)"),
        ([[1.0, 2.0, float("nan")]], "reward `tokens` returned nan for token 2 of row 0"),
        ([1.0], "reward `tokens` returned float 1.0; it must return a list with one list of numbers per completion"),
        ([[1.0] * 3] * 2, "reward `tokens` returned 2 values for 1 completions"),
        (3.0, "reward `tokens` returned float 3.0"),
    ],
)
def test_unusable_results_name_the_token(make_batch, result, message):
    @token_level
    def tokens(completion_ids):
        return result

    with pytest.raises(RewardError, match=message):
        RewardSet.build(tokens).dense_sequence(make_batch("ab"), np.array([True]))


def test_a_step_needs_a_token(make_batch):
    with pytest.raises(ValueError, match="at least one token per row"):
        RewardSet.build(code_points).dense_step(make_batch("", eos=False), np.array([False]))


class Scorer:
    @token_level
    def method(self, completion_ids):
        return [[1.0] * len(ids) for ids in completion_ids]

    @segment_level(TokenCount(2))
    def __call__(self, segments):
        return [1.0] * len(segments)

    def unmarked(self, completion_ids):
        return [[2.0] * len(ids) for ids in completion_ids]


def test_marks_are_found_on_callables_of_every_kind(make_batch):
    scorer = Scorer()
    parts = [scorer.method, scorer, token_level(scorer.unmarked), functools.partial(code_points, weight=0.0)]
    rewards = RewardSet.build(parts)
    assert not rewards.has_terminal
    _, raw = rewards.dense_sequence(make_batch("abc"), np.array([True]))
    assert [sum(rows[0]) for rows in raw.values()] == [4, 2, 8, 0]
    assert pickle.loads(pickle.dumps(rewards)).names == ("method", "Scorer", "unmarked", "code_points")
    assert dense_kind(len) is None
    assert dense_kind(Scorer) is None


def test_wrong_decorator_arguments():
    with pytest.raises(ValueError, match=r"`segmenter` must be one of \['sentence', 'sub_sentence', 'whole'\] or a function, got 'word'"):
        segment_level("word")
    with pytest.raises(ValueError, match="`segmenter` must be one of"):
        segment_level(3)
    with pytest.raises(ValueError, match="a dense reward must be a function, got int"):
        token_level(3)


# Texts with every kind of end, multi-byte characters, blank runs and special tokens in the middle.
texts = st.text(alphabet="ab .,!?\n…。é🙂\"'", max_size=14)
id_rows = st.lists(
    st.one_of(texts.map(lambda t: list(t.encode())), st.lists(st.integers(0, 255), min_size=1, max_size=10)), min_size=1, max_size=4
)
segmenters = st.sampled_from([*SEGMENTERS.values(), TokenCount(1), TokenCount(3)])


def parts_of(segmenter):
    @segment_level(segmenter)
    def segments_hashed(prompts, completions, completion_ids, segments, segment_index, answer):
        fields = zip(prompts, completions, map(tuple, completion_ids), segments, segment_index, answer, strict=True)
        return [float(hash(values) % 1009) for values in fields]

    return [segments_hashed, code_points, segment_level("whole")(lambda segments: [len(s) for s in segments])]


@settings(max_examples=150, deadline=None)
@given(rows=id_rows, segmenter=segmenters, data=st.data())
def test_a_step_pays_what_the_whole_sequence_pays(rows, segmenter, data):
    rows = [[*row, EOS] if data.draw(st.booleans()) or not row else row for row in rows]
    ended = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    prompts, answers = [f"prompt {i}" for i in range(len(rows))], list(range(len(rows)))
    rewards = RewardSet.build(parts_of(segmenter), [1.0, 0.5, -2.0])
    totals, raw = rewards.dense_sequence(EpisodeBatch(prompts, rows, {"answer": answers}, decode=decode_bytes), np.array(ended))

    stepping = RewardSet.build(parts_of(segmenter), [1.0, 0.5, -2.0])
    for t in range(1, max(map(len, rows)) + 1):  # rows that have ended are not stepped any more
        live = [i for i, row in enumerate(rows) if len(row) >= t]
        prefixes = EpisodeBatch([prompts[i] for i in live], [rows[i][:t] for i in live], {"answer": live}, decode=decode_bytes)
        step, step_raw = stepping.dense_step(prefixes, np.array([ended[i] and len(rows[i]) == t for i in live]))
        np.testing.assert_array_equal(step, [totals[i][t - 1] for i in live])
        for name in rewards.names:
            np.testing.assert_array_equal(step_raw[name], [raw[name][i][t - 1] for i in live])


@settings(max_examples=100, deadline=None)
@given(row=texts.map(lambda t: [*t.encode(), EOS]), segmenter=segmenters)
def test_segments_tile_the_text(row, segmenter):
    batch = EpisodeBatch(["p"], [row], decode=decode_bytes)
    (segments,) = Segmentation(segmenter).all_segments(batch, [True])
    assert segments
    assert [segment.index for segment in segments] == list(range(len(segments)))
    assert all(a.end < b.end for a, b in pairwise(segments))
    rest = batch.texts[0][len("".join(segment.text for segment in segments)) :]
    if segmenter not in (TokenCount(1), TokenCount(3)):  # those may cut inside a character
        assert batch.texts[0].startswith("".join(segment.text for segment in segments))
        assert not rest.strip()


def test_a_prefix_that_was_not_stepped_to_is_walked_from_its_beginning(make_batch):
    rewards = RewardSet.build(sentence_length)
    text = "One. Two. Three."
    whole, _ = rewards.dense_sequence(make_batch(text, eos=False), np.array([False]))
    for t in reversed(range(1, len(text) + 1)):  # backwards: nothing is remembered
        step, _ = rewards.dense_step(make_batch(text[:t], eos=False), np.array([False]))
        assert step[0] == whole[0][t - 1]


def test_stepping_decodes_each_prefix_once(make_batch):
    decoded = []

    def counting(prompts, rows):
        decoded.extend(rows)
        return decode_characters(prompts, rows)

    segmentation = Segmentation(sentence)
    ids = [ord(c) for c in "One. Two. Three."]
    for t in range(1, len(ids) + 1):
        segmentation.last_segments(EpisodeBatch(["p"], [ids[:t]], decode=counting), [False])
    assert len(decoded) == len(ids)


def test_more_rows_than_are_remembered_by_default(monkeypatch):
    monkeypatch.setattr("textgym.rewards.dense._REMEMBERED_PREFIXES", 2)
    decoded = []

    def counting(prompts, rows):
        decoded.extend(rows)
        return decode_characters(prompts, rows)

    segmentation = Segmentation(sentence)
    rows = [[ord(c) for c in f"{letter}ne. Two."] for letter in "abcdefgh"]
    for t in range(1, len(rows[0]) + 1):
        segmentation.last_segments(EpisodeBatch(["p"] * 8, [ids[:t] for ids in rows], decode=counting), [False] * 8)
    assert len(decoded) == 8 * len(rows[0])
    assert len(segmentation._open) == 16


def test_another_tokenizer_forgets_what_the_first_one_read():
    def upper(prompts, rows):  # the same ids read differently: no sentence ends here
        return [text.replace(".", "x") for text in decode_characters(prompts, rows)]

    segmentation = Segmentation(sentence)
    head, ids = [ord(c) for c in "a.b"], [ord(c) for c in "a.b!"]
    segmentation.last_segments(EpisodeBatch(["p"], [head], decode=decode_characters), [False])
    (segment,) = segmentation.last_segments(EpisodeBatch(["p"], [ids], decode=upper), [False])
    assert segment.text == "axb!"


def test_environments_that_share_a_tokenizer_share_what_is_remembered():
    decoded = []

    def counting(tokenizer, prompts, rows):
        decoded.extend(rows)
        return decode_characters(prompts, rows)

    tokenizer, segmentation = object(), Segmentation(sentence)
    ids = [ord(c) for c in "One. Two. Three."]
    for t in range(1, len(ids) + 1):
        for _ in range(2):  # two environments, each with a partial of its own
            batch = EpisodeBatch(["p"], [ids[:t]], decode=functools.partial(counting, tokenizer))
            segmentation.last_segments(batch, [False])
    assert len(decoded) == 2 * len(ids)


def test_check_causal_passes_causal_rewards(make_batch):
    check_causal([code_points, sentence_length], make_batch("One. Two, three. Four", "", "x"))


def test_check_causal_names_the_first_token_that_differs(make_batch):
    @token_level
    def knows_the_length(completion_ids):
        return [[float(len(ids))] * len(ids) for ids in completion_ids]

    message = (
        r"reward `knows_the_length` is not causal: token 0 of row 0 \(prompt 'a prompt', completion 'ab'\) is paid 1 when it is the last "
        "and 3 in the whole completion"
    )
    with pytest.raises(RewardError, match=message):
        check_causal(knows_the_length, make_batch("ab"))


def test_check_causal_needs_something_to_check(make_batch):
    with pytest.raises(ValueError, match="no dense part to check"):
        check_causal(lambda completions: [1.0], make_batch("ab"))
