"""`OnPolicyAgent`: the loop that PPO, REINFORCE and their kin share, on Stable-Baselines3's `BaseAlgorithm`.

    learn: while tokens are left:  collect_rollouts → train → log → evaluate

An algorithm is a final subclass that says how one `RolloutBatch` changes the parameters (`train`).
"""

import sys
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from textgym.agents.common import checkpoint
from textgym.agents.common.batches import RolloutBatch
from textgym.agents.common.checks import check_number
from textgym.agents.common.critic import Critic, CriticSpec
from textgym.agents.common.environments import as_vector_env, attribute
from textgym.agents.common.masking import masked_whiten
from textgym.agents.common.options import AgentOptions, with_defaults
from textgym.agents.common.progress import ProgressCallback
from textgym.agents.common.prompt_order import PromptOrder
from textgym.agents.common.rollout_logs import record_rollout
from textgym.agents.common.rollouts import RolloutCollector, RolloutInterrupted, StepReport
from textgym.agents.common.schedules import as_schedule
from textgym.agents.common.shaping import ensure_kl_shaping, move_adaptive_beta, set_schedule_progress
from textgym.agents.policy import CausalLMPolicy
from textgym.kl import AdaptiveKLController
from textgym.stacks import layers
from textgym.types import IntArray
from textgym.vec_env_adapter import as_sb3_vec_env

Beta = float | Schedule | AdaptiveKLController
MicroBatchLoss = Callable[[RolloutBatch, Tensor, int, int], Tensor]


class OnPolicyAgent(BaseAlgorithm):
    """A language model that learns from its own samples in a text environment.

    Args:
        policy: the `CausalLMPolicy` to train, in place.
        env: an environment id, a Gymnasium `Env` or `VectorEnv`, or a Stable-Baselines3 `VecEnv`, with any wrappers.
        learning_rate: a number or an SB3 schedule (a function of the progress remaining, 1 → 0).
        beta: β of the KL term in reward per nat: a number, a schedule, or an `AdaptiveKLController`. A `KLShaping` wrapper is put
            around `env`, unless it has one, which must then agree.
        reference: π_ref; by default a frozen copy of `policy` as it is now (with LoRA: the adapter switched off).
        gamma: γ per token.
        critic: the value function of algorithms that have one, see `Critic.build`.
        **options: see `AgentOptions`.

    Raises:
        ValueError: an argument breaks one of the rules above.
    """

    policy: CausalLMPolicy  # type: ignore[assignment]
    env: VecEnv | None
    # Constructor arguments of the subclass that its checkpoint stores, in addition to those of this class.
    saved_arguments: ClassVar[tuple[str, ...]] = ()

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
        settings = with_defaults(options)
        check_number("gamma", gamma, 0, 1)
        if not callable(learning_rate):
            check_number("learning_rate", learning_rate, 0)
        if not isinstance(policy, CausalLMPolicy):
            raise ValueError(
                f"`policy` must be a CausalLMPolicy, got {type(policy).__name__}. Make one with `CausalLMPolicy(model, tokenizer)`."
            )
        if settings["device"] != "auto":
            policy.to(settings["device"])
        seed = int(np.random.SeedSequence().generate_state(1)[0]) if settings["seed"] is None else settings["seed"]
        super().__init__(
            policy=type(policy),  # type: ignore[arg-type]
            env=None,
            learning_rate=learning_rate,
            stats_window_size=settings["stats_window_size"],
            tensorboard_log=settings["tensorboard_log"],
            verbose=settings["verbose"],
            device=policy.device,
            support_multi_env=True,
            seed=seed,
        )
        self.policy = policy
        self.critic = None if critic is None else Critic.build(policy, critic, seed)
        self.beta, self.gamma = beta, gamma
        self.num_generations = settings["num_generations"]
        self.rollout_size = settings["rollout_size"]
        self.micro_batch_size = settings["micro_batch_size"]
        self.max_grad_norm = settings["max_grad_norm"]
        self.missing_eos_penalty = settings["missing_eos_penalty"]
        self.whiten_rewards = settings["whiten_rewards"]
        self.stats_window_size = settings["stats_window_size"]
        self.evaluation = settings["evaluation"]
        self._make_optimizer = settings["optimizer"]
        rate = settings["critic_learning_rate"]
        self.critic_learning_rate = None if rate is None else as_schedule("critic_learning_rate", rate)
        self.reference = policy.reference() if reference is None else reference
        self._logger = Logger(folder=None, output_formats=[])  # `learn` replaces it
        self._setup_model()
        if env is not None:
            self._connect(env)

    # -- set-up -----------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        """Makes schedules, random generators and optimiser. Global generators are left alone."""
        self._setup_lr_schedule()
        assert self.seed is not None
        prompts, minibatches, environment = np.random.SeedSequence(self.seed).spawn(3)
        self.prompt_generator = np.random.default_rng(prompts)
        self.minibatch_generator = np.random.default_rng(minibatches)
        self._env_seed: int | None = int(environment.generate_state(1)[0])
        self.sampling_generator = torch.Generator(device=self.policy.device)
        self.sampling_generator.manual_seed(self.seed)
        self.prompt_order: PromptOrder | None = None
        self.optimizer = self._make_optimizer(self._parameter_groups())

    def _connect(self, env: Any, rebind: bool = False) -> None:
        """Takes an environment: KL shaping, prompt order and the number of walks follow from it."""
        self.vector_env, self.kl_shaping = ensure_kl_shaping(as_vector_env(env), self.policy, self.reference, self.beta, rebind=rebind)
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
        self.collector = RolloutCollector(self.policy, self.vector_env, self.num_generations)
        # Not from workers: what crosses a process border is a copy.
        self.reward_set = next((layer.reward_set for layer in layers(self.vector_env) if hasattr(layer, "reward_set")), None)
        num_prompts = attribute(self.vector_env, "num_prompts")
        if num_prompts is None:
            self.prompt_order = None
        elif self.prompt_order is None or self.prompt_order.num_prompts != num_prompts:
            self.prompt_order = PromptOrder(int(num_prompts), self.prompt_generator)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The policy's parameters, and in a second group the critic's where the algorithm has one."""
        modules = [self.policy, *([self.critic] if self.critic is not None else [])]
        return [{"params": [p for p in module.parameters() if p.requires_grad]} for module in modules]

    def _set_learning_rates(self) -> None:
        """Moves the learning rates to the progress remaining, and logs them."""
        self._update_learning_rate(self.optimizer)
        if self.critic is not None and self.critic_learning_rate is not None:
            rate = self.critic_learning_rate(self._current_progress_remaining)
            self.optimizer.param_groups[1]["lr"] = rate
            self.logger.record("train/critic_learning_rate", rate)

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters the optimiser updates: the policy's, and the critic's where the algorithm has one."""
        return chain(self.policy.parameters(), self.critic.parameters() if self.critic is not None else ())

    def extra_state(self) -> dict[str, Any]:
        """Further state of the algorithm for a checkpoint, as JSON types."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restores what `extra_state` returned."""

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
            set_schedule_progress(self.kl_shaping, self._current_progress_remaining)
            rollout = self.collect_rollouts(callback)
            if rollout is None:
                break
            iteration += 1
            self._update_current_progress_remaining(min(self.num_timesteps, total_timesteps), total_timesteps)
            assert self.ep_info_buffer is not None  # `_setup_learn` made it
            self.ep_info_buffer.extend(record_rollout(self.logger, rollout, self.reward_set))
            self.logger.record("rollout/beta", self.kl_shaping[0].beta)
            self._set_learning_rates()
            self.train(rollout)
            move_adaptive_beta(self.kl_shaping, rollout.kl_per_sequence)
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
            walks = []
            for _ in range(self._walks):
                seed, self._env_seed = self._env_seed, None
                walks.append(self.collector.walk(self._next_prompts(), self.sampling_generator, on_step, seed))
        except RolloutInterrupted:
            return None
        rollout = RolloutBatch.concatenate(walks)
        callback.update_locals({"rollout": rollout})
        callback.on_rollout_end()
        return rollout

    def _next_prompts(self) -> IntArray | None:
        if self.prompt_order is None:
            return None
        return np.repeat(self.prompt_order.take(self.n_envs // self.num_generations), self.num_generations)

    @abstractmethod
    def train(self, rollout: RolloutBatch) -> None:
        """Updates the parameters from one rollout."""

    def shaped_rewards(self, rollout: RolloutBatch) -> Tensor:
        """The rewards that are learned from, (B, T): the environment's, with the options that change J, where they are on."""
        rewards = rollout.rewards
        if self.missing_eos_penalty:
            last = (rollout.lengths - 1).unsqueeze(1)
            eos = torch.tensor(self.collector.eos_token_ids, device=rewards.device)
            missing = ~torch.isin(rollout.completion_ids.gather(1, last), eos)
            rewards = rewards.scatter_add(1, last, -self.missing_eos_penalty * missing)
        if self.whiten_rewards:
            rewards = masked_whiten(rewards, rollout.completion_mask, shift_mean=False)
        return rewards

    def update(self, rollout: RolloutBatch, loss: MicroBatchLoss, rows: Tensor, proceed: Callable[[], bool] = lambda: True) -> bool:
        """One optimiser step on `rows` of a rollout, in micro-batches whose losses add up to that of the minibatch.

        Args:
            rollout: the whole rollout.
            loss: (micro-batch, its row indices, sequences of the minibatch, tokens of the minibatch) → scalar.
            rows: the minibatch, indices into `rollout`.
            proceed: asked when the gradients are there; False leaves the parameters as they are.

        Returns:
            Whether the step was taken.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sequences, tokens = len(rows), int(rollout.lengths[rows].sum())
        for micro_rows in rows.split(self.micro_batch_size or len(rows)):
            loss(rollout.select(micro_rows), micro_rows, sequences, tokens).backward()
        if not proceed():
            return False
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm if self.max_grad_norm is not None else float("inf"))
        self.logger.record_mean("train/grad_norm", float(norm))
        self.optimizer.step()
        self._n_updates += 1
        return True

    # -- logs -------------------------------------------------------------------------------------------------------

    def dump_logs(self, iteration: int = 0) -> None:
        """Writes the collected numbers as one row of the log, with the token count as its step."""
        assert self.ep_info_buffer is not None
        elapsed = max((time.time_ns() - self.start_time) / 1e9, sys.float_info.epsilon)
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", float(np.mean([e["r"] for e in self.ep_info_buffer])))
            self.logger.record("rollout/ep_len_mean", float(np.mean([e["l"] for e in self.ep_info_buffer])))
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / elapsed))
        self.logger.record("time/iterations", iteration, exclude="tensorboard")
        self.logger.record("time/time_elapsed", round(elapsed, 2), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        """SB3's hook; its own progress bar counts padding as tokens, ours does not."""
        callbacks = callback if isinstance(callback, list) else [] if callback is None else [callback]
        converted = [one if isinstance(one, BaseCallback) else ConvertCallback(one) for one in callbacks]
        return super()._init_callback([*converted, *([ProgressCallback()] if progress_bar else [])])

    # -- environments, saving, loading ------------------------------------------------------------------------------

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Exchanges the environment; the vocabulary must stay the same, the number of rows may change.

        Args:
            env: as in the constructor.
            force_reset: of no effect, every rollout resets its rows; here for SB3's signature.
        """
        self._connect(env, rebind=True)

    def restore_prompt_order(self, state: dict[str, Any]) -> None:
        """Goes on with the prompts where a checkpoint stopped."""
        self.prompt_order = PromptOrder(state["num_prompts"], self.prompt_generator)
        self.prompt_order.load_state_dict(state)

    def restore_episode_statistics(self, episodes: list[dict[str, float]]) -> None:
        """Fills the window behind `rollout/ep_rew_mean`; a checkpoint's."""
        self.ep_info_buffer = deque(episodes, maxlen=self._stats_window_size)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "optimizer", *(["critic"] if self.critic is not None else [])], []

    def save(self, path: str | Path, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:  # type: ignore[override]
        """Writes a folder from which `load` continues exactly: safetensors and JSON, nothing pickled.

        Args:
            path: the folder; an older checkpoint there is replaced only after the new one is complete.
            exclude: not supported; here for SB3's signature.
            include: not supported; here for SB3's signature.
        """
        if exclude or include:
            raise ValueError("`exclude` and `include` are not supported: a checkpoint always holds what continuing needs.")
        checkpoint.save_agent(self, Path(path))

    @classmethod
    def load(  # type: ignore[override]
        cls, path: str | Path, env: Any = None, device: torch.device | str = "auto", **changes: Any
    ) -> Self:
        """Reads a folder written by `save`.

        Args:
            path: the folder.
            env: where to go on learning, as in the constructor.
            device: of the loaded models; "auto" is the GPU if there is one.
            **changes: constructor arguments that shall differ from the saved ones (needed for those that are functions).

        Raises:
            ValueError: `env` is missing, or the folder holds no checkpoint of this class.
        """
        return checkpoint.load_agent(cls, Path(path), env, device, changes)
