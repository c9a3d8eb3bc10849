"""`Agent`: what every learner shares on Stable-Baselines3's `BaseAlgorithm`: optimiser, generators, steps, logs, saving and loading.

    Agent ── OnlineAgent      samples, is paid by an environment, learns    PPO, REINFORCE, ...
         └── OfflineLearner   learns from examples                          SFT, DPO, ..., and a reward model

Both are abstract; an algorithm is a final subclass of one of them.
"""

import sys
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from torch import Tensor, nn

from textgym.agents.common import checkpoint
from textgym.agents.common.adapters import check_reference
from textgym.agents.common.checks import check_number
from textgym.agents.common.critic import Critic, CriticSpec
from textgym.agents.common.devices import as_device
from textgym.agents.common.diagnostics import STEPS, broken_gradient, still_outputs, zero_gradient
from textgym.agents.common.environments import common_ends
from textgym.agents.common.options import CommonOptions
from textgym.agents.common.precision import warn_of_rounding
from textgym.agents.common.progress import ProgressCallback
from textgym.agents.common.run_warnings import RunWarnings
from textgym.agents.common.schedules import as_schedule
from textgym.agents.common.value_heads import ValueModel
from textgym.agents.policy import CausalLMPolicy


class Trainable(Protocol):
    """What an agent asks of the model that it trains."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def to(self, device: Any) -> Any:
        """Moves it."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters; those that require no gradient are not trained."""

    def save_pretrained(self, folder: Any) -> None:
        """Writes it as transformers reads it."""

    @classmethod
    def from_pretrained(cls, path: Any, *, device: Any = "auto", **settings: Any) -> Any:
        """Reads what `save_pretrained` wrote; `settings` are those of `loading_arguments`."""

    def loading_arguments(self) -> dict[str, Any]:
        """What `from_pretrained` must be told besides the folder to get the same again, as JSON types."""


class Agent(BaseAlgorithm):
    """A model that learns.

    Args:
        policy: the model to train, in place: a `CausalLMPolicy`, or what the class names in `trains`.
        learning_rate: a number or an SB3 schedule (a function of the progress remaining, 1 → 0).
        reference: π_ref; None where the algorithm has none.
        critic: the value function of algorithms that have one, see `Critic.build`.
        settings: see `CommonOptions`; all of them.

    Raises:
        ValueError: an argument breaks one of the rules above.
    """

    policy: Trainable  # type: ignore[assignment]
    trains: ClassVar[type[Any]] = CausalLMPolicy  # a `Trainable`
    trained: ClassVar[str] = "policy"  # what error messages call it
    # Constructor arguments that a checkpoint stores, and attributes of the same names; each class lists its own.
    saved_arguments: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "micro_batch_size",
        "micro_batch_tokens",
        "gradient_checkpointing",
        "max_grad_norm",
        "tensorboard_log",
        "verbose",
        "seed",
        "stats_window_size",
    )

    def __init__(
        self,
        policy: Any,
        learning_rate: float | Schedule,
        *,
        reference: Any,
        settings: CommonOptions,
        critic: CriticSpec | None = None,
        critic_learning_rate: float | Schedule | None = None,
    ) -> None:
        if not callable(learning_rate):
            check_number("learning_rate", learning_rate, 0)
        if not isinstance(policy, self.trains):
            kind = self.trains.__name__
            raise ValueError(f"`{self.trained}` must be a {kind}, got {type(policy).__name__}. Make one with `{kind}(model, tokenizer)`.")
        if isinstance(policy, CausalLMPolicy) and policy.mask is not None:
            raise ValueError("`policy` must not carry a mask, got that of another agent. Take it off with `policy.mask = None`.")
        if settings["device"] != "auto":
            policy.to(as_device(settings["device"]))
        seed = int(np.random.SeedSequence().generate_state(1)[0]) if settings["seed"] is None else settings["seed"]
        super().__init__(
            policy=type(policy),
            env=None,
            learning_rate=learning_rate,
            stats_window_size=settings["stats_window_size"],
            tensorboard_log=settings["tensorboard_log"],
            verbose=settings["verbose"],
            device=policy.device,
            support_multi_env=True,
            seed=seed,
        )
        if isinstance(policy, CausalLMPolicy) and isinstance(reference, CausalLMPolicy):
            check_reference(policy, reference)
        measured_in = getattr(settings["evaluation"], "env", None)
        if measured_in is not None and isinstance(policy, CausalLMPolicy):
            common_ends(measured_in, policy.eos_token_ids, "evaluation")
        self.policy, self.reference = policy, reference
        self.critic = None if critic is None else Critic.build(policy, critic, seed)
        self.critic_learning_rate = None if critic_learning_rate is None else as_schedule("critic_learning_rate", critic_learning_rate)
        self.micro_batch_size, self.micro_batch_tokens = settings["micro_batch_size"], settings["micro_batch_tokens"]
        self.gradient_checkpointing = settings["gradient_checkpointing"]
        if self.gradient_checkpointing:
            self._checkpoint_gradients()
        self.max_grad_norm = settings["max_grad_norm"]
        self.stats_window_size = settings["stats_window_size"]
        self.evaluation = settings["evaluation"]
        self._make_optimizer = settings["optimizer"]
        self._logger = Logger(folder=None, output_formats=[])  # `learn` replaces it
        self.run_warnings = RunWarnings()
        self._skipped_steps = 0
        self._first_outputs: tuple[int, Tensor, Callable[[], Tensor]] | None = None
        self._setup_model()

    # -- set-up -----------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        """Makes schedules, random generators and optimiser. Global generators are left alone."""
        self._setup_lr_schedule()
        assert self.seed is not None
        items, minibatches, environment = np.random.SeedSequence(self.seed).spawn(3)
        self.item_generator = np.random.default_rng(items)
        self.minibatch_generator = np.random.default_rng(minibatches)
        self._env_seed: int | None = int(environment.generate_state(1)[0])
        self.sampling_generator = torch.Generator(device=self.policy.device)
        self.sampling_generator.manual_seed(self.seed)
        groups = self._parameter_groups()
        self.optimizer = self._make_optimizer(groups)
        # A schedule may begin at 0.
        rates = [self.lr_schedule(progress) for progress in (1.0, 0.75, 0.5, 0.25, 0.0)]
        warn_of_rounding(self.trained, (parameter for group in groups for parameter in group["params"]), rates)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The policy's parameters, and in a second group the critic's where the algorithm has one."""
        modules: list[Any] = [self.policy, *([self.critic] if self.critic is not None else [])]
        return [{"params": [p for p in module.parameters() if p.requires_grad]} for module in modules]

    def _checkpoint_gradients(self) -> None:
        """Turns gradient checkpointing on in all that is trained."""
        trunks = {f"`{self.trained}`": self.policy.backbone.fast_trunk if isinstance(self.policy, CausalLMPolicy) else None}
        if self.critic is not None and isinstance(self.critic.network, ValueModel):
            trunks["`critic`"] = self.critic.network.fast_trunk
        for name, trunk in trunks.items():
            if trunk is None:
                raise ValueError(
                    f"`gradient_checkpointing` must be False for a {name} that transformers runs, not this package, got True: transformers "
                    "checkpoints in training mode only, in which no model is here. Bound the memory with `micro_batch_tokens`."
                )
        for trunk in trunks.values():
            assert trunk is not None
            trunk.checkpoint_gradients()

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters the optimiser updates: the policy's, and the critic's where the algorithm has one."""
        return chain(self.policy.parameters(), self.critic.parameters() if self.critic is not None else ())

    # -- steps ------------------------------------------------------------------------------------------------------

    def _set_learning_rates(self) -> None:
        """Moves the learning rates to the progress remaining, and logs them."""
        self._update_learning_rate(self.optimizer)
        if self.critic is not None and self.critic_learning_rate is not None:
            rate = self.critic_learning_rate(self._current_progress_remaining)
            self.optimizer.param_groups[1]["lr"] = rate
            self.logger.record("train/critic_learning_rate", rate)

    def step(self, losses: Iterable[Tensor], proceed: Callable[[], bool] = lambda: True) -> bool:
        """One optimiser step on the sum of `losses`; each one's graph is gone before the next is made.

        Args:
            losses: scalars, one per micro-batch, that add up to the loss of the minibatch.
            proceed: asked when the gradients are there; False leaves the parameters as they are.

        Returns:
            Whether `proceed` agreed. The step is left out where the gradient is not finite: it would make every weight NaN.
        """
        self.optimizer.zero_grad(set_to_none=True)
        for loss in losses:
            loss.backward()
        if not proceed():
            return False
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm if self.max_grad_norm is not None else float("inf"))
        self._take_step(float(norm))
        return True

    def _take_step(self, norm: float) -> None:
        """Steps on the gradients that are there, of norm `norm`, and tells what is wrong with them."""
        broken = broken_gradient(norm, self._n_updates + 1)
        if broken.sentence is not None:
            self._skipped_steps += 1
            self.logger.record("train/skipped_steps", self._skipped_steps)
        else:
            self.logger.record_mean("train/grad_norm", norm)
            self.optimizer.step()
            self._n_updates += 1
            self._compare_outputs()
        self.run_warnings.observe([broken, zero_gradient(norm)], self.logger)

    def remember_outputs(self, outputs: Callable[[], Tensor]) -> None:
        """Before the first steps of a policy with an adapter: what it says, to see after ten steps whether the adapter is trained.

        Args:
            outputs: what the model as it is now says of some tokens that stay the same.
        """
        adapted = isinstance(self.policy, CausalLMPolicy) and self.policy.is_adapter
        if adapted and "outputs" not in self.run_warnings.noted and self._first_outputs is None:
            self._first_outputs = self._n_updates + STEPS, outputs(), outputs

    def _compare_outputs(self) -> None:
        if self._first_outputs is None or self._n_updates < self._first_outputs[0]:
            return
        _, before, outputs = self._first_outputs
        self._first_outputs = None
        self.run_warnings.note("outputs")
        if any(group["lr"] for group in self.optimizer.param_groups):  # at 0 nothing shall move
            self.run_warnings.observe([still_outputs(before, outputs(), STEPS)], self.logger)

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

    @abstractmethod
    def progress_text(self, shown: dict[str, Any]) -> str:
        """What the progress bar says of the last iteration.

        Args:
            shown: what callbacks see as `locals`.
        """

    # -- saving, loading --------------------------------------------------------------------------------------------

    @abstractmethod
    def connect(self, source: Any) -> None:
        """Takes what to learn from: the environment, or the examples of an offline agent."""

    def extra_state(self) -> dict[str, Any]:
        """Further state of the algorithm for a checkpoint, as JSON types."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restores what `extra_state` returned."""

    def extra_tensors(self) -> dict[str, Tensor]:
        """Further tensors of the algorithm for a checkpoint, by name."""
        return {}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `extra_tensors` returned."""

    def position(self) -> dict[str, Any] | None:
        """Where the agent stands in its prompts or examples, as JSON types."""
        return None

    def restore_position(self, state: dict[str, Any]) -> None:
        """Goes on where `position` was taken."""

    def environment_state(self) -> list[dict[str, Any]]:
        """What the environment's wrappers have learned, as JSON types."""
        return []

    def restore_environment_state(self, states: list[dict[str, Any]]) -> None:
        """Gives it back to the wrappers of the environment that the agent was loaded with."""

    def restore_episode_statistics(self, episodes: list[dict[str, float]]) -> None:
        """Fills the window behind `rollout/ep_rew_mean`; a checkpoint's."""
        self.ep_info_buffer = deque(episodes, maxlen=self._stats_window_size)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "optimizer", *(["critic"] if self.critic is not None else [])], []

    def save(self, path: str | Path, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:  # type: ignore[override]
        """Writes a folder from which `load` continues exactly: safetensors and JSON, nothing pickled.

        Args:
            path: the folder; an older checkpoint there is replaced only after the new one is complete. A name that ends in `.zip`, which
                Stable-Baselines3's `CheckpointCallback` gives, is taken without it.
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
            path: the folder, with or without `.zip`.
            env: what to go on learning from, as in the constructor: the environment, or the examples of an offline agent.
            device: of the loaded models; "auto" is the GPU if there is one.
            **changes: constructor arguments that shall differ from the saved ones (needed for those that are functions).

        Raises:
            ValueError: `env` is missing, the path is a file's, or the folder holds no checkpoint of this class.
        """
        return checkpoint.load_agent(cls, Path(path), env, device, changes)
