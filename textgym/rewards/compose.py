"""One reward out of many: `RewardSet` calls each part in TRL's form, checks what it returns and adds the parts up with their weights."""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from inspect import isawaitable
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from textgym.errors import RewardError
from textgym.rewards import event_loop
from textgym.rewards.calling import (
    Arguments,
    Float64Array,
    Parameters,
    RewardFunction,
    as_list,
    as_number,
    as_scores,
    check_count,
    read_parameters,
    unique_names,
)
from textgym.rewards.dense import DenseKind, Segment, Segmentation, SegmentLevel, dense_kind, segment_batch
from textgym.rewards.episodes import EpisodeBatch, describe_row
from textgym.rewards.resolve import listed_rewards, loaded_reward, resolve_reward

__all__ = ["EpisodeBatch", "RewardSet"]

BoolArray: TypeAlias = npt.NDArray[np.bool_]
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


def _bounded() -> deque[Any]:
    return deque(maxlen=_KEPT_LOGS)


_Request: TypeAlias = tuple[_Part, EpisodeBatch, dict[str, list[Any]]]
_Payer: TypeAlias = Callable[[Any, str, EpisodeBatch, list[Float64Array]], None]


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

    def terminal(self, batch: EpisodeBatch) -> tuple[Float64Array, dict[str, Float64Array]]:
        """Scores finished completions: one call per terminal part.

        Returns:
            the weighted totals, (N,) float64, and the unweighted scores of each part, (N,) with NaN where it returned None. A row for
            which every part returned None is a `RewardError`, unless the set has a dense part.
        """
        totals = np.zeros(len(batch))
        if not self._terminal or not len(batch):
            return totals, {part.name: np.zeros(0) for part in self._terminal}
        results = self._call([(part, batch, {}) for part in self._terminal])
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

    def dense_step(self, prefixes: EpisodeBatch, finished: BoolArray) -> tuple[Float64Array, dict[str, Float64Array]]:
        """Returns what the dense parts pay for the last token of each prefix.

        Args:
            prefixes: completions so far, each with at least one token.
            finished: (N,) bool, the prefix is a whole completion; that closes its last segment.

        Returns:
            the weighted rewards, (N,) float64, and the unweighted ones of each part, (N,); both are 0 where nothing is paid.
        """
        if not all(prefixes.completion_ids):
            raise ValueError("`prefixes` must hold at least one token per row: the reward is that of the last token.")
        rewards, raw = self._dense_rewards(prefixes, finished, last_only=True)
        return np.array([row[-1] for row in rewards]), {name: np.array([row[-1] for row in rows]) for name, rows in raw.items()}

    def dense_sequence(self, batch: EpisodeBatch, finished: BoolArray) -> tuple[list[Float64Array], dict[str, list[Float64Array]]]:
        """Returns what the dense parts pay for every token of whole completions: what `dense_step` returns for each prefix.

        Args:
            batch: completions of T_i tokens.
            finished: (N,) bool, the last token ended the episode; that closes the last segment.

        Returns:
            the weighted rewards, N arrays (T_i,) float64, and the unweighted ones of each part; 0 where nothing is paid.
        """
        return self._dense_rewards(batch, finished, last_only=False)

    def _dense_rewards(
        self, batch: EpisodeBatch, finished: BoolArray, *, last_only: bool
    ) -> tuple[list[Float64Array], dict[str, list[Float64Array]]]:
        totals = [np.zeros(len(ids)) for ids in batch.completion_ids]
        raw = {part.name: [np.zeros(len(ids)) for ids in batch.completion_ids] for part in self._dense}
        if not len(batch):
            return totals, raw
        ends = np.asarray(finished, dtype=bool).tolist()
        requests: list[_Request] = []
        payers: list[_Payer] = []
        for part in self._dense:
            if not isinstance(part.kind, SegmentLevel):
                requests.append((part, batch, {}))
                payers.append(_pay_tokens)
                continue
            rows, segments = _closed(part, batch, ends, last_only)
            view, further = segment_batch(batch, rows, segments)
            if rows:
                requests.append((part, view, further))
                payers.append(_segment_payer(rows, [-1 if part.kind.at_end else segment.end - 1 for segment in segments]))
        results = self._call(requests)
        for (part, view, _), pay, result in zip(requests, payers, results, strict=True):
            pay(result, part.name, view, raw[part.name])
        for part in self._dense:
            for total, rewards in zip(totals, raw[part.name], strict=True):
                total += part.weight * rewards
        return totals, raw

    def _call(self, requests: list[_Request]) -> list[Any]:
        """Calls each part with its batch; async ones start at once and run beside the others."""
        results: list[Any] = []
        try:
            for part, batch, further in requests:
                result = self._call_part(part, batch, further)
                results.append(event_loop.start(result) if isawaitable(result) else result)
            for i, (part, batch, _) in enumerate(requests):
                if isinstance(results[i], Future):
                    results[i] = _noting(results[i].result, part, batch)
        except BaseException:  # Ctrl-C included: leave nothing running
            for result in results:
                if isinstance(result, Future):
                    result.cancel()
            raise
        return results

    def _call_part(self, part: _Part, batch: EpisodeBatch, further: dict[str, list[Any]]) -> Any:
        logs = {"trainer_state": self.trainer_state, "log_extra": self._logs.log_extra, "log_metric": self._logs.log_metric}
        arguments = part.parameters.select(Arguments(batch, {**further, **logs}), part.name)
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


def _pay_tokens(result: Any, name: str, batch: EpisodeBatch, rewards: list[Float64Array]) -> None:
    """Writes what a token-level function returned into `rewards`, after checking it."""
    rows = as_list(result, name, "one list of numbers per completion")
    check_count(rows, name, batch)
    for row, values in enumerate(rows):
        if values is None:
            continue
        numbers = as_list(values, name, "one list of numbers per completion")
        if len(numbers) != len(rewards[row]):
            raise RewardError(
                f"token-level reward `{name}` returned {len(numbers)} numbers for the {len(rewards[row])} tokens of "
                f"{describe_row(batch, row)}; it must return one per id of `completion_ids`, EOS included."
            )
        scores = [as_number(value, name, partial(_describe_token, batch, row, t)) for t, value in enumerate(numbers)]
        rewards[row][:] = np.nan_to_num(scores, nan=0.0)


def _describe_token(batch: EpisodeBatch, row: int, t: int) -> str:
    return f"token {t} of {describe_row(batch, row)}"


def _segment_payer(rows: list[int], columns: list[int]) -> "_Payer":
    """Returns a function that adds the i-th score at token `columns[i]` of row `rows[i]`."""

    def pay(result: Any, name: str, batch: EpisodeBatch, rewards: list[Float64Array]) -> None:
        for row, column, score in zip(rows, columns, np.nan_to_num(as_scores(result, name, batch), nan=0.0), strict=True):
            rewards[row][column] += score

    return pay


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
