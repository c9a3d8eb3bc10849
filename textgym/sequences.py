"""Taking a vector environment through whole completions: in one pass where everything on the stack can, else token by token.

`step_sequence` *means* the step loop: a row's result is that of its first `lengths[i]` steps, fewer if the environment ends it earlier.
`SequenceWalk` is that loop, for callers that act as they go. Finished rows wait for the others without being stepped, scored or reset,
and without being counted by anything that stands on them (`textgym.row_holding`).
"""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv, VectorWrapper

from textgym.pending import Pending
from textgym.plans import Plan, checked_plan, prime_stack
from textgym.row_holding import row_holder
from textgym.stacks import definer, vector_layers
from textgym.types import BoolArray, FloatArray, Info, IntArray, Observation, SequenceResult
from textgym.vector_infos import row_infos

NOT_FRESH = "A walk begins with a reset: every row must be freshly reset and not yet stepped. Call `envs.reset()` before it."


@runtime_checkable
class _WholeSequences(Protocol):
    def step_sequence(self, actions: Any, lengths: Any) -> SequenceResult: ...


def step_sequence(envs: Any, actions: npt.ArrayLike, lengths: npt.ArrayLike, log_probs: npt.ArrayLike | None = None) -> SequenceResult:
    """Takes every row of a vector environment through a whole completion.

    Equal to stepping the rows token by token, each until the environment ends it or its `lengths[i]` tokens are sent. In one pass
    (`one_pass`) that is one reward call and one teacher-forced pass per model; otherwise it is the loop, after bundled wrappers were
    told what is coming. Rewards, statistics of wrappers on a row and random generators see no step of a row that is finished. A wrapper
    of the whole batch is called with all rows at every step of the loop; rows that are finished have reward 0 and no end flag there.

    Args:
        envs: a Gymnasium `VectorEnv` in any autoreset mode, or a Stable-Baselines3 `VecEnv`; all rows freshly reset.
        actions: (N, T) token ids; those from `lengths[i]` on are not looked at.
        lengths: (N,) tokens to send, 1 to T.
        log_probs: (N, T) log-probabilities of the tokens under the policy that `KLShaping` scores with, at its sampling distribution, if
            they are known; `KLShaping` then takes them instead of computing them.

    Returns:
        Rewards (N, T) and what else there is to know of each row. Afterwards every row needs a reset.

    Raises:
        ValueError: an argument has the wrong shape, type or range, or rows were not freshly reset.
    """
    envs = as_vector_env(envs)
    plan = checked_plan(envs, actions, lengths, log_probs)
    if not one_pass(envs):
        return walk_through(envs, *plan)
    result: SequenceResult = _handed_over(envs.step_sequence, envs, plan)
    return result


def start_sequence(
    envs: Any, actions: npt.ArrayLike, lengths: npt.ArrayLike, log_probs: npt.ArrayLike | None = None
) -> Pending[SequenceResult]:
    """Begins a `step_sequence`, so that something else can be done while rewards that are async functions are waited for.

    Everything but those rewards happens now, in the order of `step_sequence`; rows may then be reset and stepped further. Where a layer
    cannot take whole sequences at once or does not start them (`NormalizeReward`, whose next episodes depend on the returns of these),
    all of it happens now.

    Args:
        envs: as in `step_sequence`, and so are the others.
        actions: (N, T) token ids.
        lengths: (N,) tokens to send, 1 to T.
        log_probs: (N, T) or None.

    Returns:
        What `step_sequence` returns, from its `result()`. Ask for results in the order in which they were begun, and leave the policies of
        a `KLShaping` as they are until then.
    """
    envs = as_vector_env(envs)
    if not (one_pass(envs) and _starts_sequences(envs)):
        return Pending.of(step_sequence(envs, actions, lengths, log_probs))
    started: Pending[SequenceResult] = _handed_over(envs.start_sequence, envs, checked_plan(envs, actions, lengths, log_probs))
    return started


def one_pass(envs: Any) -> bool:
    """Is every layer of a stack able to take whole sequences at once?

    A layer is when the class that defines its `step_sequence` is the one that defines its `step` and `reset`, or is derived from it: a
    subclass that changes how the environment steps, and says nothing about sequences, is stepped.

    Args:
        envs: a vector environment with its wrappers, or a Stable-Baselines3 `VecEnv`.
    """
    return all(_steps_whole_sequences(layer) for layer in vector_layers(as_vector_env(envs)))


def walk_through(envs: Any, actions: IntArray, lengths: IntArray, log_probs: npt.NDArray[np.float64] | None) -> SequenceResult:
    """The loop form of `step_sequence`, for arguments that were checked."""
    with SequenceWalk(envs) as walk:
        walk.prime(actions, lengths, log_probs)
        for tokens in actions.T:
            walk.step(tokens)
            if not walk.active.any():
                break
        result = walk.result()
    missing = actions.shape[1] - result.rewards.shape[1]
    return result._replace(rewards=np.pad(result.rewards, ((0, 0), (0, missing))))


class SequenceWalk:
    """Takes freshly reset rows through one episode each, step by step; finished rows are held until the others are done.

    A context manager: rows are held only inside it, and afterwards every row needs a reset.

    Args:
        envs: a Gymnasium `VectorEnv` in any autoreset mode, or a Stable-Baselines3 `VecEnv`; all rows freshly reset.

    Attributes:
        active: (N,) bool, rows that have not finished.
        last_rewards: (N,) float32, the rewards of the last step, 0 in rows that did not take it.
        infos: for every finished row the info of its last step, else an empty dict.
    """

    def __init__(self, envs: Any) -> None:
        self.envs = as_vector_env(envs)
        self._layers = list(vector_layers(self.envs))
        self._holder = row_holder(self._layers)
        if not self._holder.fresh():
            raise ValueError(NOT_FRESH)
        count = self.envs.num_envs
        self.active: BoolArray = np.ones(count, dtype=np.bool_)
        self.last_rewards: FloatArray = np.zeros(count, dtype=np.float32)
        self.infos: list[Info] = [{} for _ in range(count)]
        self._lengths: IntArray | None = None
        self._steps: IntArray = np.zeros(count, dtype=np.int64)
        self._sent: IntArray = np.zeros(count, dtype=np.int64)
        self._rewards: list[FloatArray] = []
        self._terminated, self._truncated = np.zeros((2, count), dtype=np.bool_)
        self._last_infos: Mapping[str, Any] = {}

    def __enter__(self) -> "SequenceWalk":
        self._holder.engage()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._holder.release()
        except Exception:
            # Workers that were interrupted cannot be let go; what interrupted them is what the caller has to hear of.
            if error is None:
                raise

    def prime(
        self,
        actions: npt.ArrayLike,
        lengths: npt.ArrayLike,
        log_probs: npt.ArrayLike | None = None,
        observations: Observation | None = None,
    ) -> None:
        """Tells what is going to be sent: rows finish when their `lengths[i]` tokens are sent, and bundled wrappers prepare.

        The tokens may still be others; then the wrappers work step by step.

        Args:
            actions: (N, T) token ids.
            lengths: (N,) tokens that count, 1 to T.
            log_probs: (N, T) log-probabilities of the tokens under the policy that `KLShaping` scores with, if they are known.
            observations: what `envs` showed when these were worked out; then a `KLShaping` below a wrapper that might change observations
                can tell whether they are those of its own states.
        """
        plan = checked_plan(self.envs, actions, lengths, log_probs)
        self._lengths = plan.lengths
        prime_stack(self._layers, plan, observations)

    def drop_plan(self) -> None:
        """From here on only the environment (or `stop`) ends rows, not the lengths given to `prime`."""
        self._lengths = None

    def step(self, actions: npt.ArrayLike) -> tuple[Any, BoolArray]:
        """Steps the active rows.

        Args:
            actions: (N,) tokens; those of finished rows are not looked at.

        Returns:
            The observations, batched (of a finished row: its last one), and `active` after the step.
        """
        before = self.active
        # Wrappers of the whole batch see a finished row repeat its last token, which is at least a token.
        self._sent = np.where(before, actions, self._sent).astype(np.int64)
        observations, rewards, terminated, truncated, infos = self.envs.step(self._sent)
        self.last_rewards = np.where(before, rewards, 0.0).astype(np.float32)
        self._rewards.append(self.last_rewards)
        self._steps += before
        self._terminated |= before & terminated
        self._truncated |= before & truncated
        ended = before & np.logical_or(terminated, truncated)
        self._last_infos = infos
        finished = ended if self._lengths is None else ended | (before & (self._steps >= self._lengths))
        self._finish(finished, ended)
        if not self._holder.holds:
            observations = _with_final_observations(observations, infos, ended)
        return observations, self.active.copy()

    def stop(self, rows: BoolArray) -> None:
        """Finishes `rows` (N,) where they are, without an end of the episode."""
        if not self._rewards:
            raise ValueError("`stop` needs a step before it: a row's part of the walk is at least one step long.")
        self._finish(self.active & rows, np.zeros_like(self.active))

    def result(self) -> SequenceResult:
        """Returns what the steps so far made of each row; `rewards` has one column per step."""
        rewards = np.stack(self._rewards, axis=1) if self._rewards else np.zeros((len(self.active), 0), dtype=np.float32)
        infos = [dict(info) for info in self.infos]
        running = np.flatnonzero(self.active).tolist()
        for i, info in zip(running, row_infos(self._last_infos, running), strict=True):
            infos[i] = info
        return SequenceResult(rewards, self._terminated.copy(), self._truncated.copy(), self._steps.copy(), infos)

    def _finish(self, rows: BoolArray, ended: BoolArray) -> None:
        """Notes the last info of `rows` and holds them."""
        finished = np.flatnonzero(rows).tolist()
        for i, info in zip(finished, _last_infos(self._last_infos, finished, ended, self._holder.holds), strict=True):
            self.infos[i] = info
        self.active = self.active & ~rows
        if not self.active.all():
            hold_below(self.envs, ~self.active)
        self._holder.hold(~self.active)


def as_vector_env(envs: Any) -> VectorEnv[Any, Any, Any]:
    """Returns `envs` itself if it is a Gymnasium `VectorEnv`, and a Stable-Baselines3 `VecEnv` seen as one."""
    if isinstance(envs, VectorEnv):
        return envs
    if all(callable(getattr(envs, name, None)) for name in ("step_async", "step_wait", "env_method")):
        # Only here: it imports Stable-Baselines3, and with it torch, which whoever made `envs` has done already.
        from textgym.vec_env_adapter import as_gymnasium_vector_env

        return as_gymnasium_vector_env(envs)
    cure = " Put a single environment into one: `gymnasium.vector.SyncVectorEnv([lambda: env])`." if isinstance(envs, gym.Env) else ""
    raise ValueError(f"`envs` must be a Gymnasium `VectorEnv` or a Stable-Baselines3 `VecEnv`, got {type(envs).__name__}.{cure}")


def hold_below(envs: Any, mask: BoolArray | None) -> None:
    """Holds rows of the outermost layer of a stack that can: `hold_rows` of that layer passes them on."""
    for layer in vector_layers(envs):
        if callable(hold := getattr(layer, "hold_rows", None)):
            hold(mask)
            return


def _handed_over(method: Callable[..., Any], layer: Any, plan: Plan) -> Any:
    """Calls a layer's method for whole sequences; wrappers alone are told log-probabilities."""
    return method(*(plan if isinstance(layer, VectorWrapper) else plan[:2]))


def _steps_whole_sequences(layer: Any) -> bool:
    """Does this layer take whole sequences, and mean its own step loop by it?"""
    if not isinstance(layer, _WholeSequences) or {"step", "reset"} & vars(layer).keys():
        return False
    definers = {name: definer(type(layer), name) for name in ("step_sequence", "step", "reset")}
    return all(issubclass(definers["step_sequence"], definers[name]) for name in ("step", "reset"))


def _starts_sequences(layer: Any) -> bool:
    """Does this layer start whole sequences, and mean its own `step_sequence` by it?"""
    if "step_sequence" in vars(layer) or not callable(getattr(type(layer), "start_sequence", None)):
        return False
    return issubclass(definer(type(layer), "start_sequence"), definer(type(layer), "step_sequence"))


def _last_infos(infos: Mapping[str, Any], rows: list[int], ended: BoolArray, held: bool) -> list[Info]:
    """The infos of the last steps of `rows`, wherever the autoreset mode has put them.

    Args:
        infos: what the environment returned.
        rows: which rows.
        ended: (N,) the rows that the environment ended in this step.
        held: whether no next episode has begun, so that all infos of a row belong to this one.
    """
    final = infos.get("final_info")
    if not isinstance(final, Mapping):
        return row_infos(infos, rows)
    rest = {key: value for key, value in infos.items() if key.removeprefix("_") not in ("final_info", "final_obs")} if held else {}
    of_ended = zip(row_infos(rest, rows), row_infos(final, rows), strict=True)
    return [{**before, **last} if ended[i] else row_infos(infos, [i])[0] for i, (before, last) in zip(rows, of_ended, strict=True)]


def _with_final_observations(observations: Any, infos: Mapping[str, Any], ended: BoolArray) -> Any:
    """The observations with those of ended rows set to their last ones, where the environment has begun the next episodes."""
    final = infos.get("final_obs", ())
    rows = [i for i in np.flatnonzero(ended).tolist() if i < len(final) and final[i] is not None]
    if not rows:
        return observations
    if isinstance(observations, Mapping):
        return {key: _replaced(values, rows, [final[i][key] for i in rows]) for key, values in observations.items()}
    return _replaced(observations, rows, [final[i] for i in rows])


def _replaced(values: Any, rows: list[int], replacements: list[Any]) -> npt.NDArray[Any]:
    """A copy of (N, ...) with some rows replaced."""
    copy = np.array(values)
    copy[rows] = replacements
    return copy
