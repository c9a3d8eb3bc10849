"""The trunk of Llama (Touvron et al. 2023, arXiv:2302.13971) and of the models that took its layers: Mistral, Qwen2, Qwen3."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from textgym.agents.common.trunks.base import Attention, Trunk, activation, is_plain, linear

Rotation = tuple[Tensor, Tensor]
LARGEST_MERGED = 2**24  # parameters; beyond, products take so long that their number does not matter, and copies are large


class LlamaTrunk(Trunk):
    """Rotary positions, root-mean-square norms, grouped key-value heads, a gated feed-forward."""

    architectures = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._rotations: Rotation | None = None

    def prepare(self, limit: int) -> None:
        """See `Trunk`: a table of cosines and sines, which transformers computes at each step anew."""
        dtype, device = self.dtype, self.model.rotary_emb.inv_freq.device
        known = self._rotations
        if known is not None and len(known[0]) >= limit and known[0].dtype == dtype and known[0].device == device:
            return
        positions = torch.arange(1 << (limit - 1).bit_length(), device=device)
        cosines, sines = self.model.rotary_emb(torch.empty(0, dtype=dtype, device=device), positions.unsqueeze(0))
        self._rotations = (cosines[0].unsqueeze(1), sines[0].unsqueeze(1))

    @classmethod
    def supports(cls, model: PreTrainedModel) -> bool:
        """Rotary frequencies must not depend on the length of the batch."""
        config: Any = model.config
        return config.rope_parameters["rope_type"] not in ("dynamic", "longrope")

    def layers(self) -> nn.ModuleList:
        """See `Trunk`."""
        layers: nn.ModuleList = self.model.layers
        return layers

    def bypassed(self) -> Iterator[nn.Module]:
        """See `Trunk`."""
        yield self.model
        for layer in self.model.layers:
            yield from (layer, layer.self_attn, layer.mlp)

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        """See `Trunk`; the rest is the cosines and sines of the tokens' positions, (N, 1, d) each."""
        states = self.model.embed_tokens(ids)
        assert self._rotations is not None, "`prepare` comes first"
        cosines, sines = self._rotations
        return states, (cosines.index_select(0, positions), sines.index_select(0, positions))

    def run_layer(self, index: int, layer: Any, states: Tensor, context: Rotation, attend: Attention) -> Tensor:
        """See `Trunk`."""
        normed = _norm(layer.input_layernorm, states)
        seen = attend(index, *self._queries_keys_values(index, layer.self_attn, normed, context))
        states = states + linear(layer.self_attn.o_proj, seen)
        gate, up = self._gate_and_up(index, layer.mlp, _norm(layer.post_attention_layernorm, states))
        return states + linear(layer.mlp.down_proj, activation(layer.mlp.act_fn)(gate) * up)

    def finish(self, states: Tensor) -> Tensor:
        """See `Trunk`."""
        return _norm(self.model.norm, states)

    def for_decoding(self) -> Trunk:
        """See `Trunk`: small models get their parallel projections side by side in one matrix."""
        mergeable = all(_is_mergeable(group) for layer in self.model.layers for group in _groups(layer))
        small = sum(parameter.numel() for parameter in self.model.layers.parameters()) <= LARGEST_MERGED
        return _MergedLlamaTrunk(self) if mergeable and small and not hasattr(self.model.layers[0].self_attn, "q_norm") else self

    def _queries_keys_values(self, index: int, block: Any, normed: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """(N, heads, d) and twice (N, key-value heads, d), positions turned into them."""
        del index
        heads = (normed.shape[0], -1, self.head_size)
        queries, keys, values = (linear(module, normed).view(heads) for module in (block.q_proj, block.k_proj, block.v_proj))
        if hasattr(block, "q_norm"):  # Qwen3
            queries, keys = _norm(block.q_norm, queries), _norm(block.k_norm, keys)
        return _rotate(queries, rotation), _rotate(keys, rotation), values

    def _gate_and_up(self, index: int, block: Any, normed: Tensor) -> tuple[Tensor, Tensor]:
        del index
        return linear(block.gate_proj, normed), linear(block.up_proj, normed)

    def _head_size(self) -> int:
        return int(self.model.layers[0].self_attn.head_dim)


class _MergedLlamaTrunk(LlamaTrunk):
    """The same over copies of the weights that are good for one decode loop: two products a layer in the place of five.

    Args:
        trunk: whose weights are copied.
    """

    def __init__(self, trunk: LlamaTrunk) -> None:
        super().__init__(trunk.model)
        self._rotations = trunk._rotations
        groups = [_groups(layer) for layer in self.model.layers]
        self._attention = [_side_by_side(attention) for attention, _ in groups]
        self._feed_forward = [_side_by_side(feed_forward) for _, feed_forward in groups]
        queries, keys, _ = (module.out_features // self.head_size for module in groups[0][0])
        self._heads, self._rotated = queries, queries + keys

    def _queries_keys_values(self, index: int, block: Any, normed: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        heads = functional.linear(normed, *self._attention[index]).view(normed.shape[0], -1, self.head_size)
        turned = _rotate(heads[:, : self._rotated], rotation)
        return turned[:, : self._heads], turned[:, self._heads :], heads[:, self._rotated :]

    def _gate_and_up(self, index: int, block: Any, normed: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = functional.linear(normed, *self._feed_forward[index]).chunk(2, -1)
        return gate, up


def _groups(layer: Any) -> tuple[list[Any], list[Any]]:
    """The projections of a layer that read the same: queries, keys and values; gate and up."""
    block = layer.self_attn
    return [block.q_proj, block.k_proj, block.v_proj], [layer.mlp.gate_proj, layer.mlp.up_proj]


def _is_mergeable(group: list[Any]) -> bool:
    return all(type(module) is nn.Linear and is_plain(module) for module in group) and len({module.bias is None for module in group}) == 1


def _side_by_side(modules: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Returns the weight and bias of projections of one input as one projection."""
    weights: list[Tensor] = [module.weight for module in modules]
    biases: list[Tensor] = [module.bias for module in modules if module.bias is not None]
    return torch.cat(weights), torch.cat(biases) if biases else None


def _norm(module: Any, states: Tensor) -> Tensor:
    return torch.rms_norm(states, module.weight.shape, module.weight, module.variance_epsilon)


def _rotate(vectors: Tensor, rotation: Rotation) -> Tensor:
    """Turns (N, heads, d) by the tokens' positions."""
    cosines, sines = rotation
    first, second = vectors.chunk(2, -1)
    return vectors * cosines + torch.cat((-second, first), -1) * sines
