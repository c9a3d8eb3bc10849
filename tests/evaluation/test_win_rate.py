import json

import numpy as np
import pytest

from textgym.evaluation import bootstrap_mean, judged_win_rate, win_rate, win_rate_from_points, win_rate_over_seeds


def test_wins_and_half_the_ties_by_hand():
    rate = win_rate([3.0, 1.0, 2.0, 5.0], [1.0, 1.0, 4.0, 0.0])
    assert (rate.wins, rate.ties, rate.losses, rate.rate) == (2, 1, 1, 2.5 / 4)


def test_a_margin_makes_ties_and_its_edge_is_one():
    rate = win_rate([1.0, 1.5, 3.0], [0.0, 1.0, 1.0], tie_margin=0.5)
    assert (rate.wins, rate.ties, rate.losses) == (2, 1, 0)


def test_both_sides_add_up_to_one():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, size=(2, 100))
    forth, back = win_rate(a, b), win_rate(b, a)
    assert forth.rate + back.rate == pytest.approx(1.0)
    assert (forth.wins, forth.ties) == (back.losses, back.ties)


def test_the_interval_covers_as_often_as_it_says():
    """Of 400 samples of 100 prompts with a known win rate, about 95 % of the intervals contain it."""
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(400):
        rate = win_rate(rng.normal(0.4, 1.0, 100), rng.normal(0.0, 1.0, 100), num_resamples=400, seed=trial)
        covered += rate.low <= 0.6114 <= rate.high  # Φ(0.4 / √2)
    assert 0.92 <= covered / 400 <= 0.975  # ± 2.6 standard errors around 0.947


def test_the_interval_is_that_of_the_binomial():
    points = np.r_[np.ones(60), np.zeros(40)]
    rate = win_rate_from_points(points)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 100)
    assert rate.high - rate.low == pytest.approx(2 * half, abs=0.011)


def test_texts_of_one_prompt_stay_together():
    """Eight texts per prompt that all win or all lose say no more than one: the interval has the width of 50 prompts, not of 400."""
    outcomes = np.r_[np.ones(30), np.zeros(20)]
    alone = win_rate_from_points(outcomes)
    together = win_rate(np.repeat(outcomes[:, None], 8, axis=1), np.full((50, 1), 0.5))
    assert (together.low, together.high) == (alone.low, alone.high)
    assert together.wins == 240


def test_one_text_is_compared_with_each_of_several():
    rate = win_rate([[1.0, 3.0], [0.0, 0.0]], [2.0, 0.0])
    assert (rate.wins, rate.ties, rate.losses) == (1, 2, 1)
    assert rate.rate == win_rate([[1.0, 3.0], [0.0, 0.0]], [[2.0], [0.0]]).rate


def test_seeds_and_prompts_widen_the_interval():
    rng = np.random.default_rng(2)
    runs = rng.normal(0.0, 0.8, size=(5, 1)) + rng.normal(0.3, 1.0, size=(5, 60))
    widths = {}
    for over in ("prompts", "seeds", "both"):
        rate = win_rate_over_seeds(runs, np.zeros(60), over=over)
        assert rate.rate == pytest.approx((runs > 0).mean())
        assert rate.per_seed == pytest.approx(tuple((runs > 0).mean(axis=1)))
        widths[over] = rate.high - rate.low
    assert widths["both"] > widths["seeds"] > widths["prompts"]


def test_over_prompts_the_runs_are_averaged_first():
    runs = np.array([[1.0, 0.0, 0.5], [1.0, 1.0, 0.0]])
    expected = bootstrap_mean(runs.mean(axis=0))
    rate = win_rate_over_seeds(runs + 0.5, np.array([1.0, 1.0, 1.0]), over="prompts")
    assert rate.rate == pytest.approx(0.5 + 1 / 12)  # 1, ½... of the six: 3 wins, 1 tie, 2 losses
    assert expected.mean == pytest.approx(rate.rate)
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high))


def longer(prompt, first, second):
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


def test_a_judge_is_asked_in_both_orders():
    asked = []

    def judge(prompt, first, second):
        asked.append((prompt, first, second))
        return longer(prompt, first, second)

    rate = judged_win_rate(judge, ["p", "q", "r"], ["aa", "b", "c"], ["a", "bb", "d"])
    assert asked[:2] == [("p", "aa", "a"), ("p", "a", "aa")]
    assert (rate.wins, rate.ties, rate.losses) == (1, 1, 1)


def test_a_judge_that_looks_at_positions_only_makes_ties():
    rate = judged_win_rate(lambda *_: "first", ["p"] * 5, ["a"] * 5, ["b"] * 5)
    assert (rate.rate, rate.ties) == (0.5, 5)
    # Half a disagreement is one too.
    answers = iter(["first", "tie"])
    assert judged_win_rate(lambda *_: next(answers), ["p"], ["a"], ["b"]).ties == 1


def test_probabilities_are_averaged_over_both_orders():
    """0.3 for the first place on top of what it thinks: that cancels out."""
    rate = judged_win_rate(lambda prompt, first, second: 0.65 if first == "good" else 0.55, ["p"] * 2, ["good"] * 2, ["bad"] * 2)
    assert rate.rate == pytest.approx((0.65 + 1 - 0.55) / 2)
    assert (rate.wins, rate.losses) == (2, 0)


@pytest.mark.parametrize("answer", ["A", None, True, 1.5, -0.1, float("nan")])
def test_other_answers_of_a_judge_are_errors(answer):
    with pytest.raises(ValueError, match="judge"):
        judged_win_rate(lambda *_: answer, ["p"], ["a"], ["b"])


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([1.0], [1.0, 2.0], "same prompts"),
        ([], [], "same prompts"),
        ([1.0, float("nan")], [0.0, 0.0], "`scores_a` must be finite"),
        (np.zeros((2, 3)), np.zeros((2, 2)), "equally many"),
    ],
)
def test_wrong_scores_are_errors(a, b, words):
    with pytest.raises(ValueError, match=words):
        win_rate(a, b)


def test_other_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="confidence"):
        win_rate([1.0], [0.0], confidence=95)
    with pytest.raises(ValueError, match="tie_margin"):
        win_rate([1.0], [0.0], tie_margin=-1)
    with pytest.raises(ValueError, match=r"\(S, P\)"):
        win_rate_over_seeds([1.0], [0.0])
    with pytest.raises(ValueError, match="over"):
        win_rate_over_seeds([[1.0]], [0.0], over="rows")
    with pytest.raises(ValueError, match="one entry per comparison"):
        judged_win_rate(longer, ["p"], ["a", "b"], ["c"])


def test_it_is_repeatable_and_readable():
    a, b = np.random.default_rng(3).normal(size=(2, 40))
    rate = win_rate(a, b, seed=1)
    assert rate == win_rate(a, b, seed=1)
    assert bootstrap_mean(a, seed=1) == bootstrap_mean(a, seed=1) != bootstrap_mean(a, seed=2)
    assert json.loads(json.dumps(rate.to_dict()))["wins"] == rate.wins
    assert str(win_rate([1.0, 2.0], [0.0, 0.0])) == "100.0% [100.0%, 100.0%] (2 won, 0 tied, 0 lost)"


def test_the_mean_of_a_sample_and_its_interval():
    values = np.random.default_rng(4).normal(2.0, 3.0, 400)
    estimate = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert estimate.mean == values.mean()
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    narrower = bootstrap_mean(values, confidence=0.5)
    assert narrower.high - narrower.low < 0.4 * (estimate.high - estimate.low)
