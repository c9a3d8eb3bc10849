"""What a model does to the outputs of its head before they are its logits: nothing, scale, divide, or cap them.

A few architectures do (Cohere, Granite, Gemma, Falcon H1). What a model does is read off by putting known numbers in the place of the
head's outputs: so the answer does not depend on the weights, which may be new, zero, or replaced later.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LARGEST = 64.0  # the known numbers go from minus this to this, so that a cap bends them visibly
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # of `_LARGEST`


class Rescaling:
    """Picklable function from a head's outputs to logits.

    Args:
        kind: "times", "over", or "cap" (value · tanh(x / value)).
        value: the factor, the divisor, or the cap.
    """

    def __init__(self, kind: str, value: float) -> None:
        self.kind, self.value = kind, value

    def __call__(self, logits: Tensor) -> Tensor:
        """Applies it to (..., V)."""
        if self.kind == "times":
            return logits * self.value
        if self.kind == "over":
            return logits / self.value
        return torch.tanh(logits / self.value) * self.value


@torch.no_grad()
def find_rescaling(base: Any, head: nn.Module, trunk: Any, ids: Tensor) -> tuple[bool, Rescaling | None]:
    """Finds how a model's logits follow from its trunk's last hidden states.

    Args:
        base: the transformers causal LM.
        head: its output embeddings.
        trunk: its base model.
        ids: (1, S) int64, any tokens.

    Returns:
        Whether logits = rescaling(head(hidden states)), and the rescaling; None for none. The candidates are made of the numbers in the
        configuration.
    """
    with _recorded(head) as heard:
        base(input_ids=ids, use_cache=False)
    states = trunk(input_ids=ids, use_cache=False).last_hidden_state
    if not _same(heard.inputs, states):
        return False, None
    shape, dtype = heard.outputs[0].shape, heard.outputs[0].dtype
    # In an order that rises and falls: what depends on neighbours, or on a maximum, fits no candidate.
    known = torch.linspace(-_LARGEST, _LARGEST, shape.numel(), device=ids.device)
    known = known[torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(0)).to(ids.device)].view(shape).to(dtype)
    with _replaced(head, known):
        logits = base(input_ids=ids, use_cache=False).logits
    if logits.shape != known.shape:
        return False, None
    candidates: list[Rescaling | None] = [None, *_candidates(base.config)]
    errors = [float(((known if one is None else one(known)).float() - logits.float()).abs().max()) for one in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    # Of the size of the logits: what divides much leaves little to compare.
    size = min(float(logits.float().abs().max()), _LARGEST)
    return errors[best] <= _TOLERANCE.get(dtype, 0.0) * size, candidates[best]


class _Heard:
    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        self.inputs.append(inputs[0])
        self.outputs.append(outputs)


@contextlib.contextmanager
def _recorded(head: nn.Module) -> Iterator[_Heard]:
    heard = _Heard()
    handle = head.register_forward_hook(heard)
    try:
        yield heard
    finally:
        handle.remove()


@contextlib.contextmanager
def _replaced(head: nn.Module, outputs: Tensor) -> Iterator[None]:
    handle = head.register_forward_hook(lambda module, inputs, own: outputs.clone())
    try:
        yield
    finally:
        handle.remove()


def _same(heard: list[Tensor], states: Tensor) -> bool:
    """Whether the head was called once, on the trunk's last hidden states as they are."""
    if len(heard) != 1 or heard[0].shape != states.shape:
        return False
    tolerance = _TOLERANCE.get(states.dtype, 0.0)
    return bool(torch.allclose(heard[0].float(), states.float(), rtol=tolerance, atol=tolerance * float(states.float().abs().max())))


def _candidates(config: Any) -> list[Rescaling]:
    numbers = {**vars(config), **vars(config.get_text_config())}
    values = {float(value) for value in numbers.values() if isinstance(value, int | float) and not isinstance(value, bool)}
    values = {value for value in values if value not in (0.0, 1.0) and abs(value) < float("inf")}
    return [Rescaling(kind, value) for value in sorted(values) for kind in ("times", "over", "cap")]
