"""DQN-style agents: token values, learned online and from a replay of whole completions.

Soft (β > 0): Q(s,a) = V(s) + β log π(a|s)/π_ref(a|s) (Schulman et al. 2017, arXiv:1704.06440): the language model *is* the policy of its
Q-function, and the fixed point is π* with V(s_0) = β log Z. Hard (β = 0): Q-learning (Mnih et al. 2015) with a maximum over the tokens,
towards the one best completion. Against PPO and REINFORCE both are regressions, not gradients of a sampled objective: their residual is
0 at the optimum for every completion whoever sampled it, so old ones are learned from again and no importance weight is needed.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeAlias, TypedDict, Unpack, get_args

import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor

from textgym.agents.common.batches import RolloutBatch
from textgym.agents.common.bellman import n_step_returns, path_consistency_loss, soft_action_values
from textgym.agents.common.checks import check_choice, check_count, check_number
from textgym.agents.common.critic import CriticSpec
from textgym.agents.common.losses import value_loss
from textgym.agents.common.masking import masked_mean
from textgym.agents.common.model_mask import ModelMask
from textgym.agents.common.options import AgentOptions
from textgym.agents.common.q_values import score_states, state_values, states_of
from textgym.agents.common.replay import SequenceReplay
from textgym.agents.common.rollouts import RolloutCollector
from textgym.agents.common.sampling import Sampling, TokenRule
from textgym.agents.common.schedules import as_schedule
from textgym.agents.common.target_network import TargetNetwork
from textgym.agents.online import Beta, OnlineAgent
from textgym.agents.policy import CausalLMPolicy

Consistency: TypeAlias = Literal["path", "one_step"]


class DQN(OnlineAgent):
    """Q-learning of a language model, one token a step; `beta` says which kind.

        soft, "path"       C_t = −V(s_t) + Σ_{k<n} γ^k (r_{t+k} − β log π/π_ref(a_{t+k}|s_{t+k})) + γ^n V(s_{t+n}),    L = ½ E Σ_t C_t²
        soft, "one_step"   L = ½ E Σ_t (V(s_t) + β log π/π_ref(a_t|s_t) − r_t − γ V⁻(s_{t+1}))²
        hard               L = ½ E Σ_t (Q(s_t,a_t) − Σ_{k<n} γ^k r_{t+k} − γ^n Q⁻(s_{t+n}, argmax_a Q(s_{t+n},a)))²,
                           Q(s,a) = V(s) + c log π(a|s)

    V⁻ and Q⁻ are those of the target network. V is 0 behind EOS and behind the horizon; a row that an outer time limit cut goes on.
    With `top_k` or `top_p` the tokens that may be taken are the reference's set: it becomes the policy's `mask`, so that samples, π, π_ref
    and the maximum all range over it.

    After hard training the policy holds Q in its log-probs: its most probable token is the greedy action, what
    `generate(..., temperature=0)` and `predict(..., deterministic=True)` take, and sampling from it is Boltzmann's policy softmax(Q/c).

    Args:
        policy: the policy to train, in place.
        env: an environment id, an `Env`, a `VectorEnv` or an SB3 `VecEnv`, without `KLShaping`.
        learning_rate: a number or a schedule.
        beta: β, in reward per nat: 0 for hard; a number, a schedule or an `AdaptiveKLController` for soft.
        reference: π_ref; default a frozen copy of `policy`.
        gamma: γ per token.
        buffer_size: completions that the replay holds.
        learning_starts: tokens to collect before the first update.
        batch_size: completions per update, drawn from the replay.
        gradient_steps: updates after each rollout (`rollout_size` completions).
        n_steps: n, tokens before V or Q takes over. Hard: default 1, more is biased by what was explored in between. Soft "path": default
            to the end of the completion. Soft "one_step": 1.
        tau: share of the new weights in an update of the target network, in (0, 1].
        target_update_interval: optimiser steps between those updates.
        critic: V, as in `Critic`: "head" (default of "path"), "joint" (default else), "separate" or a `ValueModel`.
        top_k: only the reference's k most probable tokens are taken; 0 for all.
        top_p: only the reference's most probable tokens of this mass are taken; 1 for all.
        consistency: of soft: "path", or "one_step" with a target network.
        double_q: of hard: the online network chooses the maximum and the target network values it (van Hasselt et al. 2016).
        exploration_fraction: of hard: share of the training over which ε falls.
        exploration_initial_eps: of hard: ε at the start.
        exploration_final_eps: of hard: ε from there on.
        boltzmann_temperature: of hard: in units of reward, a number or a schedule: sample softmax(Q/temperature) in the place of ε-greedy.
        advantage_scale: of hard: c, reward per nat of log π.
        **options: see `AgentOptions`.

    Raises:
        ValueError: an argument is out of range or belongs to the other kind; the environment has `KLShaping`; the policy itself
            truncates (give `top_k` and `top_p` here); an observation is not the prompt and the tokens sent so far.
    """

    kl_in_reward: ClassVar[bool] = False
    on_policy: ClassVar[bool] = False
    # Options that one kind alone has, with their defaults.
    hard_options: ClassVar[dict[str, Any]] = {
        "double_q": True,
        "exploration_fraction": 0.1,
        "exploration_initial_eps": 1.0,
        "exploration_final_eps": 0.05,
        "boltzmann_temperature": None,
        "advantage_scale": 1.0,
    }
    soft_options: ClassVar[dict[str, Any]] = {"consistency": "path"}
    target_options: ClassVar[dict[str, Any]] = {"tau": 1.0, "target_update_interval": 100}
    saved_arguments: ClassVar[tuple[str, ...]] = (
        "buffer_size",
        "learning_starts",
        "batch_size",
        "gradient_steps",
        "n_steps",
        "top_k",
        "top_p",
        *target_options,
        *soft_options,
        *hard_options,
    )

    def __init__(
        self,
        policy: CausalLMPolicy,
        env: Any,
        learning_rate: float | Schedule = 1e-5,
        *,
        beta: Beta = 0.0,
        reference: Any = None,
        gamma: float = 1.0,
        buffer_size: int = 10_000,
        learning_starts: int = 100,
        batch_size: int = 32,
        gradient_steps: int = 1,
        n_steps: int | None = None,
        tau: float = 1.0,
        target_update_interval: int = 100,
        critic: CriticSpec | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        consistency: Consistency = "path",
        double_q: bool = True,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.05,
        boltzmann_temperature: float | Schedule | None = None,
        advantage_scale: float = 1.0,
        **options: Unpack[AgentOptions],
    ) -> None:
        self.buffer_size, self.learning_starts = buffer_size, learning_starts
        self.batch_size, self.gradient_steps, self.n_steps = batch_size, gradient_steps, n_steps
        self.tau, self.target_update_interval, self.consistency = tau, target_update_interval, consistency
        self.top_k, self.top_p, self.double_q, self.advantage_scale = top_k, top_p, double_q, advantage_scale
        self.exploration_fraction, self.boltzmann_temperature = exploration_fraction, boltzmann_temperature
        self.exploration_initial_eps, self.exploration_final_eps = exploration_initial_eps, exploration_final_eps
        self.soft = not (isinstance(beta, int | float) and beta == 0)
        self._check_arguments()
        # Where Q = V + ... is regressed as one, V is a part of the network that has to fit, so its gradient goes all the way down.
        critic = critic or ("joint" if self._has_target else "head")
        super().__init__(policy, env, learning_rate, beta=beta, reference=reference, gamma=gamma, critic=critic, **options)
        if policy.sampling.truncates:
            raise ValueError(
                "`policy` must not truncate its samples for DQN, got top_k, top_p or min_p on it. Give DQN `top_k` and `top_p`."
            )
        assert self.critic is not None
        action_set = Sampling(policy.sampling.temperature, top_k, top_p)
        if action_set.truncates:
            policy.mask = ModelMask(self.reference, TokenRule(action_set))
        self.exploration_schedule = LinearSchedule(exploration_initial_eps, exploration_final_eps, exploration_fraction)
        self.replay = SequenceReplay(buffer_size, policy.vocab_size)
        self.target: TargetNetwork | None = None
        if self._has_target:
            networks = {"policy": self.policy, "critic": self.critic}
            self.target = TargetNetwork(networks, tau=tau, interval=target_update_interval)

    @property
    def _has_target(self) -> bool:
        return not self.soft or self.consistency == "one_step"

    def _check_arguments(self) -> None:
        check_count("buffer_size", self.buffer_size, "completions")
        check_count("batch_size", self.batch_size, "completions")
        check_count("gradient_steps", self.gradient_steps, "optimiser steps")
        check_count("target_update_interval", self.target_update_interval, "optimiser steps")
        check_number("learning_starts", self.learning_starts, 0)
        check_number("tau", self.tau, 0, 1, above=True)
        check_number("advantage_scale", self.advantage_scale, 0, above=True)
        check_number("exploration_fraction", self.exploration_fraction, 0, 1, above=True)
        check_number("exploration_initial_eps", self.exploration_initial_eps, 0, 1)
        check_number("exploration_final_eps", self.exploration_final_eps, 0, 1)
        check_choice("consistency", self.consistency, get_args(Consistency))
        if self.n_steps is not None:
            check_count("n_steps", self.n_steps, "tokens")
        if self.boltzmann_temperature is not None and not callable(self.boltzmann_temperature):
            check_number("boltzmann_temperature", self.boltzmann_temperature, 0, above=True)
        foreign = self.hard_options if self.soft else self.soft_options
        for name, default in foreign.items():
            if getattr(self, name) != default:
                kind = "hard DQN, beta = 0" if self.soft else "soft DQN, beta > 0"
                raise ValueError(f"`{name}` is an option of {kind}, got {getattr(self, name)!r} with the other kind. Leave it away.")
        if not self._has_target:
            for name, default in self.target_options.items():
                if getattr(self, name) != default:
                    raise ValueError(f"`{name}` needs a target network, which consistency='path' has none of, got {getattr(self, name)!r}.")
        elif self.soft and self.n_steps not in (None, 1):
            raise ValueError(
                f"`n_steps` must be 1 with consistency='one_step', got {self.n_steps}. Use consistency='path' for longer paths."
            )

    # -- acting -----------------------------------------------------------------------------------------------------

    def _make_collector(self) -> RolloutCollector:
        return RolloutCollector(self.policy, self.vector_env, self.num_generations, self.behaviour)

    def behaviour(self) -> dict[str, Any]:
        """How the next walk explores: arguments of `generate_ids`."""
        if self.boltzmann_temperature is not None:
            temperature = as_schedule("boltzmann_temperature", self.boltzmann_temperature)(self._current_progress_remaining)
            of_logits = self.policy.sampling.temperature * temperature / self.advantage_scale
            return {"sampling": replace(self.policy.sampling, temperature=of_logits)}
        return {} if self.soft else {"epsilon": self.exploration_rate}

    @property
    def exploration_rate(self) -> float:
        """ε now."""
        return float(self.exploration_schedule(self._current_progress_remaining))

    # -- learning ---------------------------------------------------------------------------------------------------

    def train(self, rollout: RolloutBatch) -> None:
        """Adds a rollout to the replay, then `gradient_steps` updates on completions drawn from it."""
        self.replay.add(rollout, self.shaped_rewards(rollout))
        self.logger.record("train/replay_size", len(self.replay))
        if not self.soft and self.boltzmann_temperature is None:
            self.logger.record("rollout/exploration_rate", self.exploration_rate)
        if self.num_timesteps < self.learning_starts:
            return
        for _ in range(self.gradient_steps):
            self._step(self.replay.sample(self.batch_size, self.minibatch_generator, self.policy.device))

    def _step(self, batch: RolloutBatch) -> None:
        """One optimiser step on a batch of the replay, and the target network behind it."""
        total = 0.0

        def loss(part: RolloutBatch, rows: Tensor, sequences: int, tokens: int) -> Tensor:
            nonlocal total
            share = self.soft_loss(part, sequences) if self.soft else self.hard_loss(part, sequences)
            total += float(share.detach())
            return share

        self.update(batch, loss, torch.arange(len(batch)))
        self.logger.record_mean("train/loss", total)
        if self.target is not None:
            self.target.after_step(self._n_updates)

    def soft_loss(self, batch: RolloutBatch, sequences: int) -> Tensor:
        """The share of a micro-batch in the soft loss of its batch of `sequences` completions."""
        assert self.critic is not None and batch.reference_log_probs is not None
        states = states_of(batch, self.policy.mask, end_states=bool(batch.truncated.any()))
        scores = score_states(self.policy, self.critic, states)
        width, lengths, beta = batch.completion_ids.shape[1], batch.lengths, self.current_beta
        log_probs, values = scores.log_probs[:, :width], scores.values[:, :width]
        self._record(values)
        if self.consistency == "path":
            return path_consistency_loss(
                values,
                log_probs,
                batch.reference_log_probs,
                batch.rewards,
                lengths,
                beta=beta,
                gamma=self.gamma,
                n_steps=self.n_steps,
                count=sequences,
                **_ends(scores.values, batch),
            )
        assert self.target is not None
        with self.target.lent():
            lagged = state_values(self.policy, self.critic, states)
        targets = n_step_returns(batch.rewards, lagged[:, :width], lengths, n_steps=1, gamma=self.gamma, **_ends(lagged, batch))
        action_values = soft_action_values(values, log_probs, batch.reference_log_probs, beta=beta)
        return value_loss(action_values, targets, batch.completion_mask, reduction="sequence_sum", count=sequences)

    def hard_loss(self, batch: RolloutBatch, sequences: int) -> Tensor:
        """The share of a micro-batch in the hard loss of its batch of `sequences` completions."""
        assert self.critic is not None and self.target is not None
        states = states_of(batch, self.policy.mask, end_states=bool(batch.truncated.any()))
        scores = score_states(self.policy, self.critic, states, best=True)
        with self.target.lent():
            lagged = score_states(self.policy, self.critic, states, tokens=scores.best if self.double_q else None, best=not self.double_q)
        best_log_probs = lagged.log_probs if self.double_q else lagged.best_log_probs
        assert best_log_probs is not None
        width, mask = batch.completion_ids.shape[1], batch.completion_mask
        best = lagged.values + self.advantage_scale * best_log_probs
        targets = n_step_returns(
            batch.rewards, best[:, :width], batch.lengths, n_steps=self.n_steps or 1, gamma=self.gamma, **_ends(best, batch)
        )
        action_values = scores.values[:, :width] + self.advantage_scale * scores.log_probs[:, :width]
        self._record(best[:, :width])
        self.logger.record_mean("train/q_mean", float(masked_mean(action_values.detach(), mask)))
        return value_loss(action_values, targets, mask, reduction="sequence_sum", count=sequences)

    def _record(self, values: Tensor) -> None:
        self.logger.record_mean("train/root_value", float(values.detach()[:, 0].mean()))

    # -- saving, loading --------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Where the next completion goes in the replay."""
        return {"replay_position": self.replay.position}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restores what `extra_state` returned."""
        self.replay.position = state["replay_position"]

    def extra_tensors(self) -> dict[str, Tensor]:
        """The replay, and the target network where there is one."""
        parts = {"replay": self.replay.tensors(), "target": {} if self.target is None else self.target.tensors()}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `extra_tensors` returned."""
        parts: dict[str, dict[str, Tensor]] = {"replay": {}, "target": {}}
        for key, tensor in tensors.items():
            part, name = key.split(".", 1)
            parts[part][name] = tensor
        self.replay.load(parts["replay"], self.replay.position)
        if self.target is not None:
            self.target.load(parts["target"])


class _Ends(TypedDict, total=False):
    truncated: Tensor
    end_values: Tensor


def _ends(values: Tensor, batch: RolloutBatch) -> _Ends:
    """What `n_step_returns` needs of rows that an outer time limit cut: nothing, where there are none."""
    if values.shape[1] == batch.completion_ids.shape[1]:
        return {}
    return {"truncated": batch.truncated, "end_values": values.gather(1, batch.lengths[:, None]).squeeze(1)}
