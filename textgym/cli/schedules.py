"""Numbers that may change during training, as they are typed: `0.2`, `linear:0.2:0`, `constant:0.2`, and of β `adaptive:6`."""

import math
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from textgym.cli.errors import UserError

if TYPE_CHECKING:
    from stable_baselines3.common.type_aliases import Schedule

    from textgym.kl import AdaptiveKLController

Number: TypeAlias = float | str  # a number, or a schedule as it was typed
FORMS = "linear:START:END or constant:VALUE"
ADAPTIVE = "adaptive:TARGET[:INITIAL[:HORIZON]]"
ITERATIONS = 10  # of which the completions are the horizon of an adaptive β where none is given
_KINDS = {"linear": (2, 2), "constant": (1, 1), "adaptive": (1, 3)}


def read_number(name: str, text: str | None, *, adaptive: bool = False) -> Number | None:
    """Returns what an option was given: a number as such, a schedule as its text, None as it is.

    Args:
        name: of the option, with its dashes.
        text: what was typed.
        adaptive: a controller can be given too.

    Raises:
        UserError: it is none of these.
    """
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        kind, values = _parts(text)
    forms = f"a number, {FORMS}" + (f" or {ADAPTIVE} (nats per completion)" if adaptive else "")
    least, most = _KINDS.get(kind, (1, 0))
    if not least <= len(values) <= most or (kind == "adaptive" and not adaptive):
        raise UserError(f"{name} must be {forms}, not {text!r}.")
    if not all(math.isfinite(value) and (value > 0 or kind != "adaptive") and value >= 0 for value in values):
        rule = "above 0" if kind == "adaptive" else "0 or above"
        raise UserError(f"{name} {text}: its numbers must be {rule}.")
    return text


def _parts(text: str) -> tuple[str, list[float]]:
    kind, *rest = text.split(":")
    try:
        return kind, [float(one) for one in rest]
    except ValueError:
        return "", []


def is_schedule(value: Any) -> bool:
    """Whether a value is the text of a schedule, adaptive ones included."""
    return isinstance(value, str) and value.partition(":")[0] in _KINDS and ":" in value


def schedule(value: Number) -> "float | Schedule":
    """Returns a number, or what changes it with the progress of the training, out of what `read_number` returned."""
    from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule

    if not isinstance(value, str):
        return value
    kind, numbers = _parts(value)
    return LinearSchedule(numbers[0], numbers[1], 1.0) if kind == "linear" else ConstantSchedule(numbers[0])


def kl_coefficient(value: Number, initial: float, completions: int) -> "float | Schedule | AdaptiveKLController":
    """Returns β out of what `read_number` returned.

    Args:
        value: what was given.
        initial: β at the start of an adaptive one that does not say it.
        completions: of an iteration; of `ITERATIONS` of them is the horizon of one that does not say it.
    """
    from textgym.kl import MAX_RELATIVE_ERROR, AdaptiveKLController

    if not isinstance(value, str) or not value.startswith("adaptive"):
        return schedule(value)
    target, *further = _parts(value)[1]
    start, horizon = [*further, *[initial, float(ITERATIONS * completions)][len(further) :]]
    if completions * MAX_RELATIVE_ERROR >= horizon:
        raise UserError(
            f"--beta {value}: the horizon must be more than {completions * MAX_RELATIVE_ERROR:g} completions, a fifth of an iteration, or "
            "one iteration could make beta zero."
        )
    return AdaptiveKLController(start, target, horizon)


def told(value: Number) -> str:
    """Returns a number or a schedule as it is typed."""
    return value if isinstance(value, str) else f"{value:g}"


def with_schedules(options: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `--set` with schedules in place of their texts, where an argument takes one.

    Args:
        options: the arguments.
        types: of the arguments of the algorithm, by name.

    Raises:
        UserError: an argument takes none, or its schedule cannot be read.
    """
    from stable_baselines3.common.type_aliases import Schedule

    found = dict(options)
    for name, value in options.items():
        if not is_schedule(value):
            continue
        if Schedule not in get_args(types[name]):
            raise UserError(f"--set {name}={value}: this argument does not change during training; give one value.")
        read = read_number(f"--set {name}", value)
        assert read is not None
        found[name] = schedule(read)
    return found
