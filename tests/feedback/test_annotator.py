"""The synthetic annotator: its exact probabilities against formulas written out here, and its draws against those probabilities."""

import json
import math
from collections import Counter
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest

from textgym.feedback import Comparison, Segment, SyntheticAnnotator, sample_segment_pairs

DRAWS = 20_000
FIXED = {"a": 1.0, "b": 0.0, "c c c": -0.5, "d": 0.25}  # r of each text


def known(completions: list[Any], **columns: Any) -> list[float]:
    return [FIXED[text] for text in completions]


def nothing(completions: list[Any], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def assert_frequency(count: float, probability: float, draws: int = DRAWS) -> None:
    """Within 4.5 standard errors of a binomial: 1 in 150,000 by chance, and the seeds are fixed."""
    assert abs(count / draws - probability) <= 4.5 * math.sqrt(probability * (1 - probability) / draws) + 1e-12


def p(annotator: SyntheticAnnotator, first: str, second: str) -> float:
    return float(annotator.probabilities(["x"], [first], [second])[0])


# -- pairs --------------------------------------------------------------------------------------------------------------------------------


def test_bradley_terry() -> None:
    assert p(SyntheticAnnotator(known), "a", "b") == pytest.approx(sigmoid(1))
    assert p(SyntheticAnnotator(known, temperature=0.5), "a", "b") == pytest.approx(sigmoid(2))
    assert p(SyntheticAnnotator(known, temperature=0), "a", "b") == 1 and p(SyntheticAnnotator(known, temperature=0), "b", "a") == 0
    assert p(SyntheticAnnotator(nothing, temperature=0), "a", "b") == 0.5
    assert p(SyntheticAnnotator(known, temperature=1e-12), "a", "b") == 1


def test_label_noise_turns_a_share_of_the_verdicts_round() -> None:
    noisy = SyntheticAnnotator(known, label_noise=0.1)
    assert p(noisy, "a", "b") == pytest.approx(0.9 * sigmoid(1) + 0.1 * sigmoid(-1))
    assert p(SyntheticAnnotator(known, temperature=0, label_noise=0.1), "a", "b") == pytest.approx(0.9)
    assert p(SyntheticAnnotator(known, label_noise=0.5), "a", "b") == pytest.approx(0.5)


def test_length_bias_is_per_word() -> None:
    assert p(SyntheticAnnotator(known, length_bias=0.3), "c c c", "b") == pytest.approx(sigmoid(-0.5 + 0.3 * (3 - 1)))
    assert SyntheticAnnotator(known, length_bias=-1.0).utilities(["x", "x"], ["a", "c c c"]).tolist() == [0.0, -3.5]
    chat = [{"role": "assistant", "content": "one two"}]
    assert SyntheticAnnotator(nothing, length_bias=1.0).utilities([chat], [chat]).tolist() == [2.0]


def test_ties() -> None:
    annotator = SyntheticAnnotator(known, tie_threshold=0.25, temperature=0)
    assert [p(annotator, *pair) for pair in (("d", "b"), ("b", "d"), ("a", "d"), ("b", "a"))] == [0.5, 0.5, 1, 0]
    assert annotator.compare(["x", "x"], ["b", "b"], ["d", "a"]) == [Comparison("x", "b", "d", 0.5), Comparison("x", "a", "b")]
    (judged,) = annotator.judge_pairs(["x"], [["b", "a", "d"]])
    assert [(one.first, one.second, one.z) for one in judged.judgements] == [(0, 1, -1), (0, 2, 0), (1, 2, 1)]
    noisy = SyntheticAnnotator(known, tie_threshold=0.25, label_noise=0.5)
    assert (noisy.outcomes(["x"] * 50, ["b"] * 50, ["d"] * 50) == 0.5).all(), "noise does not break ties"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"label_noise": 0.2},
        {"length_bias": 0.4},
        {"intransitivity": 1.5},
        {"intransitivity": 1.0, "label_noise": 0.1},
    ],
)
def test_draws_have_the_probabilities(options: dict[str, Any]) -> None:
    annotator = SyntheticAnnotator(known, seed=3, **options)
    for first, second in (("a", "b"), ("c c c", "d")):
        chance = p(annotator, first, second)
        assert 0.05 < chance < 0.999
        found = annotator.compare(["x"] * DRAWS, [first] * DRAWS, [second] * DRAWS)
        assert_frequency(sum(one.chosen == first for one in found), chance)
        assert {one.preference for one in found} == {1.0}


def test_soft_records_hold_the_probability_and_draw_nothing() -> None:
    annotator = SyntheticAnnotator(known, label_noise=0.1)
    before = annotator.generator.bit_generator.state
    found = annotator.compare(["x", "y"], ["a", "c c c"], ["b", "d"], soft=True)
    assert [(one.chosen, one.rejected) for one in found] == [("a", "b"), ("d", "c c c")]
    assert [one.preference for one in found] == pytest.approx([p(annotator, "a", "b"), p(annotator, "d", "c c c")])
    assert annotator.generator.bit_generator.state == before


def test_seeds() -> None:
    def draws(seed: Any) -> list[float]:
        return list(SyntheticAnnotator(nothing, seed=seed).outcomes(["x"] * 64, ["a"] * 64, ["b"] * 64))

    assert draws(5) == draws(5) != draws(6)
    assert draws([5, 1]) == draws([5, 1]) != draws([5, 2])
    whole, parts = SyntheticAnnotator(nothing, seed=1), SyntheticAnnotator(nothing, seed=1)
    first = [*parts.outcomes(["x"] * 10, ["a"] * 10, ["b"] * 10), *parts.outcomes(["x"] * 6, ["a"] * 6, ["b"] * 6)]
    assert list(whole.outcomes(["x"] * 16, ["a"] * 16, ["b"] * 16)) == first


def test_columns_and_names_reach_the_reward() -> None:
    def bonus(completions: list[str], extra: list[float]) -> list[float]:
        return [value * len(text) for text, value in zip(completions, extra, strict=True)]

    annotator = SyntheticAnnotator(bonus, temperature=0)
    found = annotator.compare(["x", "y"], ["a", "a"], ["bb", "bb"], extra=[1, -1])
    assert [one.chosen for one in found] == ["bb", "a"]
    (first, second) = annotator.rank(["x", "y"], [["a", "bb"], ["a", "bb", "ccc"]], extra=[1, -1])
    assert first.ranks == (2, 1) and second.ranks == (1, 2, 3)
    assert p(SyntheticAnnotator("film-review-true"), " great.", " awful.") > 0.5


# -- intransitivity -----------------------------------------------------------------------------------------------------------------------


def winners(annotator: SyntheticAnnotator, texts: list[str]) -> dict[tuple[str, str], float]:
    pairs = list(permutations(texts, 2))
    chances = annotator.probabilities(["x"] * len(pairs), *map(list, zip(*pairs, strict=True)))
    return dict(zip(pairs, chances.tolist(), strict=True))


def test_a_quarter_of_all_triples_are_cycles_where_nothing_else_decides() -> None:
    texts = [f"text {number}" for number in range(60)]
    beats = winners(SyntheticAnnotator(nothing, intransitivity=1.0, temperature=0, seed=2), texts)
    assert all(beats[first, second] == 1 - beats[second, first] for first, second in beats)
    triples = list(combinations(texts, 3))
    cycles = sum(beats[a, b] == beats[b, c] == beats[c, a] for a, b, c in triples)
    # 60 independent angles: the share is a U-statistic of degree 3, whose standard error over 40 seeds is 0.014
    assert abs(cycles / len(triples) - 0.25) < 0.05
    transitive = winners(SyntheticAnnotator(lambda completions: [float(text.split()[1]) for text in completions], temperature=0), texts)
    assert not any(transitive[a, b] == transitive[b, c] == transitive[c, a] for a, b, c in triples)


def test_the_cyclic_term_is_antisymmetric_fixed_by_text_and_seed_and_added_to_the_utilities() -> None:
    annotator = SyntheticAnnotator(known, intransitivity=2.0, seed=4)
    chances = winners(annotator, list(FIXED))
    assert all(chances[one] == pytest.approx(1 - chances[one[::-1]]) for one in chances)
    again, other = (SyntheticAnnotator(known, intransitivity=2.0, seed=seed) for seed in (4, 5))
    assert winners(again, list(FIXED)) == chances != winners(other, list(FIXED))
    logits = {pair: math.log(chance / (1 - chance)) for pair, chance in chances.items()}
    terms = {pair: logit - (FIXED[pair[0]] - FIXED[pair[1]]) for pair, logit in logits.items()}
    assert all(abs(term) <= 2 + 1e-9 for term in terms.values()) and max(map(abs, terms.values())) > 0.5
    # sin(φ_a − φ_b) of three angles: no differences of one number per text, which a reward would be
    assert abs(terms["a", "b"] + terms["b", "c c c"] + terms["c c c", "a"]) > 0.05
    prompts = annotator.probabilities(["x", "y"], ["a", "a"], ["b", "b"])
    assert prompts[0] != prompts[1]


# -- rankings -----------------------------------------------------------------------------------------------------------------------------


def test_plackett_luce_by_hand() -> None:
    (chances,) = SyntheticAnnotator(known).ranking_probabilities(["x"], [["a", "b", "d"]])
    e = [math.exp(FIXED[text]) for text in ("a", "b", "d")]
    assert len(chances) == 6 and sum(chances.values()) == pytest.approx(1)
    assert chances[1, 2, 3] == pytest.approx(e[0] / sum(e) * e[1] / (e[1] + e[2]))
    assert chances[3, 1, 2] == pytest.approx(e[1] / sum(e) * e[2] / (e[0] + e[2]))


def test_rankings_of_two_are_comparisons() -> None:
    for options in ({}, {"temperature": 0.4}, {"label_noise": 0.3}, {"temperature": 0}, {"length_bias": 0.2}, {"tie_threshold": 0.5}):
        annotator = SyntheticAnnotator(known, **options)
        for first, second in (("a", "b"), ("b", "c c c")):
            (chances,) = annotator.ranking_probabilities(["x"], [[first, second]])
            tie = chances.get((1, 1), 0.0)
            assert chances.get((1, 2), 0.0) + tie / 2 == pytest.approx(p(annotator, first, second))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "label_noise": 0.2}, {"tie_threshold": 0.3}, {"temperature": 0}])
def test_drawn_rankings_have_the_probabilities(options: dict[str, Any]) -> None:
    texts = ["a", "b", "d"]
    annotator = SyntheticAnnotator(known, seed=1, **options)
    (chances,) = annotator.ranking_probabilities(["x"], [texts])
    found = Counter(one.ranks for one in annotator.rank(["x"] * DRAWS, [texts] * DRAWS))
    assert set(found) <= set(chances)
    for ranks, chance in chances.items():
        assert_frequency(found[ranks], chance)


def test_ranks_of_ties_and_of_equal_utilities() -> None:
    assert SyntheticAnnotator(known, tie_threshold=0.3, temperature=0).rank(["x"], [["a", "b", "c c c", "d"]])[0].ranks == (1, 2, 3, 2)
    (chances,) = SyntheticAnnotator(nothing, temperature=0).ranking_probabilities(["x"], [["a", "b", "d"]])
    assert chances == {tuple(ranks): pytest.approx(1 / 6) for ranks in permutations((1, 2, 3))}
    drawn = Counter(one.ranks for one in SyntheticAnnotator(nothing, temperature=0).rank(["x"] * 600, [["a", "b", "d"]] * 600))
    assert len(drawn) == 6


def test_the_first_of_a_ranking_is_the_best_by_softmax() -> None:
    """Gumbel noise on u/T: the maximum is a draw of softmax(u/T)."""
    texts = ["a", "b", "c c c", "d"]
    (chances,) = SyntheticAnnotator(known, temperature=0.7).ranking_probabilities(["x"], [texts])
    weights = np.exp(np.array([FIXED[text] for text in texts]) / 0.7)
    firsts = [sum(chance for ranks, chance in chances.items() if ranks[place] == 1) for place in range(4)]
    assert firsts == pytest.approx((weights / weights.sum()).tolist())


# -- labels -------------------------------------------------------------------------------------------------------------------------------


def test_labels_are_bernoulli() -> None:
    annotator = SyntheticAnnotator(known, temperature=0.5, label_noise=0.1, seed=2)
    chances = annotator.label_probabilities(["x"] * 4, list(FIXED))
    assert chances.tolist() == pytest.approx([0.9 * sigmoid(r / 0.5) + 0.1 * sigmoid(-r / 0.5) for r in FIXED.values()])
    for text, chance in zip(FIXED, chances, strict=True):
        assert_frequency(sum(one.good for one in annotator.label(["x"] * DRAWS, [text] * DRAWS)), chance)
    (label,) = SyntheticAnnotator(known, temperature=0).label(["x"], ["a"])
    assert (label.prompt, label.completion, label.good) == ("x", "a", True)


def test_judgements_are_independent_draws_of_all_pairs() -> None:
    annotator = SyntheticAnnotator(known, seed=7)
    texts = ["a", "b", "d"]
    found = annotator.judge_pairs(["x"] * DRAWS, [texts] * DRAWS)
    wins = np.array([[one.z == 1 for one in record.judgements] for record in found])
    for place, (i, j) in enumerate(combinations(range(3), 2)):
        assert_frequency(wins[:, place].sum(), p(annotator, texts[i], texts[j]))
    both = p(annotator, "a", "b") * p(annotator, "b", "d")
    assert_frequency((wins[:, 0] & wins[:, 2]).sum(), both)


# -- segments -----------------------------------------------------------------------------------------------------------------------------

TOKEN_REWARD = {7: 0.5, 8: -1.0, 9: 0.2}


def token_rewards(prompt_ids: tuple[int, ...], completion_ids: tuple[int, ...]) -> list[float]:
    return [TOKEN_REWARD[token] + 0.01 * prompt_ids[0] for token in completion_ids]


def test_segments_are_compared_by_the_sums_of_their_own_tokens() -> None:
    first, second = Segment((1,), (7, 8, 9, 7), 2, 4), Segment((5, 1), (8, 9), 0, 2)
    annotator = SyntheticAnnotator(None, temperature=0.5, seed=3)
    wanted = sigmoid(((0.2 + 0.5 + 2 * 0.01) - (-1.0 + 0.2 + 2 * 0.05)) / 0.5)
    assert annotator.segment_probabilities([(first, second), (second, first)], token_rewards).tolist() == pytest.approx(
        [wanted, 1 - wanted]
    )
    (soft,) = annotator.compare_segments([(first, second)], token_rewards, soft=True)
    assert (soft.first, soft.second, soft.preference) == (first, second, pytest.approx(wanted))
    hard = annotator.compare_segments([(first, second)] * DRAWS, token_rewards)
    assert {one.preference for one in hard} == {0.0, 1.0}
    assert_frequency(sum(one.preference for one in hard), wanted)


def test_options_hold_for_segments() -> None:
    pair = (Segment((0,), (7, 8), 0, 2), Segment((0,), (9,), 0, 1))
    difference = (0.5 - 1.0) - 0.2
    biased = SyntheticAnnotator(None, length_bias=1.0).segment_probabilities([pair], token_rewards)
    assert biased[0] == pytest.approx(sigmoid(difference + 1.0))
    assert SyntheticAnnotator(None, tie_threshold=0.8).compare_segments([pair], token_rewards)[0].preference == 0.5
    cyclic = SyntheticAnnotator(None, intransitivity=1.0)
    forth, back = (cyclic.segment_probabilities([one], token_rewards)[0] for one in (pair, pair[::-1]))
    assert forth == pytest.approx(1 - back) and forth != pytest.approx(sigmoid(difference))


def test_sampled_segments_have_equal_lengths_and_arbitrary_starts() -> None:
    completions = [list(range(10, 16)), [20, 21, 22], [30]]
    pairs = sample_segment_pairs([[1], [2], [3]], completions, 30_000, seed=0)
    assert pairs == sample_segment_pairs([[1], [2], [3]], completions, 30_000, seed=0)
    lengths = Counter()
    for first, second in pairs:
        assert first != second and first.end - first.start == second.end - second.start
        lengths[first.end - first.start] += 1
        for one in (first, second):
            row = one.completion_ids[0] // 10 - 1
            assert list(one.completion_ids) == completions[row][: one.end] and one.prompt_ids == (row + 1,)
    # of length 6 there is one segment only, which has no other to be compared with
    assert set(lengths) == {1, 2, 3, 4, 5}
    for count in lengths.values():
        assert_frequency(count, 1 / 5, 30_000)
    starts = Counter((one.completion_ids[0], one.start) for pair in pairs for one in pair if one.end - one.start == 3)
    assert set(starts) == {(10, 0), (10, 1), (10, 2), (10, 3), (20, 0)}
    for count in starts.values():
        assert_frequency(count, 1 / 5, sum(starts.values()))
    assert {one.end - one.start for pair in sample_segment_pairs([[1]], [[5, 6, 7]], 50, max_length=1) for one in pair} == {1}


def test_what_cannot_be_sampled_or_scored() -> None:
    with pytest.raises(ValueError, match="at least two tokens altogether"):
        sample_segment_pairs([[1], [1]], [[5], []], 3)
    with pytest.raises(ValueError, match="one prompt per completion"):
        sample_segment_pairs([[1]], [[5], [6]], 3)
    with pytest.raises(ValueError, match="`max_length` must be at least 1 token, got 0"):
        sample_segment_pairs([[1]], [[5, 6]], 3, max_length=0)
    (pair,) = sample_segment_pairs([[1]], [[7, 8]], 1)
    for wrong in ([1.0], [1.0, 2.0, 3.0], [math.nan] * 2):
        with pytest.raises(ValueError, match="a finite number for each of"):
            SyntheticAnnotator(None).compare_segments([pair], lambda prompt, completion, wrong=wrong: wrong)


# -- mistakes -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": math.inf},
        {"label_noise": 0.6},
        {"length_bias": math.nan},
        {"intransitivity": -1},
        {"tie_threshold": -0.1},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number"):
        SyntheticAnnotator(known, **options)


def test_options_that_a_form_has_no_place_for_are_refused() -> None:
    cyclic, tying = SyntheticAnnotator(known, intransitivity=1.0), SyntheticAnnotator(known, tie_threshold=0.1)
    with pytest.raises(ValueError, match="`intransitivity` must be left out for `rank`"):
        cyclic.rank(["x"], [["a", "b"]])
    for annotator in (cyclic, tying):
        with pytest.raises(ValueError, match="must be left out for `label`"):
            annotator.label(["x"], ["a"])


def test_wrong_numbers_of_things() -> None:
    annotator = SyntheticAnnotator(known)
    with pytest.raises(ValueError, match="must be as many, got 2, 1 and 1"):
        annotator.compare(["x", "y"], ["a"], ["b"])
    with pytest.raises(ValueError, match="a list per prompt: 1 prompts, 2 lists"):
        annotator.rank(["x"], [["a", "b"], ["a", "b"]])
    with pytest.raises(ValueError, match=r"lists of at least 2 answers, got \['a'\] in row 0"):
        annotator.judge_pairs(["x"], [["a"]])
    with pytest.raises(ValueError, match="at most 8 answers"):
        annotator.ranking_probabilities(["x"], [["a"] * 9])
    with pytest.raises(ValueError, match="`reward` must be given"):
        SyntheticAnnotator(None).compare(["x"], ["a"], ["b"])


def test_the_state_of_the_generator_can_be_saved() -> None:
    annotator = SyntheticAnnotator(nothing, seed=1)
    annotator.outcomes(["x"] * 5, ["a"] * 5, ["b"] * 5)
    state = json.loads(json.dumps(annotator.generator.bit_generator.state))
    wanted = annotator.outcomes(["x"] * 20, ["a"] * 20, ["b"] * 20).tolist()
    resumed = SyntheticAnnotator(nothing, seed=1)
    resumed.generator.bit_generator.state = state
    assert resumed.outcomes(["x"] * 20, ["a"] * 20, ["b"] * 20).tolist() == wanted
