"""GPT-2's trunk (Radford et al. 2019)."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from textgym.agents.common.trunks.base import Attention, Part, Trunk, activation, projection


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

    def layers(self) -> list[Any]:
        """See `Trunk`."""
        return [_Block(block) for block in self.model.h]

    def bypassed(self) -> Iterator[nn.Module]:
        """See `Trunk`."""
        yield self.model
        for block in self.model.h:
            yield from (block, block.attn, block.mlp)

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        """See `Trunk`."""
        return self.model.wte(ids) + self.model.wpe(positions), None

    def run_layer(self, index: int, layer: "_Block", states: Tensor, context: None, attend: Attention) -> Tensor:
        """See `Trunk`."""
        projected = layer.attention(layer.first_norm(states))
        queries, keys, values = projected.view(states.shape[0], 3, -1, self.head_size).unbind(1)
        states = states + layer.output(attend(index, queries, keys, values))
        return states + layer.outer(layer.activation(layer.inner(layer.second_norm(states))))

    def finish(self, states: Tensor) -> Tensor:
        """See `Trunk`."""
        return _norm(self.model.ln_f)(states)

    def _head_size(self) -> int:
        return int(self.model.config.hidden_size // self.model.config.num_attention_heads)


class _Block:
    """The parts of one block."""

    def __init__(self, block: Any) -> None:
        self.first_norm, self.second_norm = _norm(block.ln_1), _norm(block.ln_2)
        self.attention, self.output = projection(block.attn.c_attn), projection(block.attn.c_proj)
        self.inner, self.outer = projection(block.mlp.c_fc), projection(block.mlp.c_proj)
        self.activation = activation(block.mlp.act)


def _norm(module: Any) -> Part:
    return partial(torch.layer_norm, normalized_shape=module.normalized_shape, weight=module.weight, bias=module.bias, eps=module.eps)
