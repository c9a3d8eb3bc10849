"""Policy × environment → `RolloutBatch`: whole completions sampled with a KV cache, then walked through the environment.

The fast path samples a batch of completions and hands them to `textgym.sequences.start_sequence`. Where a wrapper of the user's stands on
the stack the same completions are stepped token by token, and every observation is compared with the concatenation of what was sent. Where
a wrapper changes it (its own tokens, another side's turn), the completions were planned for states that do not come: from that step on the
policy acts on what it really sees, one cached decode step per environment step.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import VectorEnv

from textgym.agents.common.batches import RolloutBatch, StepObservations
from textgym.agents.common.environments import common_ends, reset_to_prompts, split_prompts
from textgym.agents.common.generation import Generation
from textgym.agents.common.rollout_scores import score_rollout
from textgym.agents.policy import CausalLMPolicy
from textgym.pending import Pending, in_turn
from textgym.sequences import SequenceWalk, one_pass, start_sequence
from textgym.types import BoolArray, Info, IntArray, Observation, SequenceResult


@dataclass(frozen=True)
class StepReport:
    """One environment step of a batch of rows, as callbacks are told of it.

    Attributes:
        actions: (B,) the tokens sent; those of finished rows mean nothing.
        rewards: (B,) float32; zero where the step has not been paid yet (loop path: known when the walk is over).
        dones: (B,) bool, rows whose episode ended with this step.
        active: (B,) bool, rows that took this step.
        infos: one dict per row; final infos where `dones`, else empty.
    """

    actions: IntArray
    rewards: npt.NDArray[np.float32]
    dones: BoolArray
    active: BoolArray
    infos: list[Info]


OnStep = Callable[[StepReport], bool]


class RolloutInterrupted(Exception):  # noqa: N818  (control flow, nothing went wrong)
    """A callback asked to stop."""


class RolloutCollector:
    """Collects episodes from a vector environment, one walk of all its rows at a time.

    Args:
        policy: who acts.
        envs: where; any stack of wrappers.
        num_generations: completions per prompt; neighbouring rows share a prompt. It must divide `envs.num_envs`.
        behaviour: asked before each walk for further arguments of `policy.generate_ids`: how to explore. By default the policy's own
            distribution is sampled.
    """

    def __init__(
        self,
        policy: CausalLMPolicy,
        envs: VectorEnv,
        num_generations: int = 1,
        behaviour: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.policy, self.envs, self.num_generations, self.behaviour = policy, envs, num_generations, behaviour
        self.eos_token_ids = common_ends(envs, policy.eos_token_ids)
        self.closed_loop = False

    def walk(
        self, prompt_indices: IntArray | None, generator: torch.Generator, on_step: OnStep | None = None, seed: int | None = None
    ) -> RolloutBatch:
        """Resets every row and takes each through one episode; see `start_walk`."""
        return self.start_walk(prompt_indices, generator, on_step, seed).result()

    def walks(
        self, starts: Iterable[tuple[IntArray | None, int | None]], generator: torch.Generator, on_step: OnStep | None = None
    ) -> list[RolloutBatch]:
        """Takes several walks. While the rewards of one are waited for, the completions of the next are sampled.

        Rewards of two walks are under way at most, and come in the order of the walks. Plain functions are called as if there were no other
        walk.

        Args:
            starts: prompt indices and seed of each walk, as in `start_walk`; asked for when it begins.
            generator: see `start_walk`.
            on_step: see `start_walk`.
        """
        return list(self.take_walks(starts, generator, on_step))

    def take_walks(
        self, starts: Iterable[tuple[IntArray | None, int | None]], generator: torch.Generator, on_step: OnStep | None = None
    ) -> Iterator[RolloutBatch]:
        """The same, each walk as soon as it is over."""
        return in_turn(self.start_walk(prompt_indices, generator, on_step, seed) for prompt_indices, seed in starts)

    def start_walk(
        self, prompt_indices: IntArray | None, generator: torch.Generator, on_step: OnStep | None = None, seed: int | None = None
    ) -> Pending[RolloutBatch]:
        """Resets every row and takes each through one episode, as far as that goes without rewards that have to be waited for.

        Args:
            prompt_indices: (num_envs,) which prompt each row gets; None lets the environment draw.
            generator: source of the sampled tokens, on the policy's device.
            on_step: called once per environment step, when its reward is known; `False` ends the rollout.
            seed: for the environment's own generators.

        Raises:
            RolloutInterrupted: `on_step` returned False.
        """
        observations = reset_to_prompts(self.envs, prompt_indices, seed)
        if self.closed_loop:
            return Pending.of(self._acting(observations, generator, on_step))
        prompt_ids, prompt_lengths = split_prompts(observations)
        generation = self._generate(observations, prompt_ids, prompt_lengths, generator)
        actions = generation.ids.cpu().numpy()
        lengths = generation.lengths.cpu().numpy()
        log_probs = generation.log_probs.cpu().numpy()
        if not one_pass(self.envs):
            return Pending.of(self._stepping(observations, generation, generator, on_step))

        def batch(result: SequenceResult) -> RolloutBatch:
            _replay(result, actions, on_step)
            return self._batch(prompt_ids, prompt_lengths, generation, result)

        return start_sequence(self.envs, actions, lengths, log_probs=log_probs).then(batch)

    def _generate(
        self, observations: Observation, prompt_ids: IntArray, prompt_lengths: IntArray, generator: torch.Generator
    ) -> Generation:
        """Samples one completion per row; rows that share a prompt share its prefill."""
        shared = self.num_generations
        grouped = prompt_ids.reshape(-1, shared, prompt_ids.shape[1])
        if not (grouped == grouped[:, :1]).all() or not (prompt_lengths.reshape(-1, shared) == prompt_lengths[::shared, None]).all():
            shared = 1
        return self.policy.generate_ids(
            torch.from_numpy(prompt_ids[::shared]),
            torch.from_numpy(prompt_lengths[::shared]),
            observations["input_ids"].shape[1] - prompt_ids.shape[1],
            num_generations=shared,
            generator=generator,
            eos_token_ids=self.eos_token_ids,
            **self.behaviour(),
        )

    def _stepping(
        self, observations: Observation, generation: Generation, generator: torch.Generator, on_step: OnStep | None
    ) -> RolloutBatch:
        """The loop path: planned completions, sent token by token and checked against what comes back."""
        prompt_ids, prompt_lengths = split_prompts(observations)
        actions, lengths = generation.ids.cpu().numpy(), generation.lengths.cpu().numpy()
        expected = {key: np.array(value) for key, value in observations.items()}
        with SequenceWalk(self.envs) as walk:
            walk.prime(actions, lengths, generation.log_probs.cpu().numpy(), observations)
            # The environment alone ends rows: one that does not end with its planned completion was sent something else.
            walk.drop_plan()
            for t in range(int(lengths.max())):
                before = walk.active.copy()
                seen, active = walk.step(actions[:, t])
                _report(on_step, walk, actions[:, t], before)
                column = prompt_ids.shape[1] + t
                expected["input_ids"][before, column] = actions[before, t]
                expected["attention_mask"][before, column] = 1
                overdue = active & (lengths <= t + 1)
                if overdue.any() or not _same(seen, expected, active):
                    self._say_closed_loop()
                    return self._acting(observations, generator, on_step, walk, seen, actions[:, : t + 1])
                if not active.any():
                    break
            return self._batch(prompt_ids, prompt_lengths, generation, walk.result())

    def _acting(
        self,
        first: Observation,
        generator: torch.Generator,
        on_step: OnStep | None,
        walk: SequenceWalk | None = None,
        seen: Observation | None = None,
        sent: IntArray | None = None,
    ) -> RolloutBatch:
        """The closed loop: sees an observation, acts on it, and keeps every observation for the update.

        With `walk`, `seen` and `sent` it takes over after the first steps of a planned walk.
        """
        if walk is None:
            with SequenceWalk(self.envs) as fresh:
                return self._acting(first, generator, on_step, fresh, first, np.empty((self.envs.num_envs, 0), dtype=np.int64))
        assert seen is not None and sent is not None
        prompt_ids, prompt_lengths = split_prompts(first)
        history = _concatenations(first, sent, prompt_ids.shape[1])
        actions = list(sent.T)
        state: Any = None
        while walk.active.any() and len(actions) < first["input_ids"].shape[1] - prompt_ids.shape[1]:
            before = walk.active.copy()
            history.append(seen)
            chosen, state = self.policy.predict(seen, state, generator=generator)
            seen, _ = walk.step(chosen)
            _report(on_step, walk, chosen, before)
            actions.append(chosen)
        history.append(seen)
        steps = StepObservations(
            torch.from_numpy(np.stack([h["input_ids"] for h in history], 1)).long(),
            torch.from_numpy(np.stack([h["attention_mask"] for h in history], 1)).bool(),
        )
        completion_ids = torch.from_numpy(np.stack(actions, 1))
        batch = self._assemble(
            prompt_ids, prompt_lengths, completion_ids, torch.zeros(completion_ids.shape), walk.result(), kept=None, steps=steps
        )
        with torch.no_grad():
            scores = score_rollout(self.policy, batch, return_kept=True)
        return replace(batch, log_probs=scores.log_probs, kept=scores.kept)

    def _say_closed_loop(self) -> None:
        """Remembers, and says once, that this stack has to be acted on step by step."""
        self.closed_loop = True
        warnings.warn(
            "An observation was not the prompt plus the tokens sent so far (a wrapper changes observations or actions, or another side "
            "takes a turn). From here on the policy acts on what it sees, one decode step per environment step, and updates score every "
            "step's own observation: right, but about T times slower.",
            stacklevel=3,
        )

    def _batch(self, prompt_ids: IntArray, prompt_lengths: IntArray, generation: Generation, result: SequenceResult) -> RolloutBatch:
        return self._assemble(prompt_ids, prompt_lengths, generation.ids, generation.log_probs, result, kept=generation.kept, steps=None)

    def _assemble(
        self,
        prompt_ids: IntArray,
        prompt_lengths: IntArray,
        completion_ids: torch.Tensor,
        log_probs: torch.Tensor,
        result: SequenceResult,
        *,
        kept: torch.Tensor | None,
        steps: StepObservations | None,
    ) -> RolloutBatch:
        """Puts a walk's pieces on the policy's device, padding of every row set to zero."""
        device, width = self.policy.device, completion_ids.shape[1]
        lengths = torch.from_numpy(np.asarray(result.lengths_used)).to(device)
        mask = torch.arange(width, device=device) < lengths[:, None]
        paid = np.zeros((len(lengths), width), dtype=np.float32)
        paid[:, : result.rewards.shape[1]] = result.rewards[:, :width]
        rewards = torch.from_numpy(paid).to(device)
        shaping = np.array([info.get("shaped_return", 0.0) - info.get("unshaped_return", 0.0) for info in result.infos], dtype=np.float32)
        kl = np.array([info.get("kl_per_sequence", np.nan) for info in result.infos], dtype=np.float32)
        return RolloutBatch(
            prompt_ids=torch.from_numpy(prompt_ids).to(device),
            prompt_lengths=torch.from_numpy(prompt_lengths).to(device),
            completion_ids=completion_ids.to(device) * mask,
            lengths=lengths,
            log_probs=log_probs.to(device).float() * mask,
            rewards=rewards * mask,
            truncated=torch.from_numpy(np.asarray(result.truncated)).to(device),
            unshaped_returns=(rewards * mask).sum(1) - torch.from_numpy(shaping).to(device),
            kl_per_sequence=torch.from_numpy(kl).to(device),
            num_generations=self.num_generations,
            kept=kept,
            steps=None if steps is None else StepObservations(steps.input_ids.to(device), steps.attention_mask.to(device)),
            infos=result.infos,
        )


def _same(seen: Observation, expected: Observation, rows: BoolArray) -> bool:
    """Are the observations of `rows` what they should be?"""
    return all(np.array_equal(np.asarray(seen[key])[rows], expected[key][rows]) for key in ("input_ids", "attention_mask"))


def _concatenations(first: Observation, sent: IntArray, column: int) -> list[Observation]:
    """The observations at the first `sent.shape[1]` steps, when each token was simply appended."""
    history, current = [], {key: np.array(value) for key, value in first.items()}
    for t in range(sent.shape[1]):
        history.append({key: value.copy() for key, value in current.items()})
        current["input_ids"][:, column + t] = sent[:, t]
        current["attention_mask"][:, column + t] = 1
    return history


def _report(on_step: OnStep | None, walk: SequenceWalk, actions: IntArray, before: BoolArray) -> None:
    """Tells the callback of the step that the walk has just taken."""
    if on_step is None:
        return
    dones = before & ~walk.active
    if not on_step(StepReport(actions, walk.last_rewards, dones, before, _infos_of(walk.infos, dones))):
        raise RolloutInterrupted


def _replay(result: SequenceResult, actions: IntArray, on_step: OnStep | None) -> None:
    """Tells the callback of the steps of a one-pass walk, one after the other."""
    if on_step is None:
        return
    for t in range(int(result.lengths_used.max())):
        dones = result.lengths_used == t + 1
        active = result.lengths_used > t
        if not on_step(StepReport(actions[:, t], result.rewards[:, t], dones, active, _infos_of(result.infos, dones))):
            raise RolloutInterrupted


def _infos_of(infos: list[Info], rows: BoolArray) -> list[Info]:
    """The infos of `rows`, and one empty dict in the place of all others: work per finished row, not per row and step."""
    nothing: Info = {}
    chosen = [nothing] * len(rows)
    for row in np.flatnonzero(rows).tolist():
        chosen[row] = infos[row]
    return chosen
