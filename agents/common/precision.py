"""The dtype of the weights, and that of the products: so that steps of the learning rate do not round away.

bfloat16 has eight significant bits: near 0.02 its numbers are 1e-4 apart, and a step of Adam, about as long as the learning rate, changes
nothing if it is shorter than half of that. Weights that are trained are float32 for that reason; products may be bfloat16 (`autocast`).
"""

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from textgym.agents.common.devices import has_bfloat16_units

logger = logging.getLogger(__name__)
CHECKPOINT, AUTO = "checkpoint", "auto"
HALF = (torch.bfloat16, torch.float16)
_told: set[str] = set()


def name_of(dtype: torch.dtype) -> str:
    """Returns "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def half_dtype(autocast: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the dtype that `autocast` names."""
    dtype = getattr(torch, autocast, autocast) if isinstance(autocast, str) else autocast
    if dtype is not None and dtype not in HALF:
        raise ValueError(f"`autocast` must be 'bfloat16', 'float16' or None, got {autocast!r}. None computes in the dtype of the weights.")
    return dtype


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """Returns "auto", "checkpoint" or the floating dtype that is named; anything else is a `ValueError`."""
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found in (AUTO, CHECKPOINT) or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ValueError(f"`dtype` must be 'auto', 'checkpoint' or a floating dtype such as 'float32' or 'bfloat16', got {dtype!r}.")


def stored_dtype(config: Any) -> torch.dtype | None:
    """Returns the dtype that a configuration of transformers says the weights were saved in, None where it says none."""
    for one in (config, config.get_text_config()):
        found = getattr(one, "dtype", None)
        found = getattr(torch, found, None) if isinstance(found, str) else found
        if isinstance(found, torch.dtype):
            return found
    return None


def products_for(stored: torch.dtype, device: torch.device) -> torch.dtype | None:
    """Returns in what the products of float32 weights are taken that were saved in `stored`; None: in float32.

    float16 is left alone: its gradients vanish without a scaling of the loss, which no agent has.

    Args:
        stored: the dtype of the file.
        device: where the model will be.
    """
    return torch.bfloat16 if stored == torch.bfloat16 and has_bfloat16_units(device) else None


def tell_once(path: str, stored: torch.dtype, autocast: torch.dtype | None) -> None:
    """Logs what became of the weights of `path`, once in a process."""
    if path in _told:
        return
    _told.add(path)
    products = "float32 too" if autocast is None else f"{name_of(autocast)} (`autocast`)"
    logger.warning(
        "%s is stored in %s; its weights are loaded as float32, so that no step of training rounds away, and products are %s. "
        'dtype="checkpoint" loads them as they are stored, with half the memory.',
        path,
        name_of(stored),
        products,
    )


def warn_of_rounding(name: str, parameters: Iterable[Tensor], learning_rates: Sequence[float]) -> None:
    """Warns, once, where weights of half precision are trained: of the share that a step of the learning rate can move.

    Adam's first steps are about as long as the learning rate, so w is moved by one if w ± learning rate is another number than w.

    Args:
        name: what is trained, as an argument.
        parameters: those that are trained.
        learning_rates: those that the schedule takes; the largest counts.
    """
    rate, moved, count, dtype = max(learning_rates), 0, 0, None
    for parameter in parameters:
        count += parameter.numel()
        moves = _moves(parameter.detach(), rate)
        if parameter.dtype in HALF:
            dtype = parameter.dtype
        moved += moves
    if dtype is None or rate <= 0:
        return
    warnings.warn(
        f"`{name}` has {name_of(dtype)} weights, of which one step of the learning rate {rate:g} can move {100 * moved / count:.1f} %: the "
        'others round back to what they were. Load it with `dtype="float32", autocast="bfloat16"`, which computes in bfloat16 and loses '
        "no step.",
        stacklevel=4,
    )


def _moves(weights: Tensor, rate: float) -> int:
    """Returns how many weights are another number when a step of ± `rate` is taken, in their own dtype."""
    if weights.dtype not in HALF:
        return weights.numel()
    wide = weights.float()
    return int((((wide + rate).to(weights.dtype) != weights) | ((wide - rate).to(weights.dtype) != weights)).sum())
