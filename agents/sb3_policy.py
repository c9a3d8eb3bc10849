"""`CausalLMActorCriticPolicy`: a language model as the policy of Stable-Baselines3's own PPO and A2C.

The actor is the model's distribution over the next token, the critic a `ValueHead` on the same hidden state.
Every call runs the whole observation; the agents of this package, which keep the keys and values of what they have read, are much faster.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor

from textgym.agents.common.acting import align_left
from textgym.agents.common.sampling import scale_logits
from textgym.agents.common.value_heads import ValueHead
from textgym.agents.policy import CausalLMPolicy


class CausalLMActorCriticPolicy(ActorCriticPolicy):
    """A language model that Stable-Baselines3's on-policy algorithms train: `PPO(CausalLMActorCriticPolicy, env, policy_kwargs=...)`.

    Args:
        observation_space: that of a text environment, with `input_ids` and `attention_mask`.
        action_space: `Discrete`, one action per token of the language model.
        lr_schedule: the learning rate, by the progress remaining.
        language_model: a `CausalLMPolicy`, trained in place, or the path or id of one; a saved agent holds the whole model where it is an
            object, and its path where it is that. Its temperature counts; top-k, top-p and min-p must be off.
        use_sde: must be False; here because Stable-Baselines3 passes it.
        optimizer_class: the optimiser, by default Adam.
        optimizer_kwargs: its arguments besides the learning rate.

    Attributes:
        language_model: the `CausalLMPolicy`; `language_model.save_pretrained(folder)` writes what transformers reads.
        value_head: the critic's head.

    Raises:
        ValueError: the language model truncates its distribution, or the spaces are not those of a text environment in its vocabulary.
    """

    language_model: CausalLMPolicy
    value_head: ValueHead

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        language_model: CausalLMPolicy | str | os.PathLike[str],
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if use_sde:
            raise ValueError("`use_sde` must be False: tokens are drawn from a categorical distribution.")
        model = language_model if isinstance(language_model, CausalLMPolicy) else CausalLMPolicy.from_pretrained(language_model)
        _check(observation_space, action_space, model)
        # `nn.Module` takes no modules before its own `__init__`, which in Stable-Baselines3 builds the networks.
        vars(self)["_given"] = language_model, model
        super().__init__(observation_space, action_space, lr_schedule, optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self._source, self.language_model = vars(self).pop("_given")
        if isinstance(self._source, CausalLMPolicy):
            self._source = None  # it is the module above
        self.value_head = ValueHead(self.language_model.hidden_size)
        make: Any = self.optimizer_class
        self.optimizer = make([p for p in self.parameters() if p.requires_grad], lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        source = self.language_model if self._source is None else self._source
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,  # an agent sets the rate anew
            "language_model": source,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Returns actions (B,), values (B, 1) and log-probabilities (B,) at observations."""
        distribution, values = self._read(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, values, distribution.log_prob(actions)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns values (B, 1), log-probabilities and entropies (B,), in nats, with gradient."""
        distribution, values = self._read(obs)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: PyTorchObs) -> CategoricalDistribution:
        """Returns the distribution over the next token, (B, V)."""
        return self._read(obs)[0]

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Returns values, (B, 1)."""
        return self._read(obs)[1]

    def _read(self, obs: PyTorchObs) -> tuple[CategoricalDistribution, Tensor]:
        """Runs the model on observations, each row's tokens without its padding."""
        assert isinstance(obs, Mapping), "checked with the spaces"
        backbone = self.language_model.backbone
        backbone.without_dropout()
        ids, lengths = align_left({key: obs[key].cpu().numpy() for key in ("input_ids", "attention_mask")})
        backbone.check_length(int(lengths.max()), "The observation")
        tokens = torch.as_tensor(ids[:, : int(lengths.max())], device=backbone.device)
        last = (torch.arange(len(ids), device=backbone.device), torch.as_tensor(lengths - 1, device=backbone.device))
        features, hidden = backbone.features_and_hidden(tokens, None, None)
        logits = scale_logits(backbone.logits(features[last]).float(), self.language_model.sampling.temperature)
        distribution = CategoricalDistribution(backbone.vocab_size).proba_distribution(action_logits=logits)
        return distribution, self.value_head(hidden[last]).unsqueeze(-1)


def _check(observation_space: spaces.Space[Any], action_space: spaces.Space[Any], model: CausalLMPolicy) -> None:
    keys = observation_space.spaces.keys() if isinstance(observation_space, spaces.Dict) else ()
    if not {"input_ids", "attention_mask"} <= set(keys):
        raise ValueError(f"`env` must show `input_ids` and `attention_mask`, as TextGen-v0 does, got {observation_space}.")
    if not isinstance(action_space, spaces.Discrete) or action_space.n != model.backbone.vocab_size:
        raise ValueError(
            f"`env` must have one action per token of the language model, Discrete({model.backbone.vocab_size}), got {action_space}; "
            "make it with `tokenizer=language_model.tokenizer`."
        )
    if model.sampling.truncates:
        raise ValueError(
            "`language_model` must sample from its whole distribution: with top-k, top-p or min-p the tokens it can draw change as it "
            "learns. Make it without; a temperature is fine."
        )
