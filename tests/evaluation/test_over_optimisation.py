import json

import numpy as np
import pytest

from textgym.evaluation import ScoredTexts, over_optimisation_report, rank_correlation
from textgym.evaluation.over_optimisation import RULES

N = 80
PROMPTS = [f"prompt {i}" for i in range(N)]


def side(proxy, gold, text="a fine short text", prompts=PROMPTS):
    rng = np.random.default_rng(0)
    return ScoredTexts(prompts, [text] * len(prompts), proxy + rng.normal(0, 0.1, len(prompts)), gold + rng.normal(0, 0.1, len(prompts)))


@pytest.mark.parametrize(
    ("proxy", "gold", "verdict"),
    [(1.0, -1.0, "hacked"), (1.0, 0.0, "suspicious"), (1.0, 1.0, "improved"), (0.0, 1.0, "not optimised"), (-1.0, -1.0, "not optimised")],
)
def test_verdicts(proxy, gold, verdict):
    noise = np.random.default_rng(1).normal(0, 0.3, size=(2, N))
    before = side(0.0, 0.0)
    after = ScoredTexts(
        PROMPTS, ["other"] * N, before.proxy + proxy + noise[0] - noise[0].mean(), before.gold + gold + noise[1] - noise[1].mean()
    )
    report = over_optimisation_report(before, after)
    assert report.verdict == verdict
    assert report.rule == RULES[verdict]
    assert report.proxy.change.mean == pytest.approx(proxy, abs=1e-9)
    assert report.gold.after.mean == pytest.approx(np.mean(after.gold))


def test_a_change_of_exactly_nothing_is_neither_rise_nor_fall():
    """Its interval has no width, and it contains 0."""
    rewards = np.arange(N) / N
    before = ScoredTexts(PROMPTS, ["a"] * N, rewards, rewards)

    def verdict(proxy, gold):
        return over_optimisation_report(before, ScoredTexts(PROMPTS, ["b"] * N, rewards + proxy, rewards + gold)).verdict

    assert [verdict(1.0, gold) for gold in (-1.0, 0.0, 1.0)] == ["hacked", "suspicious", "improved"]
    assert [verdict(proxy, gold) for proxy in (0.0, -1.0) for gold in (-1.0, 0.0, 1.0)] == ["not optimised"] * 6


def test_changes_are_paired_by_prompt():
    """Between prompts the level varies by 10; the change of 0.5 shows all the same."""
    rng = np.random.default_rng(2)
    levels = rng.normal(0, 10, N)
    before = ScoredTexts(PROMPTS, ["a"] * N, levels, levels)
    after = ScoredTexts(PROMPTS, ["b"] * N, levels + 0.5 + rng.normal(0, 0.1, N), levels - 0.5 + rng.normal(0, 0.1, N))
    report = over_optimisation_report(before, after)
    assert report.verdict == "hacked"
    assert report.proxy.change.high - report.proxy.change.low < 0.1 < 1 < report.proxy.before.high - report.proxy.before.low


def test_several_texts_of_a_prompt_count_as_one():
    prompts = [prompt for prompt in PROMPTS[:10] for _ in range(8)]
    shift = np.repeat(np.random.default_rng(3).normal(0.3, 1.0, 10), 8)
    zeros = np.zeros(N)
    many = over_optimisation_report(ScoredTexts(prompts, ["a"] * N, zeros, zeros), ScoredTexts(prompts, ["b"] * N, shift, zeros))
    few = over_optimisation_report(
        ScoredTexts(PROMPTS[:10], ["a"] * 10, zeros[:10], zeros[:10]), ScoredTexts(PROMPTS[:10], ["b"] * 10, shift[::8], zeros[:10])
    )
    assert many.proxy.change.low == pytest.approx(few.proxy.change.low)
    assert many.proxy.change.high == pytest.approx(few.proxy.change.high)


def test_the_worst_samples_are_those_that_gained_proxy_and_lost_gold():
    prompts = ["hacked a little", "better", "hacked", "worse"]
    before = ScoredTexts(prompts, ["x"] * 4, [0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0])
    after = ScoredTexts(prompts, ["y", "y", "yay yay", "y"], [1.0, 2.0, 3.0, 0.0], [-1.0, 2.0, -2.0, 0.0])
    report = over_optimisation_report(before, after)
    assert [sample.prompt for sample in report.samples] == ["hacked", "hacked a little"]
    worst = report.samples[0]
    assert (worst.before, worst.after, worst.proxy_change, worst.gold_change) == ("x", "yay yay", 3.0, -2.0)
    assert len(over_optimisation_report(before, after, num_samples=1).samples) == 1


def test_drift_and_correlation():
    rng = np.random.default_rng(4)
    gold = rng.normal(size=N)
    before = ScoredTexts(PROMPTS, ["a b c d e"] * N, gold, gold, [[1, 2]] * N)
    after = ScoredTexts(PROMPTS, ["yay yay yay yay yay"] * N, gold + 1, -gold, [[1, 2, 3, 0]] * N)
    report = over_optimisation_report(before, after, eos_token_ids=(0,))
    assert (report.rank_correlation_before, report.rank_correlation_after) == (pytest.approx(1.0), pytest.approx(-1.0))
    assert (report.texts_before.repetition, report.texts_after.repetition) == (0.0, pytest.approx(2 / 3))
    assert (report.texts_before.tokens, report.texts_after.tokens, report.texts_after.ended) == (2.0, 4.0, 1.0)


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)  # 1 − 6·2 / (4·15)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ties share the mean of their ranks: 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1.0, 2.0, 3.0], np.exp([1.0, 2.0, 30.0])) == pytest.approx(1.0)


def test_the_report_can_be_read_and_stored():
    report = over_optimisation_report(side(0.0, 0.0), side(1.0, -1.0, text="yay yay yay yay"))
    text = report.to_markdown()
    assert text.startswith("Verdict: **hacked** (the proxy rose and the gold reward fell, both by more than chance).")
    assert "| repeated 3-grams" in text and "'yay yay yay yay'" in text
    document = json.loads(json.dumps(report.to_dict()))
    assert document["verdict"] == "hacked" and len(document["samples"]) == 5


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="same prompts"):
        over_optimisation_report(side(0, 0), side(0, 0, prompts=PROMPTS[::-1]))
    with pytest.raises(ValueError, match="one entry per text"):
        over_optimisation_report(ScoredTexts(PROMPTS, ["a"] * N, [0.0], np.zeros(N)), side(0, 0))
    with pytest.raises(ValueError, match="finite"):
        over_optimisation_report(side(0, 0), side(0, np.nan))
