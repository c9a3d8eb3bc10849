"""The value function of an agent: V(s_t) at every state of a completion."""

import json
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from textgym.agents.common.masking import masked_mean
from textgym.agents.common.value_heads import ValueHead, ValueModel
from textgym.agents.policy import CausalLMPolicy

KIND_FILE, HEAD_FILE, MODEL_FOLDER = "critic.json", "head.safetensors", "model"
SMALLEST_MLP = 64


class Critic(nn.Module):
    """A value function beside a policy: a head on the policy's states, or a model of its own.

    Args:
        network: `ValueHead` or `ValueModel`.
        joint: for a head, whether the gradient of the value loss flows on into the policy's trunk.
    """

    def __init__(self, network: ValueHead | ValueModel, joint: bool = False) -> None:
        super().__init__()
        self.network, self.joint = network, joint

    @classmethod
    def build(cls, policy: CausalLMPolicy, spec: "CriticSpec" = "head", seed: int = 0) -> "Critic":
        """Makes the critic that `spec` describes; every one but your own starts at V = 0.

        Args:
            policy: the policy whose states are valued.
            spec: where the features come from.

                "head"      a small network on the policy's last hidden states, its gradient stopped there: the policy moves by J alone
                "joint"     the same, with the gradient of the value loss flowing on into the policy's trunk
                "separate"  a second language model, starting as a copy of the policy
                ValueModel  your own, for instance `ValueModel.from_classifier(reward_model)`

            seed: of the initial weights; torch's global generator is left alone.

        Raises:
            ValueError: `spec` is none of these.
        """
        if isinstance(spec, Critic):
            return spec
        if isinstance(spec, ValueModel):
            return cls(spec).to(policy.device)
        if spec == "separate":
            return cls(ValueModel.from_policy(policy)).to(policy.device)
        if spec in ("head", "joint"):
            size = policy.hidden_size
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                head = ValueHead(size, mlp_size=max(SMALLEST_MLP, size))
            return cls(head, joint=spec == "joint").to(policy.device)
        raise ValueError(f"`critic` must be 'head', 'joint', 'separate' or a ValueModel, got {spec!r}.")

    @property
    def reads_policy(self) -> bool:
        """Does it need the policy's hidden states?"""
        return isinstance(self.network, ValueHead)

    def from_hidden(self, hidden: Tensor) -> Tensor:
        """V(s_t), (B, T), from the policy's hidden states (B, T, H)."""
        values: Tensor = self.network(hidden if self.joint else hidden.detach())
        return values

    def save(self, folder: Path) -> None:
        """Writes a folder that `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.network, ValueModel):
            autocast = self.network.autocast
            about = {"kind": "model", "autocast": None if autocast is None else str(autocast).removeprefix("torch.")}
            self.network.save(folder / MODEL_FOLDER)
        else:
            about = {"kind": "joint" if self.joint else "head"}
            self.network.save(folder / HEAD_FILE)
        (folder / KIND_FILE).write_text(json.dumps(about))

    @classmethod
    def load(cls, folder: Path, policy: CausalLMPolicy) -> "Critic":
        """Reads what `save` wrote."""
        about = json.loads((folder / KIND_FILE).read_text())
        if about["kind"] == "model":
            autocast = about.get("autocast")
            return cls(ValueModel.load(folder / MODEL_FOLDER, policy.device, None if autocast is None else getattr(torch, autocast)))
        return cls(ValueHead.load(folder / HEAD_FILE, device=policy.device), joint=about["kind"] == "joint")


CriticSpec: TypeAlias = Literal["head", "joint", "separate"] | ValueModel | Critic


def explained_variance(values: Tensor, returns: Tensor, completion_mask: Tensor) -> float:
    """Returns 1 − Var(R − V) / Var(R) over the True tokens: 1 is a perfect critic, 0 one that knows the mean only; NaN if R is constant."""
    residual = returns - values
    variance = masked_mean((returns - masked_mean(returns, completion_mask)).square(), completion_mask)
    unexplained = masked_mean((residual - masked_mean(residual, completion_mask)).square(), completion_mask)
    return float(1 - unexplained / variance) if variance > 0 else float("nan")
