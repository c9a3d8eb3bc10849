"""Numbers that change during training: SB3's schedules, functions of the progress remaining (1 at the start, 0 at the end)."""

from typing import Any

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from textgym.agents.common.checks import check_number


def as_schedule(name: str, value: float | Schedule) -> FloatSchedule:
    """Returns a number of at least 0, or a function of the progress remaining, as a schedule.

    Raises:
        ValueError: `value` is neither; the message calls it `name`.
    """
    if not callable(value):
        try:
            check_number(name, value, 0)
        except ValueError as error:
            raise ValueError(f"{error} A function of the progress remaining (1 → 0) is taken too.") from None
    return FloatSchedule(value)


def schedule_to_json(value: Any) -> Any:
    """Returns a JSON form of a number or of one of SB3's own schedules, or None for any other function."""
    if isinstance(value, FloatSchedule):
        return schedule_to_json(value.value_schedule)
    if isinstance(value, ConstantSchedule):
        return value.val
    if isinstance(value, LinearSchedule):
        return {"linear": [value.start, value.end, value.end_fraction]}
    return None if callable(value) else value


def schedule_from_json(value: Any) -> Any:
    """Returns what `schedule_to_json` was given."""
    if isinstance(value, dict) and "linear" in value:
        return LinearSchedule(*value["linear"])
    return value
