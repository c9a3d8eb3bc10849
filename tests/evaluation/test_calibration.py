"""Calibration on numbers worked out by hand."""

import math

import numpy as np
import pytest

from textgym.evaluation.bootstrap import bootstrap_cluster_mean
from textgym.evaluation.calibration import area_under_roc, expected_calibration_error, log_loss, reliability_table, sigmoid
from textgym.evaluation.reward_model_report import Decisions, RewardModelReport, best_direction


def test_log_loss_by_hand() -> None:
    assert log_loss([0.0, 0.0], [1.0, 0.3]) == pytest.approx(math.log(2))
    assert log_loss([2.0, -1.0], [1.0, 0.25], weights=[3, 1]) == pytest.approx(
        (3 * math.log(1 + math.exp(-2)) + 0.25 * math.log(1 + math.exp(1)) + 0.75 * math.log(1 + math.exp(-1))) / 4
    )
    assert log_loss([-1000.0], [1.0]) == 1000.0


def test_reliability_table_and_error_by_hand() -> None:
    table = reliability_table([0.1, 0.2, 0.6, 1.0, 0.5], [0, 1, 1, 1, 0], num_bins=2)
    assert [one.weight for one in table] == [2, 3]
    assert (table[0].stated, table[0].observed) == (pytest.approx(0.15), 0.5)
    assert (table[1].stated, table[1].observed) == (pytest.approx(0.7), pytest.approx(2 / 3))
    assert expected_calibration_error(table) == pytest.approx(2 / 5 * 0.35 + 3 / 5 * (0.7 - 2 / 3))


def test_weights_and_empty_intervals() -> None:
    table = reliability_table([0.9, 0.95], [1, 0], weights=[3, 1], num_bins=10, low=0.5)
    assert [one.weight for one in table] == [0] * 8 + [3, 1]
    assert math.isnan(table[0].stated)
    assert expected_calibration_error(table) == pytest.approx((3 * 0.1 + 0.95) / 4)
    with pytest.raises(ValueError, match=r"`probabilities` must lie in \[0.5, 1\], got 0.3"):
        reliability_table([0.3], [1], low=0.5)


def test_area_under_roc_by_hand() -> None:
    # Of the pairs (2, 1), (2, 3), (4, 1), (4, 3), (3, 1), (3, 3) four are in the right order and one is a tie.
    assert area_under_roc([2, 4, 3, 1, 3], [1, 1, 1, 0, 0]) == pytest.approx(4.5 / 6)
    assert area_under_roc([2, 4, 3, 1, 3], [1, 1, 1, 0, 0], weights=[2, 1, 1, 1, 0]) == 1.0
    assert area_under_roc([1, 1, 1], [1, 0, 1]) == 0.5
    assert area_under_roc([0.0, 1.0], [0.25, 0.75]) == pytest.approx(0.75 * 0.75 + 0.5 * 2 * 0.25 * 0.75)
    assert math.isnan(area_under_roc([1, 2], [1, 1])) and math.isnan(area_under_roc([], []))


def test_means_of_nothing_are_nan() -> None:
    assert math.isnan(log_loss([], [])) and math.isnan(log_loss([1.0], [1.0], weights=[0.0]))


def test_calibrated_probabilities_have_a_small_error() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2, size=20_000)
    outcomes = rng.random(20_000) < sigmoid(logits)
    assert expected_calibration_error(reliability_table(sigmoid(logits), outcomes)) < 0.02
    assert expected_calibration_error(reliability_table(sigmoid(3 * logits), outcomes)) > 0.08


def test_the_interval_draws_whole_clusters() -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2, 50).astype(float)
    single = bootstrap_cluster_mean(values, list(range(50)))
    assert single.low < single.mean == values.mean() < single.high
    assert single.high - single.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(50), rel=0.15)
    # Ten copies of each say no more; taken for independent they would seem to say √10 times as much.
    copies = bootstrap_cluster_mean(np.repeat(values, 10), np.repeat(np.arange(50), 10).tolist())
    assert copies.high - copies.low == pytest.approx(single.high - single.low, rel=0.1)
    weighted = bootstrap_cluster_mean([1.0, 0.0], ["a", "b"], weights=[3, 1])
    assert weighted.mean == 0.75


def test_a_report_by_hand() -> None:
    decisions = Decisions(
        differences=np.array([2.0, -1.0, 0.0, 0.5]),
        outcomes=np.array([1.0, 1.0, 1.0, 0.5]),
        weights=np.ones(4),
        length_differences=np.array([3.0, -2.0, 1.0, 1.0]),
        clusters=["a", "b", "c", "d"],
    )
    report = RewardModelReport.of(decisions, np.array([1.0, 3.0]), num_records=4, loss=0.5, longer_wins=True)
    assert report.accuracy.mean == (1 + 0 + 0.5 + 0.5) / 4
    assert report.length_accuracy.mean == (1 + 0 + 1 + 0.5) / 4
    assert (report.reward_mean, report.reward_std) == (2.0, 1.0)
    losses = [
        math.log(1 + math.exp(-2)),
        math.log(1 + math.e),
        math.log(2),
        0.5 * (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.5))),
    ]
    assert report.log_loss == pytest.approx(sum(losses) / 4)
    # σ(2) = .88 right, σ(1) = .73 wrong, σ(0) = .5 "right" (the side of a tie is the first), σ(.5) = .62 half right
    by_hand = [(0.5, 1.0), (0.6225, 0.5), (0.7311, 0.0), (0.8808, 1.0)]
    assert report.expected_calibration_error == pytest.approx(sum(abs(stated - seen) for stated, seen in by_hand) / 4, abs=1e-3)
    assert "accuracy           50.0%" in str(report) and "longer wins" in str(report)
    assert report.to_dict()["reliability"][4] == {"low": 0.9, "high": 1.0, "weight": 0.0, "stated": None, "observed": None}
    assert best_direction(decisions)
    assert not best_direction(decisions._replace(length_differences=-decisions.length_differences))
