"""Checks of numeric arguments: an error names the argument, the rule and the value."""

from typing import Any


def check_number(name: str, value: Any, low: float | None = None, high: float | None = None, *, above: bool = False) -> None:
    """Raises a `ValueError` unless `value` is a number in [low, high] (with `above`, in (low, high]).

    Args:
        name: of the argument.
        value: what was given.
        low: smallest value allowed; None for no bound.
        high: largest value allowed; None for no bound.
        above: `low` itself is not allowed.
    """
    bounds = [
        None if low is None else f"{'above' if above else 'at least'} {low}",
        None if high is None else f"at most {high}",
    ]
    rule = " and ".join(bound for bound in bounds if bound is not None)
    number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    in_range = number and (low is None or value > low or (value == low and not above)) and (high is None or value <= high)
    if not in_range:
        raise ValueError(f"`{name}` must be a number{' ' if rule else ''}{rule}, got {value!r}.")


def check_count(name: str, value: Any, unit: str) -> None:
    """Raises a `ValueError` unless `value` is a whole number of at least 1, counting `unit`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of {unit}, at least 1, got {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises a `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_generations(value: Any, algorithm: str) -> None:
    """Raises a `ValueError` unless `value`, the completions per prompt, is a whole number of at least 2."""
    check_count("num_generations", value, "completions")
    if value < 2:
        raise ValueError(
            f"`num_generations` must be at least 2 for {algorithm}, which compares the completions of a prompt, got {value}. "
            "The number of environments must be a multiple of it."
        )
