"""Asks a policy and its reference for log-probabilities: of single steps, and of whole completions in one pass where they can.

Everything a `TokenPolicy` may offer beyond `log_probs` is looked up here by name, and nowhere else.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from textgym.types import IntArray, TokenPolicy

DoubleArray: TypeAlias = npt.NDArray[np.float64]


class Scores(NamedTuple):
    """What policy and reference say about chosen tokens, in nats. (B,) for one step, (B, T) for whole completions.

    Attributes:
        log_probs: log π(a|s) of the policy.
        reference_log_probs: the same of the reference.
        full_kl: KL(π ‖ π_ref) over the whole vocabulary at the state; None where it was not asked for.
    """

    log_probs: DoubleArray
    reference_log_probs: DoubleArray
    full_kl: DoubleArray | None

    def part(self, index: Any) -> "Scores":
        """Returns the scores at `index`, an index or mask into every array."""
        return Scores(self.log_probs[index], self.reference_log_probs[index], None if self.full_kl is None else self.full_kl[index])


class Completions(NamedTuple):
    """Whole completions of freshly reset rows.

    Attributes:
        observations: `input_ids` and `attention_mask` (B, L) after the reset.
        prompt_columns: P, where completions begin.
        actions: (B, T) with T at most L − P; what stands beyond a row's length means nothing.
        lengths: (B,) tokens that count.
    """

    observations: Mapping[str, npt.NDArray[Any]]
    prompt_columns: int
    actions: IntArray
    lengths: IntArray

    @property
    def arguments(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """`prompt_ids`, `prompt_lengths`, `actions`, `lengths` as the sequence methods of a policy take them."""
        prompt_mask = self.observations["attention_mask"][:, : self.prompt_columns]
        prompt_ids = np.asarray(self.observations["input_ids"][:, : self.prompt_columns], dtype=np.int64)
        return prompt_ids, prompt_mask.sum(axis=1).astype(np.int64), self.actions, self.lengths

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """(B, T), True on the tokens that count."""
        return np.arange(self.actions.shape[1]) < self.lengths[:, None]

    def states(self, step: int, rows: IntArray) -> dict[str, npt.NDArray[Any]]:
        """Returns the observations of `rows` before action `step`: the prompt and the first `step` tokens."""
        observations = {key: np.array(value[rows]) for key, value in self.observations.items()}
        columns = slice(self.prompt_columns, self.prompt_columns + step)
        observations["input_ids"][:, columns] = self.actions[rows, :step]
        observations["attention_mask"][:, columns] = 1
        return observations


def check_policy(name: str, policy: Any, full_kl: bool) -> None:
    """Raises a `ValueError` if `policy` does not follow the protocol that `KLShaping` needs.

    Args:
        name: the argument to name, `policy` or `reference`.
        policy: the object; None (not set yet) passes.
        full_kl: whether it must also give the KL over the whole vocabulary.
    """
    if policy is None:
        return
    if not isinstance(policy, TokenPolicy) or isinstance(policy, type):
        raise ValueError(
            f"`{name}` must have a method `log_probs(observations, actions) -> (N,)` (see textgym.types.TokenPolicy), got "
            f"{type(policy).__name__}. A Stable-Baselines3 `ActorCriticPolicy` goes through `textgym.wrappers.ActorCriticAdapter(policy)`."
        )
    if full_kl and not callable(getattr(policy, "full_kl", None)):
        raise ValueError(
            f"`full_kl=True` needs a `{name}` with a method `full_kl(reference, observations) -> (N,)`, which {type(policy).__name__} does "
            "not have. Leave `full_kl=False`: k1, k2 and k3 are estimated from the sampled tokens."
        )


def score_step(
    policy: Any, reference: Any, observations: Any, actions: IntArray, full_kl: bool, rows: npt.NDArray[np.bool_] | None = None
) -> Scores:
    """Returns the scores of one action per row, (B,), or those of `rows`, (K,).

    Args:
        policy: a `TokenPolicy`; its `paired_log_probs` is used when it has one.
        reference: a `TokenPolicy`.
        observations: the states, batched as the environment gives them.
        actions: (B,) the tokens chosen there.
        full_kl: also ask for the KL over the whole vocabulary.
        rows: (B,) the rows that are of interest; None for all.
    """
    if paired := getattr(policy, "paired_log_probs", None):
        log_probs, reference_log_probs = paired(reference, observations, actions)
    else:
        log_probs, reference_log_probs = policy.log_probs(observations, actions), reference.log_probs(observations, actions)
    exact = _doubles(policy.full_kl(reference, observations)) if full_kl else None
    wanted = np.ones(len(actions), dtype=np.bool_) if rows is None else rows
    return _finite(Scores(_doubles(log_probs), _doubles(reference_log_probs), exact).part(wanted), actions[wanted])


def score_completions(policy: Any, reference: Any, completions: Completions, full_kl: bool, log_probs: DoubleArray | None = None) -> Scores:
    """Returns the scores (B, T) of whole completions, zero beyond each row's length.

    One teacher-forced pass per model where the policies have the sequence methods, else one call per step.

    Args:
        policy: a `TokenPolicy`.
        reference: a `TokenPolicy`.
        completions: prompts and tokens.
        full_kl: also ask for the KL over the whole vocabulary.
        log_probs: log π of the tokens (B, T) if the caller has them; the policy is then not asked again where that can be avoided.
    """
    if log_probs is None:
        pair = _sequence_pair(policy, reference, completions)
    else:
        pair = log_probs, _reference_sequence(policy, reference, completions)
    exact = _sequence_full_kl(policy, reference, completions) if full_kl else None
    mask = completions.mask
    zeroed = (None if part is None else np.where(mask, _doubles(part), 0.0) for part in (*pair, exact))
    return _finite(Scores(*zeroed), completions.actions)  # type: ignore[arg-type]


def _sequence_pair(policy: Any, reference: Any, completions: Completions) -> tuple[Any, Any]:
    """log-probs of policy and reference, at the policy's temperature and kept set if it can say so."""
    if paired := getattr(policy, "paired_sequence_log_probs", None):
        first, second = paired(reference, *completions.arguments)
        return first, second
    if paired := getattr(policy, "paired_log_probs", None):
        both = _step_by_step(completions, lambda states, actions: np.stack(paired(reference, states, actions), axis=1))
        return both[..., 0], both[..., 1]
    return _sequence(policy, completions), _sequence(reference, completions)


def _reference_sequence(policy: Any, reference: Any, completions: Completions) -> Any:
    """log-probs of the reference alone, at the policy's temperature and kept set if it can say so."""
    if alone := getattr(policy, "reference_sequence_log_probs", None):
        return alone(reference, *completions.arguments)
    if getattr(policy, "paired_sequence_log_probs", None) or getattr(policy, "paired_log_probs", None):
        return _sequence_pair(policy, reference, completions)[1]
    return _sequence(reference, completions)


def _sequence(policy: Any, completions: Completions) -> Any:
    """log-probs of one policy."""
    if whole := getattr(policy, "sequence_log_probs", None):
        return whole(*completions.arguments)
    return _step_by_step(completions, policy.log_probs)


def _sequence_full_kl(policy: Any, reference: Any, completions: Completions) -> Any:
    """The KL over the whole vocabulary at every state of the completions."""
    if whole := getattr(policy, "sequence_full_kl", None):
        return whole(reference, *completions.arguments)
    return _step_by_step(completions, lambda states, _: policy.full_kl(reference, states))


def _step_by_step(completions: Completions, score: Any) -> DoubleArray:
    """Calls `score(states, actions)` for each step of the rows that take it, and puts the answers (B, ...) side by side, (B, T, ...)."""
    result: DoubleArray | None = None
    for step in range(completions.actions.shape[1]):
        rows = np.flatnonzero(completions.lengths > step)
        if not len(rows):
            break
        values = _doubles(score(completions.states(step, rows), completions.actions[rows, step]))
        if result is None:
            result = np.zeros((*completions.actions.shape, *values.shape[1:]))
        result[rows, step] = values
    return np.zeros(completions.actions.shape) if result is None else result


def _doubles(values: Any) -> DoubleArray:
    """As float64: sums over long sequences must not lose digits."""
    return np.asarray(values, dtype=np.float64)


def _finite(scores: Scores, actions: IntArray) -> Scores:
    """Refuses log-probs that would put an infinite penalty into the reward."""
    for who, values in (("policy", scores.log_probs), ("reference", scores.reference_log_probs)):
        if not np.isfinite(values).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            place = f"row {where[0]}" + (f", token {where[1]}" if len(where) > 1 else "")
            raise ValueError(
                f"The {who} gives action {int(actions[where])} ({place}) the log-probability {values[where]}: the log-ratio would not be "
                "finite. The action is outside the set of tokens the policy samples from (top-k, top-p, a mask), or its logits overflowed."
            )
    return scores
