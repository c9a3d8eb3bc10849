"""How a reward function is called (TRL's form: by keyword, whole batches) and how what it returns is checked."""

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from textgym.errors import RewardError
from textgym.rewards.episodes import EpisodeBatch, describe_row, excerpt

RewardFunction: TypeAlias = Callable[..., Any]
Float64Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Parameters:
    """What a function wants to be given.

    Attributes:
        required: names without a default.
        optional: names with a default.
        takes_all: it has `**kwargs`, or its signature cannot be read: it is given everything.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_all: bool

    def select(self, available: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Returns the part of `available` that the function wants; a required name that is not there is a `RewardError`."""
        for wanted in self.required:
            if wanted not in available:
                raise RewardError(_missing_column(name, wanted, available))
        if self.takes_all:
            return dict(available)
        return {key: available[key] for key in (*self.required, *self.optional) if key in available}


class Arguments(Mapping[str, Any]):
    """What a reward function can ask for, by name; texts are decoded only when a function takes them.

    Args:
        batch: the completions to score.
        further: what this kind of call has besides (the segments; trainer state and the log functions).
    """

    def __init__(self, batch: EpisodeBatch, further: Mapping[str, Any]) -> None:
        self._batch = batch
        self._values = {**batch.columns, **further}

    def __getitem__(self, name: str) -> Any:
        return getattr(self._batch, name) if name in _BATCH_ARGUMENTS else self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*_BATCH_ARGUMENTS, *self._values))

    def __len__(self) -> int:
        return len(_BATCH_ARGUMENTS) + len(self._values)


_BATCH_ARGUMENTS = ("prompts", "completions", "completion_ids")


def _missing_column(name: str, wanted: str, available: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(wanted, available, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return (
        f"reward `{name}` asks for `{wanted}`, which is not a column of the prompts.{hint} "
        f"A reward can ask for: {', '.join(available)}; give `{wanted}` a default value or add the column to the prompts."
    )


class NamedReward:
    """Base of rewards that are objects: the name they go by in `info`, in logs and in TRL is that of their class until it is set."""

    @property
    def __name__(self) -> str:
        return str(self.__dict__.get("__name__", type(self).__name__))

    @__name__.setter
    def __name__(self, name: str) -> None:
        self.__dict__["__name__"] = name


def read_parameters(function: RewardFunction, name: str) -> Parameters:
    """Reads the parameters of a reward function; one that is positional-only cannot be given by keyword: a `ValueError`."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have none
        return Parameters((), (), takes_all=True)
    required, optional, takes_all = [], [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_all = True
        elif parameter.kind is parameter.VAR_POSITIONAL:
            continue
        elif parameter.default is not parameter.empty:
            optional.append(parameter.name)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"reward `{name}`: parameter `{parameter.name}` is positional-only, but rewards are called by keyword; "
                f"write a function `def {name}(completions, **kwargs)`."
            )
        else:
            required.append(parameter.name)
    return Parameters(tuple(required), tuple(optional), takes_all)


def function_name(function: object) -> str:
    """Returns the name that a reward goes by in `info` and logs: that of the function, the wrapped function or the class."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        name = type(function).__name__
    return "lambda_reward" if name == "<lambda>" else name


def unique_names(names: Sequence[str]) -> list[str]:
    """Returns `names` with `_2`, `_3`, ... appended to those that stood earlier in the list."""
    result: list[str] = []
    for name in names:
        candidate, count = name, 1
        while candidate in result or (count > 1 and candidate in names):
            count += 1
            candidate = f"{name}_{count}"
        result.append(candidate)
    return result


def as_list(result: object, name: str, what: str = "one number (or None) per completion") -> list[Any]:
    """Returns what a reward returned as a list, or raises a `RewardError` when it is not a list, tuple, array or tensor."""
    if isinstance(result, list | tuple):
        return list(result)
    # numpy arrays and torch tensors; found by duck typing because torch may not be imported here
    if hasattr(result, "tolist") and getattr(result, "ndim", 0) >= 1:
        values: list[Any] = result.tolist()
        return values
    raise RewardError(f"reward `{name}` returned {type(result).__name__} {excerpt(result)}; it must return a list with {what}.")


def as_number(value: object, name: str, where: Callable[[], str]) -> float:
    """Returns `value` as a finite float; None becomes NaN; anything else is a `RewardError` that says `where()` it stood."""
    if value is None:
        return math.nan
    if getattr(value, "ndim", None) == 0:  # a 0-d array or tensor
        value = value.item()  # type: ignore[attr-defined]
    if not isinstance(value, numbers.Real):
        raise RewardError(
            f"reward `{name}` returned {type(value).__name__} {excerpt(value)} for {where()}; "
            "each value must be one finite number, or None where this reward does not apply."
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(
            f"reward `{name}` returned {number} for {where()}; each value must be finite: return None where this reward does not apply."
        )
    return number


def check_count(values: Sequence[object], name: str, batch: EpisodeBatch) -> None:
    """Raises a `RewardError` unless there is one value per row."""
    if len(values) != len(batch):
        first = f", the first of which is {describe_row(batch, 0)}" if len(batch) else ""
        raise RewardError(
            f"reward `{name}` returned {len(values)} values for {len(batch)} completions{first}; "
            "it must return one per completion, in their order, with None where it does not apply."
        )


def as_scores(result: object, name: str, batch: EpisodeBatch) -> Float64Array:
    """Returns the scores of a reward, (N,) float64 with NaN for None, after checking type, count and finiteness."""
    values = as_list(result, name)
    check_count(values, name, batch)
    if all(type(value) is float for value in values):  # the usual case, without a check per row
        scores = np.array(values, dtype=np.float64)
        if np.isfinite(scores).all():
            return scores
    # the row is described (and its text decoded) only when an error message needs it
    return np.array([as_number(value, name, partial(describe_row, batch, row)) for row, value in enumerate(values)], dtype=np.float64)
