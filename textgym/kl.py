"""The KL penalty's numbers: estimators from samples, and what moves the coefficient β.

With `d = log π(a|s) − log π_ref(a|s)` for an action sampled from π, each of k1, k2, k3 estimates KL(π ‖ π_ref) at that state (k2 only
near π = π_ref). The names are those of the field (http://joschu.net/blog/kl-approx.html). Only k1 shapes a reward: with k2 or k3 in the
reward another policy than π_ref exp(r/β)/Z is optimal, which is why `textgym.wrappers.KLShaping` has no option for it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Schedule: TypeAlias = Callable[[float], float]
"""A coefficient as a function of the remaining progress, 1 at the start of learning and 0 at its end (Stable-Baselines3's form)."""

MAX_RELATIVE_ERROR = 0.2
"""The relative error of the KL is clipped to ± this in each update of the adaptive controller (Ziegler et al. 2019, section 2.2)."""


def k1(log_ratio: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Returns `d`: unbiased for KL(π ‖ π_ref), of either sign, of high variance.

    Args:
        log_ratio: d = log π(a|s) − log π_ref(a|s) in nats, any shape.
    """
    return np.array(log_ratio, dtype=np.float64)


def k2(log_ratio: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Returns `d²/2`: non-negative, of low variance, biased (second order in π − π_ref).

    Args:
        log_ratio: d = log π(a|s) − log π_ref(a|s) in nats, any shape.
    """
    return 0.5 * np.square(np.asarray(log_ratio, dtype=np.float64))


def k3(log_ratio: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Returns `e^(−d) − 1 + d`: non-negative, and unbiased for KL(π ‖ π_ref) where π gives every token of π_ref some probability.

    Args:
        log_ratio: d = log π(a|s) − log π_ref(a|s) in nats, any shape.
    """
    d = np.asarray(log_ratio, dtype=np.float64)
    # expm1 keeps the digits that exp(-d) - 1 loses for small d; the rest is rounding below zero.
    return np.maximum(np.expm1(-d) + d, 0.0)


@dataclass(frozen=True)
class LinearSchedule:
    """A coefficient that goes in a straight line from `start` to `end` over the whole of learning.

    Attributes:
        start: value at the beginning (remaining progress 1).
        end: value at the end (remaining progress 0).
    """

    start: float
    end: float = 0.0

    def __call__(self, progress_remaining: float) -> float:
        """Returns the value at `progress_remaining`, 1 at the start and 0 at the end of learning."""
        return self.end + progress_remaining * (self.start - self.end)


class AdaptiveKLController:
    """Moves β so that the KL of whole sequences approaches a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

        β ← β · (1 + K · clip(KL/target − 1, −0.2, 0.2)),   K = n / horizon

    It moves between rollouts only: whoever trains calls `update` with what the last rollout measured.

    Args:
        beta: β at the start, reward per nat, positive.
        target: the KL to hold, in nats per sequence, positive.
        horizon: episodes in which an error of 20 % or more changes β by about 20 %, positive.
    """

    def __init__(self, beta: float, target: float, horizon: float) -> None:
        for name, value in (("beta", beta), ("target", target), ("horizon", horizon)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` of an adaptive KL controller must be positive and finite, got {value}.")
        self.target = float(target)
        self.horizon = float(horizon)
        self._value = float(beta)

    @property
    def value(self) -> float:
        """β now."""
        return self._value

    def update(self, kl: float, n: int) -> float:
        """Moves β after `n` episodes whose mean KL was `kl`, and returns it.

        Args:
            kl: mean over episodes of the summed k1, in nats per sequence.
            n: how many episodes that mean is over.

        Raises:
            ValueError: `kl` is not finite, or `n` is not positive, or so large (5 × horizon) that β could reach zero.
        """
        if not math.isfinite(kl):
            raise ValueError(f"`kl` must be finite, got {kl}. A NaN here means that a log-probability was NaN.")
        if not 0 < n * MAX_RELATIVE_ERROR < self.horizon:
            raise ValueError(
                f"`n` must be positive and less than 5 times the horizon ({self.horizon:g} episodes), or one update could make β zero "
                f"or negative; got {n}. Choose a longer horizon."
            )
        error = min(max(kl / self.target - 1.0, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self._value *= 1.0 + n / self.horizon * error
        return self._value

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as JSON types."""
        return {"value": self._value, "target": self.target, "horizon": self.horizon}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        restored = AdaptiveKLController(state["value"], state["target"], state["horizon"])
        self._value, self.target, self.horizon = restored.value, restored.target, restored.horizon

    def __repr__(self) -> str:
        return f"AdaptiveKLController(beta={self._value:g}, target={self.target:g}, horizon={self.horizon:g})"


class KLCoefficient:
    """β of whichever kind the user gave: a number, a schedule or an adaptive controller.

    Args:
        beta: reward per nat. A finite number ≥ 0, a schedule (a callable of the remaining progress), or an `AdaptiveKLController`.
    """

    def __init__(self, beta: "float | Schedule | AdaptiveKLController") -> None:
        self.controller = beta if isinstance(beta, AdaptiveKLController) else None
        self.schedule: Schedule | None = None
        self._value = 0.0
        if self.controller is not None:
            return
        if callable(beta):
            self.schedule = beta
            self.set_progress(1.0)
        else:
            self._value = checked_beta(beta)

    @property
    def value(self) -> float:
        """β now."""
        return self._value if self.controller is None else self.controller.value

    def set_progress(self, progress_remaining: float) -> None:
        """Moves a schedule to `progress_remaining` (1 at the start of learning, 0 at its end); other kinds of β ignore it."""
        if self.schedule is not None:
            self._value = checked_beta(self.schedule(progress_remaining))


def checked_beta(beta: Any) -> float:
    """Returns β as a float.

    Raises:
        ValueError: it is not a finite number ≥ 0.
    """
    try:
        value = float(beta)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(
            "`beta` must be a finite number of at least 0, a schedule (a callable of the remaining progress) that returns one, or an "
            f"`AdaptiveKLController`, got {beta!r}."
        )
    return value


def best_of_n_kl(n: int) -> float:
    """Returns log n − (n − 1)/n, the KL in nats of best-of-n sampling to the policy that is sampled from, at most.

    Equal to it where the reward is continuous, so that no two samples tie; for discrete rewards the KL is lower (Beirami et al. 2024,
    arXiv:2401.01879, theorem 1). `textgym.exact.best_of_n` has the distribution itself.

    Args:
        n: samples of which the best is kept, at least 1.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    return math.log(n) - (n - 1) / n
