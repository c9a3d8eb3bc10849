"""The small rewards, with numbers computed by hand."""

import math
import pickle
import re

import pytest

from textgym.rewards import ExactMatchReward, LengthReward, LexiconReward, RegexReward, RepetitionPenalty, RewardSet

CHAT = [{"role": "assistant", "content": "one two"}]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("tokens", [1.0, 0.75, 0.0]),  # 4, 3 and 9 tokens around 4, width 4
        ("words", [0.5, 0.5, 0.25]),  # 2, 2 and 1 words
        ("characters", [0.25, 0.25, 1.0]),  # 7, 7 and 4 characters
    ],
)
def test_length(unit, expected):
    reward = LengthReward(target=4, width=4, unit=unit)
    assert reward(completions=["one two", CHAT, "four"], completion_ids=[[1] * 4, [1] * 3, [1] * 9]) == expected


def test_regex():
    reward = RegexReward(r"^\d+$", found=2.0, missing=-1.0)
    assert reward(["12", "a12", CHAT]) == [2.0, -1.0, -1.0]
    assert RegexReward("TWO")(["two"]) == [0.0]
    assert RegexReward("TWO", flags=re.IGNORECASE)([CHAT]) == [1.0]


def test_exact_match():
    reward = ExactMatchReward("solution")
    completions = [" 42\n", "42", "Forty-two", CHAT, "x"]
    assert reward(completions, solution=["42", "43", ["42", "Forty-two"], "one two", None]) == [1.0, 0.0, 1.0, 1.0, None]
    assert ExactMatchReward(ignore_case=True)(["YES"], answer=["yes"]) == [1.0]
    assert ExactMatchReward()(["YES"], answer=["yes"]) == [0.0]


def test_exact_match_through_a_reward_set(make_batch):
    totals, _ = RewardSet.build(ExactMatchReward()).terminal(make_batch("a", "b", answer=["a", "a"]))
    assert totals.tolist() == [1.0, 0.0]


def test_repetition():
    reward = RepetitionPenalty(ngram_size=2, max_penalty=-2.0)
    # a b a b a: the pairs ab ba ab ba, 2 of 4 distinct
    assert reward(["A b a B a", "a b c", "a", "", CHAT]) == [-2.0 * (1 - 2 / 4), 0.0, 0.0, 0.0, 0.0]
    assert RepetitionPenalty(ngram_size=1)(["no no no no"]) == [-0.75]


VALENCES = {"good": 1.9, "bad": -2.5, ":)": 2.0, "don't": -0.5}


def test_lexicon_compound():
    reward = LexiconReward(VALENCES)
    total = 1.9 + 1.9 - 2.5
    assert reward(["Good, good film; not BAD!"]) == [pytest.approx(total / math.sqrt(total**2 + 15))]
    assert reward(["nothing here", ""]) == [0.0, 0.0]
    assert reward([":) x", "x:)"]) == [pytest.approx(2 / math.sqrt(19)), 0.0]
    assert reward(["don't"]) == [pytest.approx(-0.5 / math.sqrt(15.25))]
    assert reward([[{"role": "assistant", "content": "bad"}]]) == [pytest.approx(-2.5 / math.sqrt(2.5**2 + 15))]


def test_lexicon_mean():
    assert LexiconReward(VALENCES, normalise="mean")(["good bad bad film", "film"]) == [pytest.approx((1.9 - 5.0) / 3), 0.0]


@pytest.mark.parametrize("listed", ["don't", "don\u2019t"])
def test_lexicon_apostrophes_are_one_character(listed):
    reward = LexiconReward({listed: -1.0}, normalise="mean")
    assert reward(["don\u2019t", "don't", "Don\u02bct!", "dont"]) == [-1.0, -1.0, -1.0, 0.0]


@pytest.mark.parametrize("listed", ["\u00e9", "e\u0301"])
def test_lexicon_accents_have_one_form(listed):
    assert LexiconReward({listed: 1.0}, normalise="mean")(["\u00c9", "e\u0301", "e"]) == [1.0, 1.0, 0.0]


def test_lexicon_from_a_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("Good\t1.9\t0.9\t[1, 2]\ngood\t-3\n\n:)\t2.0\nno way\t-1\n", encoding="utf-8")
    assert LexiconReward.from_file(path).valences == {"good": 1.9, ":)": 2.0, "no way": -1.0}
    path.write_text("good\t1.9\nbad -2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2: expected a word, a tab and a number, got 'bad -2'"):
        LexiconReward.from_file(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no words"):
        LexiconReward.from_file(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthReward(-1, 2), "`target` must be at least 0, got -1"),
        (lambda: LengthReward(1, 0), "`width` must be more than 0, got 0"),
        (lambda: LengthReward(1, 2, unit="lines"), "`unit` must be 'tokens', 'words' or 'characters', got 'lines'"),
        (lambda: RegexReward("("), r"`pattern` must be a regular expression, got '\('"),
        (lambda: RepetitionPenalty(0), "`ngram_size` must be at least 1, got 0"),
        (lambda: RepetitionPenalty(1, 0.5), "`max_penalty` must be at most 0, got 0.5"),
        (lambda: LexiconReward({}), "`valences` must hold at least one word"),
        (lambda: LexiconReward({"good": float("nan")}), "`valences` must be finite numbers, got nan for 'good'"),
        (lambda: LexiconReward(VALENCES, normalise="sum"), "`normalise` must be 'compound' or 'mean', got 'sum'"),
        (lambda: ExactMatchReward("gold")(["a"], answer=["a"]), "no column 'gold'"),
        (lambda: ExactMatchReward()(["1"], answer=[1]), "column 'answer' must hold strings or lists of strings, got 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("reward", [LengthReward(1, 2), RegexReward("a"), ExactMatchReward(), RepetitionPenalty(), LexiconReward(VALENCES)])
def test_they_pickle(reward):
    arguments = {"completions": ["a good film"], "completion_ids": [[1, 2]], "answer": ["a good film"]}
    set_before, set_after = RewardSet.build(reward), RewardSet.build(pickle.loads(pickle.dumps(reward)))
    before, after = (s._parts[0].parameters.select(arguments, "r") for s in (set_before, set_after))
    assert reward(**before) == set_after._parts[0].function(**after)
