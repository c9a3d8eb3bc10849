"""The state keeping of KL shaping, for any number of rows; `KLShaping` in single and in vector form are its two faces."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from textgym.errors import StalePolicyError
from textgym.kl import AdaptiveKLController, KLCoefficient, Schedule, k1, k2, k3
from textgym.types import BoolArray, IntArray
from textgym.wrappers.scoring import Completions, DoubleArray, Scores, check_policy, score_completions, score_step

STEP_KEYS = ("unshaped_reward", "log_ratio")
"""Info keys of every shaped step. A step that the environment did not take (a held row, an autoreset) has none."""

EPISODE_KEYS = (
    "kl_per_sequence",
    "kl_per_token",
    "kl_k2_per_sequence",
    "kl_k3_per_sequence",
    "unshaped_return",
    "shaped_return",
    "beta",
)
"""Info keys that the last step of an episode has besides; with `full_kl=True` also `kl_full_per_sequence`."""


class Shared:
    """Holds an object that copies of a wrapper's specification share: a deep copy of it is itself."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self

    def __repr__(self) -> str:
        return f"Shared({type(self.value).__name__})"


class Primed(NamedTuple):
    """Scores of planned completions, good for a row as long as it sees the prompt and the planned tokens, and sends the next of them.

    Attributes:
        expected: `input_ids` and `attention_mask` (N, L) that row i should see at its next step; updated as tokens are sent.
        columns: P, where completions begin.
        actions: (N, T) the planned tokens.
        lengths: (N,) how many of them are planned.
        scores: (N, T).
        valid: (N,) rows on which nothing else has happened so far.
    """

    expected: dict[str, npt.NDArray[Any]]
    columns: int
    actions: IntArray
    lengths: IntArray
    scores: Scores
    valid: BoolArray


class ShapingState:
    """Per-row accounts of KL shaping: β, the sums of the running episode, and the observation the next action answers.

    Args:
        num_rows: N.
        policy: a `TokenPolicy` or None (set later).
        reference: a `TokenPolicy` or None (set later).
        beta: reward per nat: number, schedule or adaptive controller.
        full_kl: also keep the KL over the whole vocabulary.
    """

    def __init__(
        self, num_rows: int, policy: Any, reference: Any, beta: float | Schedule | AdaptiveKLController, full_kl: bool = False
    ) -> None:
        self.num_rows = num_rows
        self.full_kl = bool(full_kl)
        self.coefficient = KLCoefficient(beta)
        self._policy, self._reference = Shared(None), Shared(None)
        self.policy, self.reference = policy, reference
        self.betas = np.zeros(num_rows)
        self.steps = np.zeros(num_rows, dtype=np.int64)
        self.totals = {key: np.zeros(num_rows) for key in ("k1", "k2", "k3", "full", "unshaped", "shaped")}
        self.observations: Any = None
        self._asked: Any = None
        self._primed: Primed | None = None

    @property
    def policy(self) -> Any:
        """Whose tokens are penalised."""
        return self._policy.value

    @policy.setter
    def policy(self, policy: Any) -> None:
        policy = _unshared(policy)
        check_policy("policy", policy, self.full_kl)
        self._policy, self._primed = Shared(policy), None

    @property
    def reference(self) -> Any:
        """Whom the policy should stay close to."""
        return self._reference.value

    @reference.setter
    def reference(self, reference: Any) -> None:
        reference = _unshared(reference)
        check_policy("reference", reference, full_kl=False)
        self._reference, self._primed = Shared(reference), None

    def require_policies(self) -> None:
        """Raises a `StalePolicyError` when there is nobody to score with."""
        for name in ("policy", "reference"):
            if getattr(self, name) is None:
                raise StalePolicyError(
                    f"KL shaping has no `{name}` to score the action with. Give `{name}=` at construction or call `set_{name}({name})` "
                    "before the first step."
                )

    def begin(self, rows: BoolArray, observations: Any) -> None:
        """Starts the episodes of `rows` (N,): β is read here and stays for the whole episode."""
        self.betas[rows] = self.coefficient.value
        self.steps[rows] = 0
        for total in self.totals.values():
            total[rows] = 0.0
        if self._primed is not None:
            self._primed.valid[rows] = False
            if not self._primed.valid.any():
                self._primed = None
        self.see(observations)

    def see(self, observations: Any) -> None:
        """Keeps the observations (N, ...) that the next actions answer, safe from later changes by whoever else holds them."""
        self.observations = _copied(observations)

    def prime(self, actions: IntArray, lengths: IntArray, log_probs: DoubleArray | None = None) -> None:
        """Scores planned completions of freshly begun rows in one pass, for the steps to come.

        Rows that then see or do anything else are scored step by step, so a plan can be wrong without harm. Does nothing when the
        observations are not those of a text environment.
        """
        completions = self.completions(actions, lengths)
        if completions is not None:
            self.accept_primed(completions, self.score_completions(completions, log_probs))

    def completions(self, actions: IntArray, lengths: IntArray) -> Completions | None:
        """Returns `actions` as completions of what the rows see now; None when that is no freshly reset text observation."""
        columns = _prompt_columns(self.observations)
        if columns is None or self.steps.any():
            return None
        kept = {key: self.observations[key] for key in ("input_ids", "attention_mask")}
        width = min(actions.shape[1], kept["input_ids"].shape[1] - columns)
        return Completions(kept, columns, np.asarray(actions[:, :width], dtype=np.int64), np.minimum(lengths, width))

    def score_completions(self, completions: Completions, log_probs: DoubleArray | None) -> Scores:
        """Returns the policies' scores (N, T') of completions; `log_probs` (N, T) are log π of the tokens if they are known."""
        self.require_policies()
        given = None if log_probs is None else log_probs[:, : completions.actions.shape[1]]
        return score_completions(self.policy, self.reference, completions, self.full_kl, given)

    def accept_primed(self, completions: Completions, scores: Scores) -> None:
        """Keeps scores that were computed elsewhere for `completions` of these rows."""
        expected = {key: np.array(value) for key, value in completions.observations.items()}
        self._primed = Primed(
            expected, completions.prompt_columns, completions.actions, completions.lengths, scores, np.ones(self.num_rows, dtype=np.bool_)
        )

    def score(self, actions: npt.NDArray[Any], rows: BoolArray) -> Scores:
        """Returns the scores (N,) of the actions of `rows` at the observations last seen; other rows hold zeros.

        Primed rows are read from the plan; the others go to the policies in one call.
        """
        log_probs, reference_log_probs, full = np.zeros((3, self.num_rows))
        planned = self._planned(actions, rows)
        if planned.any():
            assert self._primed is not None
            known = self._primed.scores.part((planned, self.steps[planned]))
            log_probs[planned], reference_log_probs[planned] = known.log_probs, known.reference_log_probs
            full[planned] = 0.0 if known.full_kl is None else known.full_kl
        asked = rows & ~planned
        if asked.any():
            scores = self._ask(actions, asked)
            log_probs[asked], reference_log_probs[asked] = scores.log_probs, scores.reference_log_probs
            full[asked] = 0.0 if scores.full_kl is None else scores.full_kl
        return Scores(log_probs, reference_log_probs, full if self.full_kl else None)

    def _ask(self, actions: npt.NDArray[Any], rows: BoolArray) -> Scores:
        """Returns the policies' scores of the actions of `rows` (K,) at the observations last seen."""
        if not getattr(self.policy, "remembers_rows", False):
            return score_step(self.policy, self.reference, _selected(self.observations, rows), actions[rows], self.full_kl)
        # Row i stays row i. The others show what they showed when they were last asked about, or what an asked row shows.
        previous = self._asked if self._asked is not None else _repeated(self.observations, int(np.argmax(rows)))
        self._asked = _merged(self.observations, previous, rows)
        return score_step(self.policy, self.reference, self._asked, np.where(rows, actions, actions[rows][0]), self.full_kl, rows)

    def account(self, rewards: npt.NDArray[Any], scores: Scores, rows: BoolArray) -> tuple[DoubleArray, DoubleArray]:
        """Adds one step of `rows` to their sums.

        Returns:
            The shaped rewards (N,), those of other rows as they came, and the log-ratios (N,), zero in other rows.
        """
        log_ratio = np.where(rows, k1(scores.log_probs - scores.reference_log_probs), 0.0)
        shaped = rewards - self.betas * log_ratio
        for key, values in _additions(log_ratio, scores.full_kl, rewards, shaped).items():
            self.totals[key] += np.where(rows, values, 0.0)
        self.steps += rows
        return shaped, log_ratio

    def leave(self, lengths: IntArray) -> None:
        """Notes that whole completions (N,) were taken through all rows, by whoever does their accounts."""
        self.steps[:] = lengths

    def episode(self) -> dict[str, DoubleArray]:
        """Returns the values (N,) of the episode keys for the episodes as they stand."""
        return _episode_values(self.totals, self.steps, self.betas, self.full_kl)

    def _planned(self, actions: npt.NDArray[Any], rows: BoolArray) -> BoolArray:
        """Which of `rows` are where the plan said, doing what it said; moves their expected observations on by the token sent."""
        primed = self._primed
        if primed is None or not primed.valid.any():
            return np.zeros(self.num_rows, dtype=np.bool_)
        steps = np.minimum(self.steps, primed.actions.shape[1] - 1)
        as_planned = (self.steps < primed.lengths) & (primed.actions[np.arange(self.num_rows), steps] == actions)
        seen = self.observations
        for key, expected in primed.expected.items():
            as_planned &= (np.asarray(seen[key]) == expected).all(axis=1)
        # A row that left the plan once has another prefix from then on.
        primed.valid[rows & ~as_planned] = False
        planned = rows & primed.valid
        at = np.flatnonzero(planned)
        primed.expected["input_ids"][at, primed.columns + self.steps[at]] = actions[at]
        primed.expected["attention_mask"][at, primed.columns + self.steps[at]] = 1
        return planned


class ShapedCompletions(NamedTuple):
    """What KL shaping makes of whole completions.

    Attributes:
        rewards: (N, T) shaped.
        log_ratio: (N, T).
        episode: the values (N,) of the episode keys.
    """

    rewards: DoubleArray
    log_ratio: DoubleArray
    episode: dict[str, DoubleArray]


def shape_completions(rewards: npt.NDArray[Any], scores: Scores, betas: DoubleArray, lengths_used: IntArray) -> ShapedCompletions:
    """Shapes the rewards of whole completions at once: what `ShapingState.account` makes of their steps.

    Args:
        rewards: (N, T).
        scores: (N, T') of the tokens.
        betas: (N,) reward per nat.
        lengths_used: (N,) the steps that were taken; from there on all is zero.
    """
    width = rewards.shape[1]
    mask = np.arange(width) < lengths_used[:, None]
    full = None if scores.full_kl is None else _widened(scores.full_kl, width)
    log_ratio = np.where(mask, k1(_widened(scores.log_probs - scores.reference_log_probs, width)), 0.0)
    shaped = np.where(mask, rewards - betas[:, None] * log_ratio, 0.0)
    additions = _additions(log_ratio, full, rewards, shaped)
    totals = {key: np.where(mask, values, 0.0).sum(axis=1) for key, values in additions.items()}
    return ShapedCompletions(shaped, log_ratio, _episode_values(totals, lengths_used, betas, full is not None))


def _additions(log_ratio: DoubleArray, full: DoubleArray | None, rewards: DoubleArray, shaped: DoubleArray) -> dict[str, DoubleArray]:
    """What steps add to the sums of their episodes."""
    full = np.zeros_like(log_ratio) if full is None else full
    return {"k1": log_ratio, "k2": k2(log_ratio), "k3": k3(log_ratio), "full": full, "unshaped": rewards, "shaped": shaped}


def _episode_values(totals: dict[str, DoubleArray], steps: IntArray, betas: DoubleArray, full_kl: bool) -> dict[str, DoubleArray]:
    """The values (N,) of the episode keys."""
    values = {
        "kl_per_sequence": totals["k1"],
        "kl_per_token": totals["k1"] / np.maximum(steps, 1),
        "kl_k2_per_sequence": totals["k2"],
        "kl_k3_per_sequence": totals["k3"],
        "unshaped_return": totals["unshaped"],
        "shaped_return": totals["shaped"],
        "beta": betas,
    }
    return values | {"kl_full_per_sequence": totals["full"]} if full_kl else values


def _unshared(value: Any) -> Any:
    """The object itself, out of the holder in which a specification carries it."""
    return value.value if isinstance(value, Shared) else value


def _prompt_columns(observations: Any) -> int | None:
    """P of freshly reset text observations: every prompt ends at the same column; None when these are none."""
    if not (isinstance(observations, Mapping) and {"input_ids", "attention_mask"} <= observations.keys()):
        return None
    mask = np.asarray(observations["attention_mask"]).astype(np.bool_)
    if mask.ndim != 2 or not mask.any(axis=1).all():
        return None
    ends = mask.shape[1] - np.argmax(mask[:, ::-1], axis=1)
    return int(ends[0]) if (ends == ends[0]).all() else None


def _widened(values: DoubleArray, width: int) -> DoubleArray:
    """(N, T') with zeros appended up to (N, width)."""
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))


def _copied(observations: Any) -> Any:
    """A copy of batched observations."""
    if isinstance(observations, Mapping):
        return {key: np.array(value) for key, value in observations.items()}
    return np.array(observations)


def _merged(first: Any, second: Any, rows: BoolArray) -> Any:
    """The observations `first` in `rows`, and `second` in the others."""
    if isinstance(first, Mapping):
        return {key: _merged(value, second[key], rows) for key, value in first.items()}
    return np.where(rows.reshape(-1, *[1] * (first.ndim - 1)), first, second)


def _repeated(observations: Any, row: int) -> Any:
    """One row's observation in every row."""
    if isinstance(observations, Mapping):
        return {key: _repeated(value, row) for key, value in observations.items()}
    return np.repeat(observations[row : row + 1], len(observations), axis=0)


def _selected(observations: Any, rows: BoolArray) -> Any:
    """The observations of some rows."""
    if rows.all():
        return observations
    if isinstance(observations, Mapping):
        return {key: value[rows] for key, value in observations.items()}
    return observations[rows]
