"""The trunk of Llama (Touvron et al. 2023, arXiv:2302.13971) and of the models that took its layers: Mistral, Qwen2, Qwen3."""

from collections.abc import Iterable, Iterator
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

    def layers(self) -> Iterable[Any]:
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
        block, normed = layer.self_attn, _norm(layer.input_layernorm, states)
        heads = (states.shape[0], -1, self.head_size)
        queries, keys, values = (linear(module, normed).view(heads) for module in (block.q_proj, block.k_proj, block.v_proj))
        if hasattr(block, "q_norm"):  # Qwen3
            queries, keys = _norm(block.q_norm, queries), _norm(block.k_norm, keys)
        seen = attend(index, _rotate(queries, context), _rotate(keys, context), values)
        states = states + linear(block.o_proj, seen)
        normed = _norm(layer.post_attention_layernorm, states)
        gated = activation(layer.mlp.act_fn)(linear(layer.mlp.gate_proj, normed)) * linear(layer.mlp.up_proj, normed)
        return states + linear(layer.mlp.down_proj, gated)

    def finish(self, states: Tensor) -> Tensor:
        """See `Trunk`."""
        return _norm(self.model.norm, states)

    def for_decoding(self) -> Trunk:
        """See `Trunk`: a small model's step is short of work and long of operations, so it gets fewer."""
        if torch.is_autocast_enabled(self.model.device.type):
            return self  # there are no complex numbers of half precision
        small = sum(parameter.numel() for parameter in self.model.layers.parameters()) <= LARGEST_MERGED
        return _DecodingLlamaTrunk(self) if small and all(_is_mergeable(layer) for layer in self.model.layers) else self

    def _head_size(self) -> int:
        return int(self.model.layers[0].self_attn.head_dim)


class _DecodingLlamaTrunk(LlamaTrunk):
    """The same for one decode loop over a small model: one product for queries, keys and values, and no attribute looked up twice.

    Its weights of queries and keys are copies that hold the two halves of each head's dimensions in turns, in both alike, which no product
    of the two notices: turning by positions is then one multiplication of complex numbers.

    Args:
        trunk: whose weights are read.
    """

    def __init__(self, trunk: LlamaTrunk) -> None:
        super().__init__(trunk.model)
        self._rotations = trunk._rotations
        self._layers = [_LayerWeights(layer, self.head_size) for layer in self.model.layers]
        block = self.model.layers[0].self_attn
        self._heads = block.q_proj.out_features // self.head_size
        self._turned = self._heads + block.k_proj.out_features // self.head_size
        self._angles: Tensor | None = None

    def layers(self) -> Iterable[Any]:
        """See `Trunk`."""
        return self._layers

    def prepare(self, limit: int) -> None:
        """See `Trunk`."""
        super().prepare(limit)
        assert self._rotations is not None, "prepared"
        cosines, sines = (table[..., : self.head_size // 2] for table in self._rotations)
        self._angles = torch.complex(cosines, sines)

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
        """See `Trunk`; the rest is the tokens' rotations, (N, 1, d / 2) complex."""
        assert self._angles is not None, "`prepare` comes first"
        return self.model.embed_tokens(ids), self._angles.index_select(0, positions)

    def run_layer(self, index: int, layer: "_LayerWeights", states: Tensor, context: Any, attend: Attention) -> Tensor:
        """See `Trunk`."""
        normed = torch.rms_norm(states, layer.shape, layer.first_norm, layer.eps)
        heads = functional.linear(normed, layer.attention, layer.attention_bias).view(states.shape[0], -1, self.head_size)
        pairs = torch.view_as_complex(heads[:, : self._turned].unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * context).flatten(-2)
        seen = attend(index, turned[:, : self._heads], turned[:, self._heads :], heads[:, self._turned :])
        states = states + functional.linear(seen, *layer.output)
        normed = torch.rms_norm(states, layer.shape, layer.second_norm, layer.eps)
        gated = layer.activation(functional.linear(normed, *layer.gate)) * functional.linear(normed, *layer.up)
        return states + functional.linear(gated, *layer.down)


class _LayerWeights:
    """The tensors of one layer, found once."""

    def __init__(self, layer: Any, head_size: int) -> None:
        block, feed_forward = layer.self_attn, layer.mlp
        self.first_norm, self.second_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.shape, self.eps = self.first_norm.shape, layer.input_layernorm.variance_epsilon
        self.attention = _merged(block, "weight", head_size)
        self.attention_bias = None if block.q_proj.bias is None else _merged(block, "bias", head_size)
        self.output, self.gate, self.up, self.down = (
            (module.weight, module.bias) for module in (block.o_proj, feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj)
        )
        self.activation = activation(feed_forward.act_fn)


def _merged(block: Any, name: str, head_size: int) -> Tensor:
    """Returns weights or biases of the queries', keys' and values' projections as those of one projection."""

    def in_turns(rows: Tensor) -> Tensor:
        """The rows of each head in the order 0, d/2, 1, d/2 + 1, ..."""
        turned: Tensor = rows.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)
        return turned

    queries, keys, values = (getattr(module, name) for module in (block.q_proj, block.k_proj, block.v_proj))
    return torch.cat((in_turns(queries), in_turns(keys), values))


def _is_mergeable(layer: Any) -> bool:
    """Whether `_LayerWeights` says all there is to say of a layer."""
    block, feed_forward = layer.self_attn, layer.mlp
    together = (block.q_proj, block.k_proj, block.v_proj)
    projections = (*together, block.o_proj, feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj)
    plain = all(type(module) is nn.Linear and is_plain(module) for module in projections)
    alike = len({module.bias is None for module in together}) == 1
    return plain and alike and not hasattr(block, "q_norm") and block.q_proj.weight.dtype in (torch.float32, torch.float64)


def _norm(module: Any, states: Tensor) -> Tensor:
    return torch.rms_norm(states, module.weight.shape, module.weight, module.variance_epsilon)


def _rotate(vectors: Tensor, rotation: Rotation) -> Tensor:
    """Turns (N, heads, d) by the tokens' positions."""
    cosines, sines = rotation
    first, second = vectors.chunk(2, -1)
    return vectors * cosines + torch.cat((-second, first), -1) * sines
