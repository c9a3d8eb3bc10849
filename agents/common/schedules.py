"""Numbers that change during training: SB3's schedules, functions of the progress remaining (1 at the start, 0 at the end)."""

from typing import Any

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule


def as_schedule(name: str, value: float | Schedule) -> FloatSchedule:
    """Returns a number or a function of the progress remaining as a schedule.

    Raises:
        ValueError: `value` is neither; the message calls it `name`.
    """
    if isinstance(value, bool) or not (isinstance(value, int | float) or callable(value)):
        raise ValueError(f"`{name}` must be a number or a function of the progress remaining (1 → 0), got {value!r}.")
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
