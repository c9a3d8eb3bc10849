"""Critics: a head on the policy's own trunk (`ValueHead`), and a model with a trunk of its own (`ValueModel`)."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from textgym.agents.common.backbone import Backbone, mixed_precision
from textgym.agents.common.layout import Rows, lay_out
from textgym.agents.common.loading import load_for_training
from textgym.agents.common.scoring import spread
from textgym.agents.common.trunks import Trunk, find_trunk, run_trunk
from textgym.agents.reward_model import RewardModel
from textgym.alignment import aligned, load_tensors
from textgym.rewards.classifier import OFFSET

HEAD_FILE = "value_head.safetensors"
TRUNK_FOLDER = "trunk"


class ValueHead(nn.Module):
    """V(s) from the hidden state at s. The last layer starts at zero, so V = 0 everywhere before the first update.

    It computes in float32 whatever the dtype of the hidden states: regression targets do not fit in bfloat16's eight bits.

    Args:
        hidden_size: H.
        mlp_size: units of one hidden layer (GELU); None for a linear head.
    """

    def __init__(self, hidden_size: int, mlp_size: int | None = None) -> None:
        super().__init__()
        self.body = nn.Identity() if mlp_size is None else nn.Sequential(nn.Linear(hidden_size, mlp_size), nn.GELU())
        self.output = nn.Linear(hidden_size if mlp_size is None else mlp_size, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps hidden states (..., H) to values (...), float32."""
        values: Tensor = self.output(self.body(hidden.to(self.output.weight.dtype)))
        return values.squeeze(-1)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "ValueHead":
        """Reads what `save` wrote; the sizes come from the tensors."""
        state = load_tensors(path)
        inner = state.get("body.0.weight")
        hidden_size = state["output.weight"].shape[1] if inner is None else inner.shape[1]
        head = cls(hidden_size, None if inner is None else inner.shape[0])
        head.load_state_dict(state)
        return head.to(device)


class ValueModel(nn.Module):
    """A critic that shares nothing with the policy. Dropout is off, as in the policy.

    Args:
        trunk: a transformers decoder without a language-model head (`AutoModel`), from tokens to hidden states.
        head: from hidden states to values.
        autocast: the dtype of the trunk's matrix products; None for that of its weights. One made from a policy has the policy's.
    """

    def __init__(self, trunk: PreTrainedModel, head: ValueHead, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.trunk = aligned(trunk)
        self.head = aligned(head)
        self.autocast = autocast
        self.train(False)
        self._fast_trunk = find_trunk(trunk)

    @classmethod
    def from_policy(cls, policy: Any, mlp_size: int | None = None) -> "ValueModel":
        """Starts from a copy of a policy's trunk (a LoRA policy's: without its adapter), with a head that says 0.

        Args:
            policy: a `CausalLMPolicy`.
            mlp_size: as in `ValueHead`.
        """
        backbone: Backbone = policy.backbone
        trunk = backbone.copy_trunk().requires_grad_(True)
        head = ValueHead(trunk.config.hidden_size, mlp_size).to(backbone.device)
        return cls(trunk, head, backbone.autocast)

    @classmethod
    def from_classifier(cls, model: "str | Path | PreTrainedModel | RewardModel", device: torch.device | str = "cpu") -> "ValueModel":
        """Starts from a reward model: a sequence classifier with one label, head included, so that V(s) begins as its score of s.

        Args:
            model: the classifier or `RewardModel` (copied), or its path. It must read the policy's own token ids.
            device: where the critic goes.
        """
        classifier: Any = model.model if isinstance(model, RewardModel) else model
        if isinstance(model, str | Path):
            classifier, _ = load_for_training(AutoModelForSequenceClassification, str(model))
        score = getattr(classifier, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            found = "no linear `score` layer" if not isinstance(score, nn.Linear) else f"{score.out_features} labels"
            raise ValueError(
                "`model` must be a decoder with a linear `score` layer of one label to start a critic from, "
                f"got {type(classifier).__name__} with {found}. Train the reward model with num_labels=1."
            )
        head = ValueHead(score.in_features)
        with torch.no_grad():
            head.output.weight.copy_(score.weight)
            if score.bias is not None:
                head.output.bias.copy_(score.bias)
            head.output.bias.add_(torch.tensor(getattr(classifier.config, OFFSET, None) or [0.0]))
        trunk = copy.deepcopy(classifier.base_model).requires_grad_(True)
        return cls(trunk, head).to(device)

    def train(self, mode: bool = True) -> "ValueModel":
        """Keeps the modules in evaluation mode: dropout would make the critic's targets and its predictions two different functions."""
        del mode
        return super().train(False)

    @property
    def fast_trunk(self) -> Trunk | None:
        """This package's own trunk for the model; None where transformers' forward must be used."""
        return self._fast_trunk if self._fast_trunk is not None and self._fast_trunk.unchanged else None

    def values_of(self, layout: Rows) -> Tensor:
        """Returns V(s_t), (B, T) float32, zero on padding, for a layout from `scoring.lay_out`."""
        with mixed_precision(layout.input_ids.device.type, self.autocast):
            if self.fast_trunk is not None:
                hidden = run_trunk(self.fast_trunk, layout)
            else:
                states = self.trunk(input_ids=layout.input_ids, attention_mask=None, use_cache=False).last_hidden_state
                hidden = states[layout.rows, layout.columns]
        return spread(self.head(hidden).float(), layout.mask)

    def forward(self, prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns V(s_t) at the states in which the tokens were chosen, (B, T) float32, zero from `lengths` on.

        Args:
            prompt_ids: (B, P) int64, left-padded.
            prompt_lengths: (B,) int64.
            completion_ids: (B, T) int64.
            lengths: (B,) int64.
        """
        return self.values_of(lay_out(prompt_ids, prompt_lengths, completion_ids, lengths))

    def save(self, folder: str | Path) -> None:
        """Writes a folder: the trunk as transformers writes it, the head beside it; safetensors only."""
        folder = Path(folder)
        self.trunk.save_pretrained(folder / TRUNK_FOLDER)
        self.head.save(folder / HEAD_FILE)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu", autocast: torch.dtype | None = None) -> "ValueModel":
        """Reads what `save` wrote: weights, to be run as `autocast` says."""
        folder = Path(folder)
        trunk = AutoModel.from_pretrained(str(folder / TRUNK_FOLDER), local_files_only=True)
        return cls(trunk, ValueHead.load(folder / HEAD_FILE), autocast).to(device)
