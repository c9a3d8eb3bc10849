"""Which device an argument means, and what it can compute with; one rule for Python and for the command line."""

from typing import Any

import torch


def as_device(device: torch.device | str, argument: str = "device") -> torch.device:
    """Returns the device that is meant; "auto" is a GPU if there is one, else the CPU.

    Args:
        device: a device or its name.
        argument: what the error message calls it.

    Raises:
        ValueError: there is no such device, or it cannot be used here. Nothing falls back to another one.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise ValueError(
            f"`{argument}` must be a device that can be used here, got {str(device)!r}: {reason}. 'auto' takes what there is."
        ) from error
    return found


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 in hardware: newer GPUs, CPUs with AVX512-BF16, AMX or ARM's BF16.

    Args:
        device: a device that can be used here.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
