"""GPT-2's trunk (Radford et al. 2019)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from textgym.agents.common.trunks.base import Attention, Trunk, activation, linear


class GPT2Trunk(Trunk):
    """Learned positions, layer norms before attention and feed-forward, one projection for queries, keys and values."""

    architectures = ("GPT2Model",)

    @classmethod
    def supports(cls, model: PreTrainedModel) -> bool:
        """Only the usual scaling of attention, and no cross-attention."""
        config: Any = model.config
        unusual = config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn or config.add_cross_attention
        return bool(config.scale_attn_weights) and not unusual

    def prepare(self, limit: int) -> None:
        """See `Trunk`: learned positions are there."""

    def layers(self) -> nn.ModuleList:
        """See `Trunk`."""
        blocks: nn.ModuleList = self.model.h
        return blocks

    def bypassed(self) -> Iterator[nn.Module]:
        """See `Trunk`."""
        yield self.model
        for block in self.model.h:
            yield from (block, block.attn, block.mlp)

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        """See `Trunk`."""
        return self.model.wte(ids) + self.model.wpe(positions), None

    def run_layer(self, index: int, layer: Any, states: Tensor, context: None, attend: Attention) -> Tensor:
        """See `Trunk`."""
        projected = linear(layer.attn.c_attn, _norm(layer.ln_1, states))
        queries, keys, values = projected.view(states.shape[0], 3, -1, self.head_size).unbind(1)
        states = states + linear(layer.attn.c_proj, attend(index, queries, keys, values))
        inner = activation(layer.mlp.act)(linear(layer.mlp.c_fc, _norm(layer.ln_2, states)))
        return states + linear(layer.mlp.c_proj, inner)

    def finish(self, states: Tensor) -> Tensor:
        """See `Trunk`."""
        return _norm(self.model.ln_f, states)

    def _head_size(self) -> int:
        return int(self.model.config.hidden_size // self.model.config.num_attention_heads)


def _norm(module: Any, states: Tensor) -> Tensor:
    return torch.layer_norm(states, module.normalized_shape, module.weight, module.bias, module.eps)
