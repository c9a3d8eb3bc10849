"""Where tensors begin in memory: a file's begin where its header ends, and arithmetic may round otherwise there.

Kernels of matrix products choose their order of summation by the address as well as by the shape, on some processors. A tensor that torch
allocates begins at a multiple of 64 bytes; one that is mapped from a safetensors file begins anywhere. So what is loaded is moved, once,
and a model gives the same numbers to the last bit whether it was made in memory or read from a file.
"""

import os
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

    Model = TypeVar("Model", bound=nn.Module)

ALIGNMENT = 64  # bytes; what torch's own allocator keeps to on the CPU


def aligned(model: "Model") -> "Model":
    """Moves every parameter and buffer of a model that does not begin at a multiple of 64 bytes; returns the model.

    The parameters stay the same objects, and what shares memory with another goes on sharing it. Other devices have allocators of their
    own, onto which everything is copied; nothing is done there.

    Args:
        model: any module.
    """
    moved: dict[tuple[object, ...], Tensor] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        if _is_aligned(tensor):
            continue
        place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if place not in moved:
            moved[place] = tensor.detach().clone()
        tensor.data = moved[place]
    return model


def load_tensors(path: str | os.PathLike[str], device: str = "cpu") -> "dict[str, Tensor]":
    """Reads a safetensors file into memory of torch's own.

    Args:
        path: the file.
        device: where the tensors go.
    """
    from safetensors.torch import load_file

    return {name: tensor if _is_aligned(tensor) else tensor.clone() for name, tensor in load_file(os.fspath(path), device=device).items()}


def _is_aligned(tensor: "Tensor") -> bool:
    """Whether a tensor begins where torch would put it; true of those that have no address in the CPU's memory."""
    import torch

    if tensor.device.type != "cpu" or tensor.layout != torch.strided or type(tensor.data) is not torch.Tensor:
        return True
    return tensor.data_ptr() % ALIGNMENT == 0
