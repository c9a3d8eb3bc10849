"""GPT-2's trunk (Radford et al. 2019)."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from textgym.agents.common.trunks.base import Attention, Trunk, activation, is_plain, linear


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

    def layers(self) -> Iterable[Any]:
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

    def for_decoding(self) -> Trunk:
        """See `Trunk`: looking modules up takes a good part of a small model's step."""
        blocks = [(block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj) for block in self.model.h]
        plain = all(type(module) is Conv1D and is_plain(module) for block in blocks for module in block)
        return _DecodingGPT2Trunk(self) if plain else self

    def _head_size(self) -> int:
        return int(self.model.config.hidden_size // self.model.config.num_attention_heads)


class _DecodingGPT2Trunk(GPT2Trunk):
    """The same for one decode loop: no attribute is looked up twice.

    Args:
        trunk: whose weights are read.
    """

    def __init__(self, trunk: GPT2Trunk) -> None:
        super().__init__(trunk.model)
        self._blocks = [_BlockWeights(block) for block in self.model.h]

    def layers(self) -> Iterable[Any]:
        """See `Trunk`."""
        return self._blocks

    def run_layer(self, index: int, layer: "_BlockWeights", states: Tensor, context: None, attend: Attention) -> Tensor:
        """See `Trunk`."""
        projected = torch.addmm(layer.attention[0], torch.layer_norm(states, *layer.first_norm), layer.attention[1])
        queries, keys, values = projected.view(states.shape[0], 3, -1, self.head_size).unbind(1)
        states = states + torch.addmm(layer.output[0], attend(index, queries, keys, values), layer.output[1])
        inner = layer.activation(torch.addmm(layer.inner[0], torch.layer_norm(states, *layer.second_norm), layer.inner[1]))
        return states + torch.addmm(layer.outer[0], inner, layer.outer[1])


class _BlockWeights:
    """The tensors of one block, found once."""

    def __init__(self, block: Any) -> None:
        self.first_norm, self.second_norm = ((norm.normalized_shape, norm.weight, norm.bias, norm.eps) for norm in (block.ln_1, block.ln_2))
        self.attention, self.output, self.inner, self.outer = (
            (module.bias, module.weight) for module in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        )
        self.activation = activation(block.mlp.act)


def _norm(module: Any, states: Tensor) -> Tensor:
    return torch.layer_norm(states, module.normalized_shape, module.weight, module.bias, module.eps)
