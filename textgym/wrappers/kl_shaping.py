"""KL shaping of a single environment."""

import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs

from textgym.errors import StalePolicyError
from textgym.kl import AdaptiveKLController, Schedule
from textgym.stacks import single_layers
from textgym.types import Info, IntArray
from textgym.wrappers.scoring import Completions, DoubleArray, score_completions
from textgym.wrappers.shaping import ShapingState, Shared

_ROW = np.ones(1, dtype=np.bool_)


class KLShaping(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Takes the KL penalty off the reward of every step: `r' = r − β (log π(a|s) − log π_ref(a|s))`.

    Summed over an episode that is `r(x, y) − β log(π(y|x)/π_ref(y|x))`, whose expectation is the KL-regularised objective, so any agent
    that maximises return may be used on it. The log-ratio is a number to the agent (no gradient flows through it). It is k1, the only
    estimator whose use in the reward leaves π_ref exp(r/β)/Z optimal; k2, k3 and the full-vocabulary KL are reported only.

    Log-probabilities are taken where the policy acts: at the observation and the action as they stand at this layer of the stack. Where
    the policy has `paired_log_probs`, those of the reference are at the policy's temperature and over its kept set of tokens.

    Args:
        env: the environment; in a worker process of `AsyncVectorEnv` or `SubprocVecEnv` it cannot be stepped, because the policy there
            would be a copy that learning does not reach: use `textgym.wrappers.vector.KLShaping` around the vector environment.
        policy: a `textgym.types.TokenPolicy`, or None until `set_policy`.
        reference: the same, frozen, or None until `set_reference`.
        beta: reward per nat of log-ratio: a number ≥ 0, a schedule (callable of the remaining progress, see `set_progress`) or an
            `AdaptiveKLController`. Its value is read when an episode starts and holds for that episode.
        full_kl: also report the exact KL over the whole vocabulary (`policy.full_kl`), at the cost of both models' full distributions.

    `info` of every step has `unshaped_reward` and `log_ratio` (nats). At the end of an episode it has besides: `kl_per_sequence` (the sum
    of the log-ratios, k1), `kl_per_token` (their mean), `kl_k2_per_sequence`, `kl_k3_per_sequence` (sums), `kl_full_per_sequence` (sum,
    with `full_kl=True`), `unshaped_return`, `shaped_return` and `beta`. KLs are in nats.

    Raises:
        ValueError: an argument breaks these rules, or the environment is KL-shaped already.
        StalePolicyError: stepped with no policy or reference set, or in a worker process.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        policy: Any = None,
        reference: Any = None,
        beta: float | Schedule | AdaptiveKLController = 0.05,
        full_kl: bool = False,
    ) -> None:
        RecordConstructorArgs.__init__(
            self, _disable_deepcopy=True, policy=_held(policy), reference=_held(reference), beta=_held(beta), full_kl=full_kl
        )
        gym.Wrapper.__init__(self, env)
        if any(isinstance(layer, KLShaping) for layer in single_layers(env)):
            raise ValueError("`env` is KL-shaped already: a second penalty would count the log-ratio twice. Set `beta` on the one it has.")
        self.state = ShapingState(1, policy, reference, beta.value if isinstance(beta, Shared) else beta, full_kl)

    @property
    def policy(self) -> Any:
        """Whose tokens are penalised; None until it is set."""
        return self.state.policy

    def set_policy(self, policy: Any) -> None:
        """Sets the policy, a `TokenPolicy`; for agents that are built after the environment."""
        self.state.policy = policy

    @property
    def reference(self) -> Any:
        """Whom the policy should stay close to; None until it is set."""
        return self.state.reference

    def set_reference(self, reference: Any) -> None:
        """Sets the frozen reference, a `TokenPolicy`."""
        self.state.reference = reference

    @property
    def beta(self) -> float:
        """β for episodes that start now, in reward per nat."""
        return self.state.coefficient.value

    @property
    def controller(self) -> AdaptiveKLController | None:
        """The adaptive controller given as `beta`, or None."""
        return self.state.coefficient.controller

    def set_progress(self, progress_remaining: float) -> None:
        """Moves a β given as a schedule; 1 at the start of learning, 0 at its end. Episodes that run keep theirs."""
        self.state.coefficient.set_progress(progress_remaining)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        """Resets the environment and starts a new account."""
        _refuse_worker()
        observation, info = self.env.reset(seed=seed, options=options)
        self.state.begin(_ROW, _batched(observation))
        return observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Steps the environment and takes β times the log-ratio of `action` off the reward."""
        _refuse_worker()
        self.state.require_policies()
        observation, reward, terminated, truncated, info = self.env.step(action)
        scores = self.state.score(np.asarray(action)[None], _ROW)
        unshaped = float(reward)
        shaped, log_ratio = self.state.account(np.array([unshaped]), scores, _ROW)
        self.state.see(_batched(observation))
        info = {**info, "unshaped_reward": unshaped, "log_ratio": float(log_ratio[0])}
        if terminated or truncated:
            info.update({key: float(values[0]) for key, values in self.state.episode().items()})
        return observation, float(shaped[0]), terminated, truncated, info

    @staticmethod
    def prime_rows(
        wrappers: "Sequence[KLShaping]", actions: IntArray, lengths: IntArray, log_probs: npt.NDArray[Any] | None = None
    ) -> None:
        """Scores planned completions of several freshly reset environments ahead, in one pass for all that share policy and reference.

        Args:
            wrappers: n of them, one per environment.
            actions: (n, T) the tokens that will be sent.
            lengths: (n,) how many of each count.
            log_probs: (n, T) log π of the tokens if the caller has them.
        """
        groups: dict[tuple[int, int, bool], list[int]] = {}
        for i, wrapper in enumerate(wrappers):
            state = wrapper.state
            state.require_policies()
            groups.setdefault((id(state.policy), id(state.reference), state.full_kl), []).append(i)
        for rows in groups.values():
            states = [wrappers[i].state for i in rows]
            given = None if log_probs is None else np.asarray(log_probs, dtype=np.float64)[rows]
            _prime_together(states, actions[rows], lengths[rows], given)


def _prime_together(states: list[ShapingState], actions: IntArray, lengths: IntArray, log_probs: DoubleArray | None) -> None:
    """One pass for rows that share policy and reference, the scores handed to each row's own account."""
    parts = [state.completions(actions[i : i + 1], lengths[i : i + 1]) for i, state in enumerate(states)]
    fresh = [part for part in parts if part is not None]
    if len(fresh) < len(states) or len({part.prompt_columns for part in fresh}) > 1:
        return  # not all fresh text observations of one layout: the steps are scored one by one
    observations = {key: np.concatenate([part.observations[key] for part in fresh]) for key in fresh[0].observations}
    together = Completions(
        observations,
        fresh[0].prompt_columns,
        np.concatenate([part.actions for part in fresh]),
        np.concatenate([part.lengths for part in fresh]),
    )
    given = None if log_probs is None else log_probs[:, : together.actions.shape[1]]
    first = states[0]
    scores = score_completions(first.policy, first.reference, together, first.full_kl, given)
    for i, (state, part) in enumerate(zip(states, fresh, strict=True)):
        state.accept_primed(part, scores.part(slice(i, i + 1)))


def _held(value: Any) -> Any:
    """Constructor arguments as the specification keeps them: objects behind a holder, so that copies of it do not copy models."""
    return value if value is None or isinstance(value, int | float | Shared) else Shared(value)


def _batched(observation: Any) -> Any:
    """One observation as a batch of one."""
    if isinstance(observation, Mapping):
        return {key: np.asarray(value)[None] for key, value in observation.items()}
    return np.asarray(observation)[None]


def _refuse_worker() -> None:
    """Raises in the worker processes of vector environments: they are daemons, or bear the name that Gymnasium gives them."""
    if multiprocessing.parent_process() is None:
        return
    process = multiprocessing.current_process()
    if process.daemon or process.name.startswith("Worker<"):
        raise StalePolicyError(
            "KL shaping cannot run inside a worker process: the policy there is a copy that no longer follows the one that learns. Wrap "
            "the vector environment instead: `textgym.wrappers.vector.KLShaping(envs, policy=..., reference=...)`."
        )
