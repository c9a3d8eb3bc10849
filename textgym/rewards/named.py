"""Rewards by name: `"rouge-l"`, or with options as in the address of a web page, `"rouge-l?stemmer=true&column=summary"`."""

import difflib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import unquote

from textgym.rewards.bert_score import BertScoreReward
from textgym.rewards.bundled import bundled_names, bundled_reward
from textgym.rewards.calling import RewardFunction
from textgym.rewards.classifier import ClassifierReward
from textgym.rewards.json_validity import JsonReward
from textgym.rewards.numeric import NumericReward
from textgym.rewards.overlap import BleuReward, ChrfReward, NgramPrecisionReward, RougeReward
from textgym.rewards.simple import ExactMatchReward, LengthReward, LexiconReward, RegexReward, RepetitionPenalty

_MAKERS: dict[str, Callable[..., Any]] = {
    "bleu": BleuReward,
    "chrf": ChrfReward,
    "ngram-precision": NgramPrecisionReward,
    "rouge-1": partial(RougeReward, "rouge1"),
    "rouge-2": partial(RougeReward, "rouge2"),
    "rouge-l": partial(RougeReward, "rougeL"),
    "rouge-lsum": partial(RougeReward, "rougeLsum"),
    "bert-score": BertScoreReward,
    "classifier": ClassifierReward,
    "lexicon": LexiconReward.from_file,
    "exact-match": ExactMatchReward,
    "numeric": NumericReward,
    "regex": RegexReward,
    "json": JsonReward,
    "length": LengthReward,
    "repetition": RepetitionPenalty,
}
_EXAMPLE = "'rouge-l?stemmer=true&column=summary'"


def reward_names() -> tuple[str, ...]:
    """Returns the names that `make_reward` knows, those of the bundled rewards first."""
    return (*bundled_names(), *_MAKERS)


def canonical_name(name: str) -> str | None:
    """Returns the name that `name` stands for (upper case, `_` and missing dashes do not matter), or None if it is no reward's."""
    plain = _plain(name)
    return next((known for known in reward_names() if _plain(known) == plain), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def make_reward(name: str, **options: Any) -> RewardFunction:
    """Makes a reward of its name.

    Args:
        name: one of `reward_names()`; behind a `?` it may have options, `name=value` with `&` between them. In such a string numbers,
            `true`, `false` and `null` are read as what the option takes, lists as values with commas between them, and `%26` stands
            for `&`.
        **options: arguments of the reward's class, such as `smoothing="floor"`; they go before those in the string.

    Returns:
        The reward, with its name as `__name__`.

    Raises:
        ValueError: there is no such reward, or it has no such option; the message lists what there is.
        ImportError: the reward needs a package of the extra `metrics` that is not installed.
    """
    short, mark, query = name.partition("?")
    found = canonical_name(short)
    if found is None:
        close = difflib.get_close_matches(short.lower(), reward_names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"`name` must be that of a reward, got {name!r}.{hint} There are: {', '.join(reward_names())}; "
            f"options go behind a question mark: {_EXAMPLE}."
        )
    maker = _MAKERS.get(found, partial(bundled_reward, found))
    options = {**(_read_options(found, maker, query) if mark else {}), **options}
    _check_options(found, maker, options)
    reward: RewardFunction = maker(**options)
    if found in _MAKERS:
        reward.__name__ = found
    return reward


def reward_options(name: str) -> tuple[str, ...]:
    """Returns the names of the options of a reward."""
    return tuple(_parameters(_MAKERS.get(name, partial(bundled_reward, name))))


def _parameters(maker: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(maker).parameters


def _check_options(name: str, maker: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for an option that the reward does not have, and for one that it needs."""
    parameters = _parameters(maker)
    for option in options:
        if option not in parameters:
            close = difflib.get_close_matches(option, parameters, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            known = f"It has: {', '.join(parameters)}." if parameters else "It has none."
            raise ValueError(f"reward {name!r} has no option `{option}`.{hint} {known}")
    needed = [key for key, one in parameters.items() if one.default is one.empty and key not in options]
    if needed:
        raise ValueError(f"reward {name!r} needs `{needed[0]}`: '{name}?{needed[0]}=...', or make_reward({name!r}, {needed[0]}=...).")


def _read_options(name: str, maker: Callable[..., Any], query: str) -> dict[str, Any]:
    """Returns the options in the string form, converted to what the reward's class says that they are."""
    function: Any = maker.func if isinstance(maker, partial) else maker
    hints = get_type_hints(getattr(function, "__init__") if isinstance(function, type) else function)  # noqa: B009  (mypy)
    options: dict[str, Any] = {}
    for pair in query.split("&"):
        key, mark, text = pair.partition("=")
        if not mark or not key:
            raise ValueError(
                f"reward {name!r}: options must have the form `name=value` with `&` between them, as {_EXAMPLE}, got {pair!r}."
            )
        options[key] = _converted(f"reward {name!r}: `{key}`", unquote(text), hints.get(key, str))
    return options


def _converted(what: str, text: str, hint: Any) -> Any:
    """Returns the value that `text` stands for where something of type `hint` is wanted."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in kinds and text == "null":
        return None
    for kind, read in ((bool, _boolean), (int, int), (float, float)):
        if kind in kinds:
            try:
                return read(text)
            except ValueError:
                continue
    if any(kind in (str, Any) or get_origin(kind) is Literal for kind in kinds):
        return text
    if any(get_origin(kind) is Sequence for kind in kinds):
        return text.split(",")
    raise ValueError(f"{what} must be {' or '.join(getattr(kind, '__name__', str(kind)) for kind in kinds)}, got {text!r}.")


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"
