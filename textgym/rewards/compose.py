"""One reward out of many: `RewardSet` calls each part in TRL's form, checks what it returns and adds the parts up with their weights."""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from inspect import isawaitable
from typing import Any, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from textgym.errors import RewardError
from textgym.pending import Pending
from textgym.rewards import event_loop
from textgym.rewards.calling import (
    Arguments,
    Float64Array,
    Parameters,
    RewardFunction,
    as_scores,
    read_parameters,
    unique_names,
)
from textgym.rewards.dense import DenseKind, Segment, Segmentation, SegmentLevel, dense_kind, segment_batch
from textgym.rewards.episodes import EpisodeBatch, describe_row
from textgym.rewards.payers import Payer, pay_tokens, segment_payer
from textgym.rewards.resolve import listed_rewards, loaded_reward, resolve_reward

__all__ = ["EpisodeBatch", "RewardSet"]

BoolArray: TypeAlias = npt.NDArray[np.bool_]
T = TypeVar("T")
_KEPT_LOGS = 10_000  # values kept per name between two `drain_logs`, should nobody drain


@dataclass
class _Part:
    """One reward function of the set, and how often it was called."""

    name: str
    function: RewardFunction
    weight: float
    parameters: Parameters
    kind: DenseKind | None
    segmentation: Segmentation | None = None
    calls: int = 0
    rows: int = 0

    @classmethod
    def of(cls, name: str, function: RewardFunction, weight: float) -> Self:
        kind = dense_kind(function)
        segmentation = Segmentation(kind.segmenter) if isinstance(kind, SegmentLevel) else None
        return cls(name, function, float(weight), read_parameters(function, name), kind, segmentation)


@dataclass
class _Logs:
    """What reward functions gave to `log_extra` and `log_metric` (its bound methods)."""

    extra: dict[str, deque[Any]] = field(default_factory=lambda: defaultdict(_bounded))
    metrics: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(_bounded))

    def log_extra(self, name: str, values: Sequence[Any]) -> None:
        """TRL's `log_extra`: one value per completion, for a table of samples."""
        self.extra[name].extend(values)

    def log_metric(self, name: str, value: float) -> None:
        """TRL's `log_metric`: one number per call, averaged."""
        self.metrics[name].append(float(value))

    def take_in(self, other: "_Logs") -> None:
        """Adds what another one holds."""
        for name, values in other.extra.items():
            self.extra[name].extend(values)
        for name, numbers in other.metrics.items():
            self.metrics[name].extend(numbers)


def _bounded() -> deque[Any]:
    return deque(maxlen=_KEPT_LOGS)


_Request: TypeAlias = tuple[_Part, EpisodeBatch, dict[str, list[Any]]]
Scores: TypeAlias = tuple[Float64Array, dict[str, Float64Array]]
TokenScores: TypeAlias = tuple[list[Float64Array], dict[str, list[Float64Array]]]


class RewardSet:
    """Named reward functions with weights, called once per batch of completions.

    Build one with `RewardSet.build`. A reward of a finished completion is a *terminal* part, one marked with `token_level` or
    `segment_level` a *dense* part.

    Args:
        names: one distinct name per function.
        functions: the reward functions, in TRL's calling form.
        weights: one finite number per function.

    Attributes:
        trainer_state: handed to functions that name it; None, or whatever object an agent puts there.
    """

    def __init__(self, names: Sequence[str], functions: Sequence[RewardFunction], weights: Sequence[float]) -> None:
        self.trainer_state: Any = None
        self._parts = [_Part.of(*part) for part in zip(names, functions, weights, strict=True)]
        self._terminal = [part for part in self._parts if part.kind is None]
        self._dense = [part for part in self._parts if part.kind is not None]
        self._logs = _Logs()

    @classmethod
    def build(cls, reward: Any, reward_weights: Sequence[float] | None = None, names: Sequence[str] | None = None) -> "RewardSet":
        """Makes a reward set of anything that textgym accepts as a reward.

        Args:
            reward: a function `reward(prompts, completions, completion_ids, **columns) -> list[float | None]` (plain, async, marked as
                dense, a lambda, a partial, a bound method or a callable object); a name of `reward_names()`, with or without options;
                `"module:function"`, which may also name a list; a path or a transformers model of a sequence classifier with one label;
                an object with a method `score` of that calling form; a list or tuple of these, in which a `RewardSet` stands for its
                parts; or a `RewardSet`, which is returned as it is.
            reward_weights: one finite number per reward of a list; 1 each by default.
            names: names of the parts in `info["rewards"]` and in logs, in place of the functions' own.
        """
        reward = loaded_reward(reward)
        if isinstance(reward, RewardSet):
            if reward_weights is not None or names is not None:
                raise ValueError("`reward_weights` and `names` belong to the making of a RewardSet; `reward` is one already.")
            return reward
        rewards = listed_rewards(reward)
        if not rewards:
            raise ValueError("`reward` must not be an empty list; give at least one reward function.")
        given = _checked_weights(reward_weights, len(rewards))
        parts = [part for one, weight in zip(rewards, given, strict=True) for part in _weighted_parts(one, weight)]
        own_names, functions, weights = zip(*parts, strict=True)
        return RewardSet(_checked_names(list(own_names), names), functions, weights)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts."""
        return tuple(part.name for part in self._parts)

    @property
    def parts(self) -> tuple[tuple[str, RewardFunction, float], ...]:
        """Name, function and weight of each part."""
        return tuple((part.name, part.function, part.weight) for part in self._parts)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of the parts, in their order."""
        return tuple(part.weight for part in self._parts)

    def set_weights(self, weights: Sequence[float] | Mapping[str, float]) -> None:
        """Changes the weights, from the next payment on.

        Every environment that shares this set follows, copies in other processes do not. An episode that is under way is paid partly
        with the old weights and partly with the new ones, so change them between episodes: for an agent, between rollouts.

        Args:
            weights: one finite number per part, in their order, or a mapping of names to numbers that leaves the other weights alone.
        """
        if isinstance(weights, Mapping):
            if unknown := [name for name in weights if name not in self.names]:
                raise ValueError(f"`weights` must name parts of the reward, {', '.join(self.names)}, got {unknown[0]!r}.")
            weights = [weights.get(part.name, part.weight) for part in self._parts]
        for part, weight in zip(self._parts, _checked_weights(weights, len(self._parts), "weights"), strict=True):
            part.weight = weight

    def vector(self, parts: Mapping[str, float]) -> Float64Array:
        """Returns named rewards, such as `info["rewards"]`, as a vector (K,) in the order of `names`, 0 for those that are not there.

        `vector(info["rewards"]) @ weights` is the return of a finished episode.
        """
        return np.array([parts.get(name, 0.0) for name in self.names], dtype=np.float64)

    def in_order(self, parts: Mapping[str, T]) -> dict[str, T]:
        """Returns values by name in the order of `names`, those that are there."""
        return {name: parts[name] for name in self.names if name in parts}

    @property
    def has_terminal(self) -> bool:
        """Whether some part scores finished completions."""
        return bool(self._terminal)

    @property
    def has_dense(self) -> bool:
        """Whether some part pays inside a completion."""
        return bool(self._dense)

    @property
    def calls(self) -> int:
        """How often a reward function was called, over all parts."""
        return sum(part.calls for part in self._parts)

    @property
    def rows(self) -> int:
        """How many rows (completions, prefixes or segments) were given to reward functions, over all parts."""
        return sum(part.rows for part in self._parts)

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Calls and rows of each part."""
        return {part.name: (part.calls, part.rows) for part in self._parts}

    def drain_logs(self) -> tuple[dict[str, float], dict[str, list[Any]]]:
        """Returns and forgets what functions logged since the last time.

        Returns:
            the mean of every metric of `log_metric`, and the values of every column of `log_extra` in order (at most the last 10,000).
        """
        metrics = {name: float(np.mean(values)) for name, values in self._logs.metrics.items()}
        extra = {name: list(values) for name, values in self._logs.extra.items()}
        self._logs.extra.clear()
        self._logs.metrics.clear()
        return metrics, extra

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns itself: specs and checkers copy keyword arguments several times, and a reward may hold a model."""
        return self

    def terminal(self, batch: EpisodeBatch) -> Scores:
        """Scores finished completions: one call per terminal part.

        Returns:
            the weighted totals, (N,) float64, and the unweighted scores of each part, (N,) with NaN where it returned None. A row for
            which every part returned None is a `RewardError`, unless the set has a dense part.
        """
        return self.start_terminal(batch).result()

    def start_terminal(self, batch: EpisodeBatch) -> Pending[Scores]:
        """Starts `terminal`: plain functions are called now, async ones run on while the caller does something else."""
        if not self._terminal or not len(batch):
            return Pending.of((np.zeros(len(batch)), {part.name: np.zeros(0) for part in self._terminal}))
        return self._start([(part, batch, {}) for part in self._terminal]).then(partial(self._terminal_scores, batch))

    def _terminal_scores(self, batch: EpisodeBatch, results: list[Any]) -> Scores:
        totals = np.zeros(len(batch))
        raw = {part.name: as_scores(result, part.name, batch) for part, result in zip(self._terminal, results, strict=True)}
        for part in self._terminal:
            totals += part.weight * np.nan_to_num(raw[part.name], nan=0.0)
        if not self._dense:
            nothing = np.logical_and.reduce([np.isnan(scores) for scores in raw.values()])
            if nothing.any():
                row = int(np.argmax(nothing))
                raise RewardError(
                    f"every reward ({', '.join(raw)}) returned None for {describe_row(batch, row)}; at least one must apply to every row."
                )
        return totals, raw

    def dense_step(self, prefixes: EpisodeBatch, finished: BoolArray) -> Scores:
        """Returns what the dense parts pay for the last token of each prefix.

        Args:
            prefixes: completions so far, each with at least one token.
            finished: (N,) bool, the prefix is a whole completion; that closes its last segment.

        Returns:
            the weighted rewards, (N,) float64, and the unweighted ones of each part, (N,); both are 0 where nothing is paid.
        """
        if not all(prefixes.completion_ids):
            raise ValueError("`prefixes` must hold at least one token per row: the reward is that of the last token.")
        rewards, raw = self._start_dense(prefixes, finished, last_only=True).result()
        return np.array([row[-1] for row in rewards]), {name: np.array([row[-1] for row in rows]) for name, rows in raw.items()}

    def dense_sequence(self, batch: EpisodeBatch, finished: BoolArray) -> TokenScores:
        """Returns what the dense parts pay for every token of whole completions: what `dense_step` returns for each prefix.

        Args:
            batch: completions of T_i tokens.
            finished: (N,) bool, the last token ended the episode; that closes the last segment.

        Returns:
            the weighted rewards, N arrays (T_i,) float64, and the unweighted ones of each part; 0 where nothing is paid.
        """
        return self.start_dense_sequence(batch, finished).result()

    def start_dense_sequence(self, batch: EpisodeBatch, finished: BoolArray) -> Pending[TokenScores]:
        """Starts `dense_sequence`, as `start_terminal` does `terminal`."""
        return self._start_dense(batch, finished, last_only=False)

    def _start_dense(self, batch: EpisodeBatch, finished: BoolArray, *, last_only: bool) -> Pending[TokenScores]:
        ends = np.asarray(finished, dtype=bool).tolist()
        requests: list[_Request] = []
        payers: list[Payer] = []
        for part in self._dense if len(batch) else ():
            if not isinstance(part.kind, SegmentLevel):
                requests.append((part, batch, {}))
                payers.append(pay_tokens)
                continue
            rows, segments = _closed(part, batch, ends, last_only)
            view, further = segment_batch(batch, rows, segments)
            if rows:
                requests.append((part, view, further))
                payers.append(segment_payer(rows, [-1 if part.kind.at_end else segment.end - 1 for segment in segments]))
        return self._start(requests).then(partial(self._token_scores, batch, requests, payers))

    def _token_scores(self, batch: EpisodeBatch, requests: list[_Request], payers: list[Payer], results: list[Any]) -> TokenScores:
        totals = [np.zeros(len(ids)) for ids in batch.completion_ids]
        raw = {part.name: [np.zeros(len(ids)) for ids in batch.completion_ids] for part in self._dense}
        for (part, view, _), pay, result in zip(requests, payers, results, strict=True):
            pay(result, part.name, view, raw[part.name])
        for part in self._dense:
            for total, rewards in zip(totals, raw[part.name], strict=True):
                total += part.weight * rewards
        return totals, raw

    def _start(self, requests: list[_Request]) -> Pending[list[Any]]:
        """Calls each part with its batch; async ones start at once and run beside the others."""
        results: list[Any] = []
        logs = [_Logs() for _ in requests]  # taken in with the answers, in their order, whoever logs first

        def answers() -> list[Any]:
            called = zip(results, requests, strict=True)
            found = [_noting(result.result, *asked[:2]) if isinstance(result, Future) else result for result, asked in called]
            for own in logs:
                self._logs.take_in(own)
            return found

        def cancel() -> None:
            for result in results:
                if isinstance(result, Future):
                    result.cancel()

        with Pending(answers, cancel) as pending:
            for (part, batch, further), own in zip(requests, logs, strict=True):
                result = self._call_part(part, batch, further, own)
                results.append(event_loop.start(result) if isawaitable(result) else result)
        return pending if any(isinstance(result, Future) for result in results) else Pending.of(pending.result())

    def _call_part(self, part: _Part, batch: EpisodeBatch, further: dict[str, list[Any]], logs: _Logs) -> Any:
        own = {"trainer_state": self.trainer_state, "log_extra": logs.log_extra, "log_metric": logs.log_metric}
        arguments = part.parameters.select(Arguments(batch, {**further, **own}), part.name)
        part.calls += 1
        part.rows += len(batch)
        return _noting(partial(part.function, **arguments), part, batch)


def _noting(call: Callable[[], Any], part: _Part, batch: EpisodeBatch) -> Any:
    """Returns `call()`; an exception of the user's function passes through with a note that says whose it is."""
    try:
        return call()
    except Exception as error:
        error.add_note(f"(raised by reward `{part.name}`, called with {len(batch)} completions)")
        raise


def _closed(part: _Part, batch: EpisodeBatch, ends: list[bool], last_only: bool) -> tuple[list[int], list[Segment]]:
    """Returns the segments to score, and the row of each."""
    segmentation = part.segmentation
    assert segmentation is not None and isinstance(part.kind, SegmentLevel)
    if part.kind.at_end:
        over = [row for row, end in enumerate(ends) if end]
        listed = zip(over, segmentation.all_segments(batch.select(over), [True] * len(over)), strict=True)
        found = [(row, segment) for row, segments in listed for segment in segments]
    elif last_only:
        found = [(row, segment) for row, segment in enumerate(segmentation.last_segments(batch, ends)) if segment is not None]
    else:
        found = [(row, segment) for row, segments in enumerate(segmentation.all_segments(batch, ends)) for segment in segments]
    return [row for row, _ in found], [segment for _, segment in found]


def _weighted_parts(reward: Any, weight: float) -> list[tuple[str, RewardFunction, float]]:
    """Returns what one entry of a list of rewards adds to a set."""
    reward = loaded_reward(reward)
    if isinstance(reward, RewardSet):
        return [(name, function, weight * own) for name, function, own in reward.parts]
    return [(*resolve_reward(reward), weight)]


def _checked_weights(weights: Sequence[float] | None, count: int, argument: str = "reward_weights") -> list[float]:
    if weights is None:
        return [1.0] * count
    try:
        checked = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"`{argument}` must hold numbers, one per reward, got {weights!r}.") from None
    if checked.shape != (count,):
        raise ValueError(f"`{argument}` must hold one number per reward: {count} rewards, got {weights!r}.")
    if not np.isfinite(checked).all():
        raise ValueError(f"`{argument}` must be finite, got {weights!r}.")
    return [float(weight) for weight in checked]


def _checked_names(own: list[str], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return unique_names(own)
    if len(names) != len(own) or len(set(names)) != len(own):
        raise ValueError(f"`names` must hold one distinct name per reward: {len(own)} rewards, got {list(names)}.")
    return list(names)
