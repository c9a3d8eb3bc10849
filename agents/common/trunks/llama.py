"""The trunk of Llama (Touvron et al. 2023, arXiv:2302.13971) and of the models that took its layers: Mistral, Qwen2, Qwen3."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from textgym.agents.common.trunks.base import Attention, Part, Trunk, activation, is_plain, projection

Rotation = tuple[Tensor, Tensor]
Heads = tuple[Tensor, Tensor, Tensor]
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

    def layers(self) -> list[Any]:
        """See `Trunk`."""
        return [_Layer(layer, self.head_size) for layer in self.model.layers]

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

    def run_layer(self, index: int, layer: "_Layer", states: Tensor, context: Any, attend: Attention) -> Tensor:
        """See `Trunk`."""
        states = states + layer.output(attend(index, *layer.attention(layer.first_norm(states), context)))
        normed = layer.second_norm(states)
        return states + layer.down(layer.activation(layer.gate(normed)) * layer.up(normed))

    def finish(self, states: Tensor) -> Tensor:
        """See `Trunk`."""
        return _norm(self.model.norm)(states)

    def for_decoding(self) -> Trunk:
        """See `Trunk`: a small model's step is short of work and long of operations, so it gets fewer."""
        small = sum(parameter.numel() for parameter in self.model.layers.parameters()) <= LARGEST_MERGED
        # There are no complex numbers of half precision.
        mergeable = small and not torch.is_autocast_enabled(self.model.device.type)
        mergeable = mergeable and all(_is_mergeable(layer.self_attn) for layer in self.model.layers)
        return Trunk.for_decoding(_MergedLlamaTrunk(self) if mergeable else self)

    def _head_size(self) -> int:
        return int(self.model.layers[0].self_attn.head_dim)


class _MergedLlamaTrunk(LlamaTrunk):
    """The same in fewer operations, over copies of weights: good for one decode loop over a small model.

    Queries, keys and values are one product, and norms need no gradient. The copies of queries and keys hold the two halves of each head's
    dimensions in turns, in both alike, which no product of the two notices: turning by positions is then one multiplication of complex
    numbers.

    Args:
        trunk: whose weights are copied.
    """

    def __init__(self, trunk: LlamaTrunk) -> None:
        super().__init__(trunk.model)
        self._rotations = trunk._rotations
        self._angles: Tensor | None = None
        self._last_norm = _quick_norm(self.model.norm)

    def layers(self) -> list[Any]:
        """See `Trunk`."""
        return [_MergedLayer(layer, self.head_size) for layer in self.model.layers]

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

    def finish(self, states: Tensor) -> Tensor:
        """See `Trunk`."""
        return self._last_norm(states)


def _norm(module: Any) -> Part:
    return partial(torch.rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=module.variance_epsilon)


def _quick_norm(module: Any) -> Part:
    """The same with half as many operations, for passes without gradient."""
    weight, size = module.weight, module.weight.numel()
    epsilon = torch.full((), module.variance_epsilon, dtype=weight.dtype, device=weight.device)

    def norm(states: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        return (states * torch.addcmul(epsilon, lengths, lengths, value=1 / size).rsqrt_()).mul_(weight)

    return norm


class _Layer:
    """The parts of one layer."""

    norm = staticmethod(_norm)

    def __init__(self, layer: Any, head_size: int) -> None:
        self.head_size = head_size
        self.first_norm, self.second_norm = self.norm(layer.input_layernorm), self.norm(layer.post_attention_layernorm)
        self.output, block = projection(layer.self_attn.o_proj), layer.mlp
        self.gate, self.up, self.down = (projection(module) for module in (block.gate_proj, block.up_proj, block.down_proj))
        self.activation = activation(block.act_fn)
        self.find_attention(layer.self_attn)

    def find_attention(self, block: Any) -> None:
        """Finds the parts that `attention` needs."""
        self.queries, self.keys, self.values = (projection(module) for module in (block.q_proj, block.k_proj, block.v_proj))
        # Qwen3 norms each head.
        self.head_norms = (_norm(block.q_norm), _norm(block.k_norm)) if hasattr(block, "q_norm") else None

    def attention(self, normed: Tensor, rotation: Any) -> Heads:
        """Returns queries, keys and values, (N, heads, d) each, the first two turned by positions."""
        shape = (normed.shape[0], -1, self.head_size)
        queries, keys, values = (project(normed).view(shape) for project in (self.queries, self.keys, self.values))
        if self.head_norms is not None:
            queries, keys = self.head_norms[0](queries), self.head_norms[1](keys)
        return _rotate(queries, rotation), _rotate(keys, rotation), values


class _MergedLayer(_Layer):
    """The parts of one layer of `_MergedLlamaTrunk`."""

    norm = staticmethod(_quick_norm)

    def find_attention(self, block: Any) -> None:
        """Copies the weights."""
        bias = None if block.q_proj.bias is None else _merged(block, "bias", self.head_size)
        self.projected = partial(functional.linear, weight=_merged(block, "weight", self.head_size), bias=bias)
        queries, keys = (module.out_features // self.head_size for module in (block.q_proj, block.k_proj))
        self.turned, self.parts = (queries, keys), (queries + keys, keys)

    def attention(self, normed: Tensor, rotation: Any) -> Heads:
        """See `_Layer`."""
        heads, values = self.projected(normed).view(normed.shape[0], -1, self.head_size).split_with_sizes(self.parts, 1)
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))
        queries, keys = torch.view_as_real(pairs * rotation).flatten(-2).split_with_sizes(self.turned, 1)
        return queries, keys, values


def _merged(block: Any, name: str, head_size: int) -> Tensor:
    """Returns weights or biases of the queries', keys' and values' projections as those of one projection."""

    def in_turns(rows: Tensor) -> Tensor:
        """The rows of each head in the order 0, d/2, 1, d/2 + 1, ..."""
        turned: Tensor = rows.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)
        return turned

    queries, keys, values = (getattr(module, name) for module in (block.q_proj, block.k_proj, block.v_proj))
    return torch.cat((in_turns(queries), in_turns(keys), values))


def _is_mergeable(block: Any) -> bool:
    """Whether an attention block's first projections are plain products, with biases in all of them or none, and heads without norms."""
    together = (block.q_proj, block.k_proj, block.v_proj)
    plain = all(type(module) is nn.Linear and is_plain(module) for module in together)
    alike = len({module.bias is None for module in together}) == 1
    return plain and alike and not hasattr(block, "q_norm") and block.q_proj.weight.dtype in (torch.float32, torch.float64)


def _rotate(vectors: Tensor, rotation: Rotation) -> Tensor:
    """Turns (N, heads, d) by the tokens' positions."""
    cosines, sines = rotation
    first, second = vectors.chunk(2, -1)
    return vectors * cosines + torch.cat((-second, first), -1) * sines
