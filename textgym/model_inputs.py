"""From an observation to what a transformers model takes. Torch is imported when the function is called."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def model_inputs(observation: Mapping[str, Any], device: "torch.device | str | None" = None) -> "dict[str, torch.Tensor]":
    """Returns an observation as the keyword arguments of a transformers model: `model(**model_inputs(observation))`.

    The prompt is left-padded, so a model with learned positions (GPT-2) needs the `position_ids` that are added here: each real token's
    place counted from the first real token. Without them its log-probs are wrong by several nats.

    The columns after the last token of the longest row hold fillers for every row; they are cut off, so that the logits of the next
    token stand at `[:, -1]` of a row that is as long as the longest.

    Args:
        observation: an observation of `TextGen-v0`, (L,), or a batch of them, (B, L).
        device: where the tensors go; the default device if None.

    Returns:
        `input_ids`, `attention_mask` and `position_ids`, each (B, C) int64 with C <= L; B is 1 for a single observation.
    """
    import torch

    ids = np.atleast_2d(np.asarray(observation["input_ids"]))
    mask = np.atleast_2d(np.asarray(observation["attention_mask"]))
    if ids.shape != mask.shape or ids.ndim != 2:
        raise ValueError(
            "`observation` must have `input_ids` and `attention_mask` of the same shape, (L,) or (B, L), "
            f"got {np.shape(observation['input_ids'])} and {np.shape(observation['attention_mask'])}."
        )
    used = np.flatnonzero(mask.any(axis=0))
    width = int(used[-1]) + 1 if len(used) else ids.shape[1]
    arrays = {"input_ids": ids[:, :width], "attention_mask": mask[:, :width]}
    tensors = {name: torch.tensor(array, dtype=torch.int64, device=device) for name, array in arrays.items()}
    tensors["position_ids"] = (tensors["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return tensors
