"""The wrappers of vector environments.

KL shaping makes one call of the policies per step for all rows, or one per whole walk. `ClipReward` and `NormalizeReward` are those of
`textgym.wrappers.vector_rewards`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv, VectorWrapper

from textgym import sequences
from textgym.kl import AdaptiveKLController, Schedule
from textgym.pending import Pending
from textgym.plans import checked_plan
from textgym.stacks import layers
from textgym.types import BoolArray, Info, SequenceResult
from textgym.wrappers.kl_shaping import KLShaping as SingleKLShaping
from textgym.wrappers.scoring import DoubleArray, Scores
from textgym.wrappers.shaping import ShapingState, shape_completions
from textgym.wrappers.turns import RowTurns
from textgym.wrappers.vector_rewards import ClipReward, NormalizeReward

__all__ = ["ClipReward", "KLShaping", "NormalizeReward"]


class KLShaping(VectorWrapper[Any, Any, Any, Any, Any]):
    """Takes the KL penalty off the reward of every step and row: the vector form of `textgym.wrappers.KLShaping`.

    Rows that take no step of their own (held rows, a row's autoreset in `NEXT_STEP` mode) are neither scored nor penalised. `infos` has the
    keys of the single form as arrays with `_key` masks; in `SAME_STEP` mode those of a row's last step stand in `infos["final_info"]`.

    Args:
        env: any vector environment, synchronous, asynchronous or batched, in any autoreset mode.
        policy: a `textgym.types.TokenPolicy`, or None until `set_policy`.
        reference: the same, frozen, or None until `set_reference`.
        beta: reward per nat of log-ratio: a number ≥ 0, a schedule (callable of the remaining progress, see `set_progress`) or an
            `AdaptiveKLController`. Each row reads its value when its episode starts and keeps it for that episode.
        full_kl: also report the exact KL over the whole vocabulary (`policy.full_kl`), at the cost of both models' full distributions.

    Raises:
        ValueError: an argument breaks these rules, or the environment is KL-shaped already.
        StalePolicyError: stepped with no policy or reference set.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        policy: Any = None,
        reference: Any = None,
        beta: float | Schedule | AdaptiveKLController = 0.05,
        full_kl: bool = False,
    ) -> None:
        super().__init__(env)
        if any(isinstance(layer, KLShaping | SingleKLShaping) for layer in layers(env)):
            raise ValueError("`env` is KL-shaped already: a second penalty would count the log-ratio twice. Set `beta` on the one it has.")
        self.state = ShapingState(env.num_envs, policy, reference, beta, full_kl)
        self._turns = RowTurns(env)

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

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        """Resets the environment (or the rows of `options["reset_mask"]`) and starts new accounts for the rows that were reset."""
        rows, options = self._turns.reset(options)
        observations, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        self.state.begin(rows, observations)
        return observations, infos

    def step(self, actions: Any) -> tuple[Any, DoubleArray, BoolArray, BoolArray, Info]:
        """Steps the environment and takes β times the log-ratio off the reward of each row that acted."""
        self.state.require_policies()
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        turn = self._turns.step(terminated, truncated)
        scores = self.state.score(np.asarray(actions), turn.acted)
        unshaped = np.asarray(rewards, dtype=np.float64)
        shaped, log_ratio = self.state.account(unshaped, scores, turn.acted)
        infos = self._turns.add_keys(infos, turn, {"unshaped_reward": unshaped, "log_ratio": log_ratio}, self.state.episode())
        if turn.restarted.any():
            self.state.begin(turn.restarted, observations)
        else:
            self.state.see(observations)
        return observations, shaped, terminated, truncated, infos

    def hold_rows(self, mask: BoolArray | None) -> None:
        """Holds rows (see `TextGenVectorEnv.hold_rows`): they are not scored until their next reset. Passed on to the layers below.

        Args:
            mask: (N,) True for the rows to hold; None holds none.
        """
        self._turns.hold(mask)
        sequences.hold_below(self.env, mask)

    def prime(self, actions: npt.NDArray[Any], lengths: npt.NDArray[Any], log_probs: npt.NDArray[Any] | None = None) -> None:
        """Scores planned completions of freshly reset rows ahead, in one teacher-forced pass per model.

        `step` then reads the plan for every row that sees and does what was planned, and asks the policies for the others.

        Args:
            actions: (N, T) the tokens that will be sent.
            lengths: (N,) how many of each count.
            log_probs: (N, T) log π of the tokens if the caller has them.
        """
        self.state.prime(np.asarray(actions), np.asarray(lengths), None if log_probs is None else np.asarray(log_probs, dtype=np.float64))

    def shows(self, observations: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Whether these observations of all rows are those that the next actions answer here."""
        here = self.state.observations
        keys = ("input_ids", "attention_mask")
        return isinstance(here, Mapping) and all(key in here and np.array_equal(here[key], observations[key]) for key in keys)

    def step_sequence(
        self, actions: npt.NDArray[Any], lengths: npt.NDArray[Any], log_probs: npt.NDArray[Any] | None = None
    ) -> SequenceResult:
        """Takes whole completions through the environment; the same as `textgym.step_sequence(self, actions, lengths, log_probs)`.

        One teacher-forced pass per model and no loop, when everything below does it in one pass too.
        """
        return self.start_sequence(actions, lengths, log_probs).result()

    def start_sequence(
        self, actions: npt.NDArray[Any], lengths: npt.NDArray[Any], log_probs: npt.NDArray[Any] | None = None
    ) -> Pending[SequenceResult]:
        """Begins a `step_sequence`: the policies score the tokens now, while rewards that are waited for are on their way."""
        self.state.require_policies()
        plan = checked_plan(self, actions, lengths, log_probs)
        if self._turns.ended.any() or self.state.steps.any():
            raise ValueError(sequences.NOT_FRESH)
        completions = self.state.completions(plan.actions, plan.lengths) if sequences.one_pass(self) else None
        if completions is None:
            return Pending.of(sequences.walk_through(self, *plan))
        with sequences.start_sequence(self.env, *plan) as below:
            scores = self.state.score_completions(completions, plan.log_probs)
        betas = self.state.betas.copy()
        self.state.leave(plan.lengths)
        self._turns.ended[:] = True
        return below.then(lambda result: _shaped(result, scores, betas))


def _shaped(result: SequenceResult, scores: Scores, betas: DoubleArray) -> SequenceResult:
    """The outcome of whole completions with the penalty taken off their rewards."""
    shaped = shape_completions(result.rewards, scores, betas, result.lengths_used)
    last = (np.arange(len(betas)), result.lengths_used - 1)
    step = {"unshaped_reward": result.rewards[last].tolist(), "log_ratio": shaped.log_ratio[last].tolist()}
    whole = step | {key: values.tolist() for key, values in shaped.episode.items()}
    for i, (info, ended) in enumerate(zip(result.infos, result.terminated | result.truncated, strict=True)):
        info.update({key: values[i] for key, values in (whole if ended else step).items()})
    return result._replace(rewards=shaped.rewards.astype(np.float32))
