"""The numbers of the KL penalty: estimators against enumeration, β against hand-computed updates."""

import math
from typing import Any

import numpy as np
import pytest

from textgym.kl import AdaptiveKLController, KLCoefficient, LinearSchedule, k1, k2, k3


def test_estimators_by_hand() -> None:
    d = np.array([0.0, 0.5, -0.5, 2.0])
    np.testing.assert_allclose(k1(d), [0.0, 0.5, -0.5, 2.0])
    np.testing.assert_allclose(k2(d), [0.0, 0.125, 0.125, 2.0])
    np.testing.assert_allclose(k3(d), [0.0, math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5, math.exp(-2.0) + 1.0])


def test_k1_and_k3_are_unbiased_and_the_exact_kl_is_k1s_expectation(tabular_policy: Any) -> None:
    policy, reference = tabular_policy(1), tabular_policy(2)
    for prefix in ([3], [3, 4], [7, 7, 7]):
        log_p, log_q = policy.distribution(prefix), reference.distribution(prefix)
        p, d = np.exp(log_p), log_p - log_q
        exact = np.sum(p * d)
        assert np.sum(p * k1(d)) == pytest.approx(exact)
        assert np.sum(p * k3(d)) == pytest.approx(exact)
        assert abs(np.sum(p * k2(d)) - exact) > 0.01, "k2 is biased away from π = π_ref; if it is not, this test tells nothing"


def test_k2_and_k3_are_non_negative_and_agree_near_zero() -> None:
    d = np.concatenate([np.linspace(-30, 30, 2001), [1e-9, -1e-9, 1e-12]])
    assert (k2(d) >= 0).all() and (k3(d) >= 0).all()
    small = np.array([1e-4, -1e-4])
    np.testing.assert_allclose(k3(small), k2(small), rtol=1e-3)


def test_adaptive_controller_by_hand() -> None:
    # n / horizon = 0.1; relative errors 9/6 - 1 = 0.5 and 3/6 - 1 = -0.5 are clipped to ±0.2, 6.6/6 - 1 = 0.1 is not.
    controller = AdaptiveKLController(0.15, target=6.0, horizon=1000)
    assert controller.update(9.0, 100) == pytest.approx(0.15 * 1.02)
    assert controller.update(3.0, 100) == pytest.approx(0.15 * 1.02 * 0.98)
    assert controller.update(6.6, 50) == pytest.approx(0.15 * 1.02 * 0.98 * 1.005)
    assert controller.update(6.0, 100) == controller.value == pytest.approx(0.15 * 1.02 * 0.98 * 1.005)


def test_adaptive_controller_resumes() -> None:
    one, other = AdaptiveKLController(0.1, 6.0, 100), AdaptiveKLController(0.5, 1.0, 7)
    one.update(20.0, 10)
    other.load_state_dict(one.state_dict())
    assert other.update(1.0, 10) == one.update(1.0, 10)


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"beta": -1.0}, {"target": 0.0}, {"horizon": math.inf}, {"beta": math.nan}])
def test_adaptive_controller_refuses(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}`"):
        AdaptiveKLController(**{"beta": 0.1, "target": 6.0, "horizon": 100, **bad})


def test_adaptive_controller_refuses_updates_that_could_kill_beta() -> None:
    controller = AdaptiveKLController(0.1, 6.0, 100)
    for n in (0, -5, 500):
        with pytest.raises(ValueError, match="`n`"):
            controller.update(1.0, n)
    with pytest.raises(ValueError, match="`kl`"):
        controller.update(math.nan, 10)
    assert controller.value == 0.1
    controller.update(0.0, 499)
    assert controller.value > 0


def test_schedules() -> None:
    coefficient = KLCoefficient(LinearSchedule(0.2, 0.1))
    assert coefficient.value == 0.2
    coefficient.set_progress(0.25)
    assert coefficient.value == pytest.approx(0.125)
    constant = KLCoefficient(0.3)
    constant.set_progress(0.0)
    assert constant.value == 0.3


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf, "much", None, lambda progress: -progress])
def test_bad_betas(beta: Any) -> None:
    with pytest.raises(ValueError, match="`beta`"):
        KLCoefficient(beta)
