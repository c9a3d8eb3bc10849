"""What the trunks of all architectures have in common."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Protocol, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

Part: TypeAlias = Callable[[Tensor], Tensor]


class Attention(Protocol):
    """Lets tokens look at each other; who sees whom is this object's business alone."""

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Returns what N tokens have seen, (N, heads * d), from (N, heads, d), (N, key-value heads, d) and the same."""
        ...


class Trunk(ABC):
    """The layers of one architecture over a flat line of tokens.

    Parameters are read from the model's own modules at every call (of one `for_decoding`: once), and its projections are called as modules
    wherever they are not plain ones, so that LoRA adapters and quantised layers work and training changes what it should.

    Args:
        model: the transformers model without its language-model head; of one of `architectures`.
    """

    architectures: ClassVar[tuple[str, ...]]
    """Names of the transformers classes that a subclass knows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.head_size = self._head_size()
        self._found: list[Any] | None = None

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attention) -> Tensor:
        """Returns the last hidden states, (N, H), of tokens `ids` (N,) int64 at `positions` (N,) int64.

        With the model's gradient checkpointing on, each layer's activations are made again in the backward pass.
        """
        states, context = self.embed(ids, positions)
        again = torch.is_grad_enabled() and getattr(self.model, "gradient_checkpointing", False)
        for index, layer in enumerate(self.layers() if self._found is None else self._found):
            if again:
                states = checkpoint(self.run_layer, index, layer, states, context, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                states = self.run_layer(index, layer, states, context, attend)
        return self.finish(states)

    @abstractmethod
    def prepare(self, limit: int) -> None:
        """Works out what depends on positions alone, for those below `limit`; called before a run."""

    def for_decoding(self) -> "Trunk":
        """Returns a trunk for one decode loop, during which no parameter changes: finding them takes time at each of its steps."""
        trunk = copy.copy(self)
        trunk._found = self.layers()
        return trunk

    def with_own_tables(self, limit: int) -> Self:
        """Returns a trunk prepared for positions below `limit`, whose tables stay whatever this one is prepared for later."""
        trunk = copy.copy(self)
        trunk.prepare(limit)
        return trunk

    def checkpoint_gradients(self) -> None:
        """Turns the model's gradient checkpointing on."""
        name = "activation_checkpointing_enable"  # the old one, which transformers calls deprecated once it has this
        getattr(self.model, name if hasattr(self.model, name) else "gradient_checkpointing_enable")()
        self.model.disable_input_require_grads()  # that is for reentrant checkpoints, and a hook on the embeddings in every pass

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def unchanged(self) -> bool:
        """Whether nothing hangs on the modules whose forward is bypassed: a hook of the user's must not go unheard."""
        return not any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in module.__dict__
            for module in self.bypassed()
        )

    @classmethod
    @abstractmethod
    def supports(cls, model: PreTrainedModel) -> bool:
        """Whether this model's configuration asks for nothing that the trunk does not do."""

    @abstractmethod
    def layers(self) -> list[Any]:
        """Returns what `run_layer` takes of each decoder layer: its parts as functions."""

    @abstractmethod
    def bypassed(self) -> Iterator[nn.Module]:
        """The modules that are never called as such."""

    @abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
        """Returns the first hidden states, (N, H), and what else every layer needs."""

    @abstractmethod
    def run_layer(self, index: int, layer: Any, states: Tensor, context: Any, attend: Attention) -> Tensor:
        """Returns the hidden states after a layer, (N, H)."""

    @abstractmethod
    def finish(self, states: Tensor) -> Tensor:
        """Applies the last norm."""

    @abstractmethod
    def _head_size(self) -> int:
        """Returns the dimensions of one head, d."""


def is_plain(module: nn.Module) -> bool:
    """Whether a projection is a matrix product with weights and nothing else."""
    return type(module) in (nn.Linear, Conv1D) and not module._forward_hooks and not module._forward_pre_hooks


def projection(module: nn.Module) -> Part:
    """Returns a projection as a function from (N, in) to (N, out); the plain kinds without the detour through their `forward`."""
    if not is_plain(module):
        return module
    if type(module) is nn.Linear:
        return partial(functional.linear, weight=module.weight, bias=module.bias)
    return partial(torch.addmm, module.bias, mat2=module.weight)


def activation(module: nn.Module) -> Part:
    """Returns a fused form of an activation module if there is one, else the module."""
    if type(module) in (NewGELUActivation, GELUTanh):
        # One kernel, where transformers' "gelu_new" spells out the formula in eight.
        return partial(functional.gelu, approximate="tanh")
    return module
