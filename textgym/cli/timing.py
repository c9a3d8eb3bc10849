"""Measuring speed: candidates that take turns, and how much work is done per second."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping

import torch


def alternate(
    candidates: Mapping[str, Callable[[], float]], repeats: int, once: Collection[str] = (), measured: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Returns the median of what each candidate measures, see `per_second`, over some rounds; a first one, which warms up, does not count.

    They take turns, so that a slow moment hits all of them.

    Args:
        candidates: functions that measure, by name.
        repeats: rounds that count.
        once: names of those so slow that one measured round is enough.
        measured: called after each measurement.
    """
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, measure in candidates.items():
            if name in once and repeat > 1:
                continue
            value = measure()
            measured()
            if repeat:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def per_second(work: Callable[[], float | None], device: torch.device | str = "cpu") -> Callable[[], float]:
    """Returns a function that does some work and returns how much of it was done per second: what `work` returns, or 1 for a call of it.

    On an accelerator the clock stops when all that was asked of the device is done.
    """
    device = torch.device(device)

    def measure() -> float:
        start = time.perf_counter()
        amount = work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return (1.0 if amount is None else amount) / (time.perf_counter() - start)

    return measure
