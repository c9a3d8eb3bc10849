"""`OnlineAgent`: the loop of every agent that learns from its own samples in a text environment.

    learn: while tokens are left:  collect_rollouts → train → log → evaluate

An algorithm is a final subclass that says how one `RolloutBatch` changes the parameters (`train`).
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar, Self, Unpack

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from textgym.agents.base import Agent
from textgym.agents.common.batches import RolloutBatch, micro_batches
from textgym.agents.common.checks import check_number
from textgym.agents.common.critic import CriticSpec
from textgym.agents.common.diagnostics import (
    kl_at_start,
    negative_kl,
    part_findings,
    ratio_at_start,
    rollout_findings,
    sampling_mismatch,
    varies,
)
from textgym.agents.common.environments import as_vector_env, attribute
from textgym.agents.common.item_order import ItemOrder
from textgym.agents.common.masking import masked_whiten
from textgym.agents.common.options import AgentOptions, with_defaults
from textgym.agents.common.rollout_logs import record_rollout
from textgym.agents.common.rollout_scores import reference_log_probs, score_rollout
from textgym.agents.common.rollouts import RolloutCollector, RolloutInterrupted, StepReport
from textgym.agents.common.shaping import AnyKLShaping, ensure_kl_shaping, move_adaptive_beta, refuse_kl_shaping
from textgym.agents.policy import CausalLMPolicy
from textgym.kl import AdaptiveKLController, KLCoefficient
from textgym.stacks import layers
from textgym.types import IntArray
from textgym.vec_env_adapter import as_sb3_vec_env
from textgym.wrappers import find_normalize_reward

Beta = float | Schedule | AdaptiveKLController
MicroBatchLoss = Callable[[RolloutBatch, Tensor, int, int], Tensor]


class OnlineAgent(Agent):
    """A language model that learns from its own samples in a text environment.

    Args:
        policy: the `CausalLMPolicy` to train, in place.
        env: an environment id, a Gymnasium `Env` or `VectorEnv`, or a Stable-Baselines3 `VecEnv`, with any wrappers.
        learning_rate: a number or an SB3 schedule (a function of the progress remaining, 1 → 0).
        beta: β of the KL term in reward per nat: a number, a schedule, or an `AdaptiveKLController`. Algorithms with `kl_in_reward`
            put a `KLShaping` wrapper around `env`, unless it has one, which must then agree; the others apply β themselves and
            refuse a shaped environment.
        reference: π_ref; by default a frozen copy of `policy` as it is now (see `CausalLMPolicy.reference`).
        gamma: γ per token.
        critic: the value function of algorithms that have one, see `Critic.build`.
        **options: see `AgentOptions`.

    Raises:
        ValueError: an argument breaks one of the rules above.
    """

    policy: CausalLMPolicy
    env: VecEnv | None
    kl_in_reward: ClassVar[bool] = True
    on_policy: ClassVar[bool] = True  # samples come from the policy's own distribution
    compares_groups: bool = False  # it learns from differences between the completions of a prompt alone
    saved_arguments: ClassVar[tuple[str, ...]] = (
        "beta",
        "gamma",
        "critic_learning_rate",
        "rollout_size",
        "num_generations",
        "missing_eos_penalty",
        "whiten_rewards",
    )

    def __init__(
        self,
        policy: CausalLMPolicy,
        env: Any,
        learning_rate: float | Schedule,
        *,
        beta: Beta = 0.05,
        reference: Any = None,
        gamma: float = 1.0,
        critic: CriticSpec | None = None,
        **options: Unpack[AgentOptions],
    ) -> None:
        settings = with_defaults(options, type(self))
        check_number("gamma", gamma, 0, 1)
        self.beta, self.gamma = beta, gamma
        self.kl_shaping: list[AnyKLShaping] = []
        self.kl_coefficients = [KLCoefficient(beta)]
        self.num_generations = settings["num_generations"]
        self.rollout_size = settings["rollout_size"]
        self.missing_eos_penalty = settings["missing_eos_penalty"]
        self.whiten_rewards = settings["whiten_rewards"]
        self.prompt_order: ItemOrder | None = None
        super().__init__(
            policy,
            learning_rate,
            reference=policy.reference() if reference is None and isinstance(policy, CausalLMPolicy) else reference,
            settings=settings,
            critic=critic,
            critic_learning_rate=settings["critic_learning_rate"],
        )
        self._starts_at_reference = reference is None and not self.reference.backbone.without_adapter
        if env is not None:
            self._connect(env)

    # -- set-up -----------------------------------------------------------------------------------------------------

    def _connect(self, env: Any, rebind: bool = False) -> None:
        """Takes an environment: KL shaping, prompt order and the number of walks follow from it."""
        self.vector_env = as_vector_env(env)
        if self.kl_in_reward:
            self.vector_env, self.kl_shaping = ensure_kl_shaping(self.vector_env, self.policy, self.reference, self.beta, rebind=rebind)
            self.kl_coefficients = [wrapper.state.coefficient for wrapper in self.kl_shaping]
        else:
            refuse_kl_shaping(self.vector_env, type(self).__name__)
        actions = self.vector_env.single_action_space
        if not isinstance(actions, spaces.Discrete) or int(actions.n) != self.policy.vocab_size:
            raise ValueError(
                f"`env` must have one action per token of the policy's tokenizer, Discrete({self.policy.vocab_size}), got {actions}. "
                "Make the environment with `tokenizer=policy.tokenizer`."
            )
        self.env = as_sb3_vec_env(self.vector_env)
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space
        self.n_envs = self.env.num_envs
        if self.n_envs % self.num_generations:
            raise ValueError(
                f"`num_generations` must divide the number of environments, whose rows a group shares, got {self.num_generations} "
                f"for {self.n_envs} environments."
            )
        size = self.rollout_size or self.n_envs
        if size % self.n_envs:
            raise ValueError(f"`rollout_size` must be a multiple of the number of environments, {self.n_envs}, got {size}.")
        self._walks = size // self.n_envs
        self.collector = self._make_collector()
        # Not from workers: what crosses a process border is a copy.
        self.reward_set = next((layer.reward_set for layer in layers(self.vector_env) if hasattr(layer, "reward_set")), None)
        num_prompts = attribute(self.vector_env, "num_prompts")
        if num_prompts is None:
            self.prompt_order = None
        elif self.prompt_order is None or self.prompt_order.num_items != num_prompts:
            self.prompt_order = ItemOrder(int(num_prompts), self.item_generator)

    def _make_collector(self) -> RolloutCollector:
        """Who samples, and how; an algorithm whose behaviour policy is not simply its policy says so here."""
        return RolloutCollector(self.policy, self.vector_env, self.num_generations)

    @property
    def current_beta(self) -> float:
        """β now, in reward per nat."""
        return self.kl_coefficients[0].value

    # -- the loop ---------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Trains for `total_timesteps` generated tokens (a lower bound: whole rollouts are used).

        Args:
            total_timesteps: tokens to generate, counted without padding.
            callback: SB3 callback(s); `_on_step` runs once per environment step, and `False` stops before the update.
            log_interval: iterations between two rows of the log.
            tb_log_name: name of the TensorBoard run (default: the class name).
            reset_num_timesteps: False goes on counting, and continues a schedule.
            progress_bar: show reward, KL, tokens per second and time left.

        Returns:
            self
        """
        if self.env is None:
            raise ValueError(f"This {type(self).__name__} has no environment; give it one with `set_env` or `load(path, env=...)`.")
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
        )
        callback.on_training_start({"self": self, "total_timesteps": total_timesteps}, {})
        iteration = 0
        while self.num_timesteps < total_timesteps:
            for coefficient in self.kl_coefficients:
                coefficient.set_progress(self._current_progress_remaining)
            rollout = self.collect_rollouts(callback)
            if rollout is None:
                break
            iteration += 1
            self._update_current_progress_remaining(min(self.num_timesteps, total_timesteps), total_timesteps)
            assert self.ep_info_buffer is not None  # `_setup_learn` made it
            self.ep_info_buffer.extend(record_rollout(self.logger, rollout, self.reward_set))
            self.logger.record("rollout/beta", self.current_beta)
            self._set_learning_rates()
            self._diagnose(rollout)
            self.train(rollout)
            move_adaptive_beta(self.kl_coefficients, rollout.kl_per_sequence)
            if self.evaluation is not None:
                self.evaluation.after_iteration(self)
            if log_interval and iteration % log_interval == 0:
                self.dump_logs(iteration)
        callback.on_training_end()
        return self

    def collect_rollouts(self, callback: BaseCallback) -> RolloutBatch | None:
        """Samples `rollout_size` completions; None if the callback stopped the training."""
        callback.on_rollout_start()

        def on_step(report: StepReport) -> bool:
            self.num_timesteps += int(report.active.sum())
            callback.update_locals(
                {"actions": report.actions, "rewards": report.rewards, "dones": report.dones, "infos": report.infos, "env": self.env}
            )
            return callback.on_step()

        try:
            starts = ((self._next_prompts(), self._next_seed()) for _ in range(self._walks))
            walks = self.collector.walks(starts, self.sampling_generator, on_step)
        except RolloutInterrupted:
            return None
        rollout = RolloutBatch.concatenate(walks)
        if not self.kl_in_reward:
            rollout = self.with_reference(rollout)
        callback.update_locals({"rollout": rollout})
        callback.on_rollout_end()
        return rollout

    def with_reference(self, rollout: RolloutBatch) -> RolloutBatch:
        """Adds the reference's log-probs, and the KL per sequence that follows from them: no wrapper has measured it."""
        log_probs = reference_log_probs(self.reference, rollout, self.micro_batch_size, self.micro_batch_tokens)
        return replace(rollout, reference_log_probs=log_probs, kl_per_sequence=(rollout.log_probs - log_probs).sum(1))

    def _next_prompts(self) -> IntArray | None:
        if self.prompt_order is None:
            return None
        return np.repeat(self.prompt_order.take(self.n_envs // self.num_generations), self.num_generations)

    def _next_seed(self) -> int | None:
        """Returns the environment's seed for its first reset, then None."""
        seed, self._env_seed = self._env_seed, None
        return seed

    @abstractmethod
    def train(self, rollout: RolloutBatch) -> None:
        """Updates the parameters from one rollout."""

    def shaped_rewards(self, rollout: RolloutBatch) -> Tensor:
        """The rewards that are learned from, (B, T): the environment's, with the options that change J, where they are on."""
        rewards = rollout.rewards
        if self.missing_eos_penalty:
            last = (rollout.lengths - 1).unsqueeze(1)
            rewards = rewards.scatter_add(1, last, self._penalties(rollout)[:, None])
        if self.whiten_rewards:
            rewards = masked_whiten(rewards, rollout.completion_mask, shift_mean=False)
        return rewards

    def _penalties(self, rollout: RolloutBatch) -> Tensor:
        """What a missing EOS adds to the reward of each completion, (B,): nothing, or less than nothing."""
        last = rollout.completion_ids.gather(1, (rollout.lengths - 1).unsqueeze(1)).squeeze(1)
        eos = torch.tensor(self.collector.eos_token_ids, device=last.device)
        missing = ~torch.isin(last, eos)
        return -self.missing_eos_penalty * missing.to(rollout.rewards)

    def max_length(self, rollout: RolloutBatch) -> int:
        """The most tokens that a completion can have: the columns that the observation leaves it."""
        assert isinstance(self.observation_space, spaces.Dict)
        shape = self.observation_space["input_ids"].shape
        assert shape is not None
        return shape[-1] - rollout.prompt_ids.shape[1]

    # -- what goes wrong without an error ------------------------------------------------------------------------------

    def _diagnose(self, rollout: RolloutBatch) -> None:
        """Looks at a rollout before it is learned from, and tells what stands out, see `textgym.agents.common.diagnostics`."""
        paid = rollout.unshaped_returns + self._penalties(rollout)
        noted, name, room = self.run_warnings.noted, type(self).__name__, self.max_length(rollout)
        before = {"varied": "reward_varied" in noted, "spread": "groups_varied" in noted}
        found = [*rollout_findings(rollout, paid, algorithm=name, room=room, compares_groups=self.compares_groups, **before)]
        if self.reward_set is not None:
            found += part_findings(rollout, self.reward_set.names)
        if self.on_policy:
            found.append(negative_kl(rollout, self._precision))
            if self._starts_at_reference and self._n_updates == 0:
                found.append(kl_at_start(rollout, self._precision))
        self.run_warnings.observe(found, self.logger)
        if varies(paid):
            self.run_warnings.note("reward_varied")
        if varies(paid.view(-1, rollout.num_generations)):
            self.run_warnings.note("groups_varied")
        few = rollout.select(torch.arange(min(len(rollout), 4)))
        self.remember_outputs(torch.no_grad()(lambda: score_rollout(self.policy, few).log_probs))

    @property
    def _precision(self) -> torch.dtype:
        return self.policy.backbone.autocast or self.policy.backbone.dtype

    def check_sampling(self, rollout: RolloutBatch, scored: Tensor) -> None:
        """Before the first step: are the log-probs of sampling those of the training pass over the same tokens, (B, T)?"""
        if self._n_updates == 0 and self.on_policy:
            finding = sampling_mismatch(rollout.log_probs, scored.detach(), rollout.completion_mask, self._precision)
            self.run_warnings.observe([finding], self.logger)

    def check_ratio(self, log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> None:
        """Before the first step: is the ratio of the policy to itself 1? All (B, T)."""
        if self._n_updates == 0:
            finding = ratio_at_start(log_probs.detach(), old_log_probs, mask, self._precision)
            self.run_warnings.observe([finding], self.logger)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def update(
        self,
        rollout: RolloutBatch,
        loss: MicroBatchLoss,
        rows: Tensor,
        proceed: Callable[[], bool] = lambda: True,
        extra_losses: Iterable[Tensor] = (),
    ) -> bool:
        """One optimiser step on `rows` of a rollout, in micro-batches whose losses add up to that of the minibatch.

        Args:
            rollout: the whole rollout.
            loss: (micro-batch, its row indices, sequences of the minibatch, tokens of the minibatch) → scalar.
            rows: the minibatch, indices into `rollout`.
            proceed: asked when the gradients are there; False leaves the parameters as they are.
            extra_losses: scalars of other data than the rollout, added to the minibatch's loss.

        Returns:
            Whether the step was taken.
        """
        sequences, tokens = len(rows), int(rollout.lengths[rows].sum())

        def losses() -> Iterator[Tensor]:
            for micro_rows in self.micro_batches(rollout, rows):
                yield loss(rollout.select(micro_rows), micro_rows, sequences, tokens)

        return self.step(chain(losses(), extra_losses), proceed)

    def micro_batches(self, rollout: RolloutBatch, rows: Tensor) -> list[Tensor]:
        """Splits a minibatch, rows of a rollout, into those of its passes."""
        return [rows[part] for part in micro_batches(rollout.pass_tokens[rows], self.micro_batch_size, self.micro_batch_tokens)]

    def progress_text(self, shown: dict[str, Any]) -> str:
        """What the progress bar says: reward and KL of the last rollout."""
        rollout = shown["rollout"]
        # What is of rounding errors is 0, not -0.
        reward = round(float(rollout.unshaped_returns.mean()), 3) + 0.0
        kl = round(float(rollout.kl_per_sequence.nanmean()), 2) + 0.0
        return f"reward {reward:.3f}  KL {kl:.2f}"

    # -- environments, saving, loading ------------------------------------------------------------------------------

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Exchanges the environment; the vocabulary must stay the same, the number of rows may change.

        Args:
            env: as in the constructor.
            force_reset: of no effect, every rollout resets its rows; here for SB3's signature.
        """
        self.connect(env)

    def connect(self, source: Any) -> None:
        """Takes an environment; KL shaping that is on it already gets this agent's policy, reference and β."""
        self._connect(source, rebind=True)

    def position(self) -> dict[str, Any] | None:
        """Where the agent stands in its prompts."""
        return None if self.prompt_order is None else self.prompt_order.state_dict()

    def restore_position(self, state: dict[str, Any]) -> None:
        """Goes on with the prompts where a checkpoint stopped."""
        self.prompt_order = ItemOrder(state["num_items"], self.item_generator)
        self.prompt_order.load_state_dict(state)

    def environment_state(self) -> list[dict[str, Any]]:
        """The statistics of each `NormalizeReward` on the environment."""
        return [] if self.env is None else [wrapper.state_dict() for wrapper in find_normalize_reward(self.vector_env)]

    def restore_environment_state(self, states: list[dict[str, Any]]) -> None:
        """Gives the statistics back to those wrappers, if the environment has as many as it had; one of another make keeps its own."""
        wrappers = [] if self.env is None else find_normalize_reward(self.vector_env)
        if len(wrappers) == len(states):
            for wrapper, state in zip(wrappers, states, strict=True):
                wrapper.load_state_dict(state)
