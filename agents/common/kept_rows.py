"""The buffers and captured steps of a model, from one `generate` to the next."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

if TYPE_CHECKING:
    from textgym.agents.common.captured_rows import CapturedRows

MOST_KEPT = 4  # buffers of different numbers of columns
SHARE_OF_MEMORY = 1 / 8  # of a GPU's; training needs the rest
# Where modules come from whose way through `forward` depends on nothing but their kind; of peft, those that only hold others.
KNOWN = (
    "torch.nn.modules.",
    "transformers.models.",
    "transformers.activations",
    "transformers.pytorch_utils",
    "peft.peft_model",
    "peft.tuners.lora.model",
)
LORA = "peft.tuners.lora.layer.Linear"


class KeptRows:
    """Buffers that no decoder uses at the moment.

    A decoder takes buffers out and gives them back, so two decoders never share any. What was kept longest goes first when there are too
    many of them, and all go when the model is no longer what the steps were captured with. Copies and pickles are empty.

    Attributes:
        failed: a step of this model could not be captured; it is not tried again before `clear`.
    """

    def __init__(self) -> None:
        self.failed = False
        self._model: Hashable = None
        self._kept: list[CapturedRows] = []

    def __reduce__(self) -> tuple[type["KeptRows"], tuple[()]]:
        return KeptRows, ()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Lets all buffers go, and past failures with them."""
        self._kept.clear()
        self.failed = False

    def take(self, model: Hashable, rows: int, columns: int) -> "CapturedRows | None":
        """Returns buffers of `columns` columns with room for `rows`, if there are any.

        Args:
            model: the `fingerprint` of the model as it is now.
            rows: at least so many.
            columns: exactly so many, since every step looks at all of them.
        """
        if model != self._model:
            self.clear()
            self._model = model
        for kept in [kept for kept in self._kept if kept.columns == columns]:
            self._kept.remove(kept)
            if kept.rows >= rows:
                return kept
            # The larger one that is made now will serve in its place.
        return None

    def give_back(self, model: Hashable, rows: "CapturedRows") -> None:
        """Keeps buffers that a decoder has taken or made, if they can be used again.

        Args:
            model: the `fingerprint` of the model when the decoder began.
            rows: the buffers.
        """
        limit = memory_for_buffers(rows.logits.device)
        if self.failed or model is None or model != self._model or rows.num_bytes > limit:
            return
        self._kept.append(rows)
        while len(self._kept) > MOST_KEPT or sum(kept.num_bytes for kept in self._kept) > limit:
            self._kept.pop(0)


def memory_for_buffers(device: torch.device) -> int:
    """Returns how many bytes a model may keep there."""
    if device.type != "cuda":
        return 2**30
    return int(SHARE_OF_MEMORY * torch.cuda.get_device_properties(device).total_memory)


def fingerprint(model: nn.Module) -> Hashable:
    """Returns what captured steps have frozen of a model: they are valid as long as this stays equal. None: that cannot be told.

    A graph reads parameters where they were when it was captured. An optimiser that changes them in place is none of its business; what
    moves or replaces them is. It also goes on in the way that Python's code took: so only modules are trusted of which it is known what
    decides that, without hooks. Autocast computes with copies of the weights that it throws away: captures under it last for one loop.
    """
    if _has_any_global_hook():
        return None
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if any(torch.is_autocast_enabled(device) for device in {tensor.device.type for _, tensor in tensors}):
        return None
    ways = tuple(_way(module) for module in model.modules())
    if None in ways or not all(type(tensor) in (Tensor, nn.Parameter) for _, tensor in tensors):
        return None
    places = ((name, tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in tensors)
    return tuple(places), ways


def _way(module: nn.Module) -> Hashable:
    """Returns what decides how a module's `forward` goes on; None where that is not known."""
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return None
    numbers = tuple((name, value) for name, value in vars(module).items() if isinstance(value, bool | int | float | str))
    if f"{kind.__module__}.{kind.__qualname__}" == LORA:
        layer: Any = module
        adapters = (tuple(layer.active_adapters), tuple(layer.merged_adapters), tuple(layer.scaling.items()))
        cast = getattr(layer, "cast_input_dtype_enabled", True)
        return None if layer.lora_variant else (kind, layer.disable_adapters, *adapters, cast)
    return (kind, numbers) if kind.__module__.startswith(KNOWN) else None
