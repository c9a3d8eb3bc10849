"""Finding the trunk for a model, and making sure that it computes what the model does."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from textgym.agents.common.trunks.base import Trunk
from textgym.agents.common.trunks.gpt2 import GPT2Trunk
from textgym.agents.common.trunks.llama import LlamaTrunk
from textgym.agents.common.trunks.rows_attention import Grid, RowsAttention

TRUNKS: tuple[type[Trunk], ...] = (GPT2Trunk, LlamaTrunk)
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def find_trunk(model: nn.Module) -> Trunk | None:
    """Returns the trunk that runs a transformers base model, or None where transformers must.

    That is the case for architectures that no trunk knows, for attention kernels other than "sdpa" (so
    `attn_implementation="eager"` is a way to ask for transformers' own forward), for models spread over several devices, and wherever
    the hidden states of a few tokens are not those of transformers.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or config._attn_implementation != "sdpa" or getattr(model, "hf_device_map", None):
        return None
    if getattr(config, "sliding_window", None) and "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",)):
        return None
    for kind in TRUNKS:
        if type(model).__name__ in kind.architectures and type(model).__module__.startswith("transformers.") and kind.supports(model):
            trunk = kind(model)
            return trunk if trunk.unchanged and _agrees(trunk) else None
    return None


@torch.no_grad()
def _agrees(trunk: Trunk) -> bool:
    """Compares the hidden states of two rows of three tokens."""
    model: Any = trunk.model
    embedding: Any = model.get_input_embeddings()
    ids = (torch.arange(6, device=embedding.weight.device) % embedding.weight.shape[0]).view(2, 3)
    expected = model(input_ids=ids, use_cache=False).last_hidden_state
    positions = torch.arange(3, device=ids.device).repeat(2)
    try:
        trunk.prepare(3)
        found = trunk(ids.flatten(), positions, RowsAttention(Grid(2, 3))).view_as(expected)
    except AttributeError:  # a part is not of its usual kind, such as a norm that an adapter has replaced
        return False
    tolerance = TOLERANCE.get(expected.dtype)
    return tolerance is not None and bool(torch.allclose(found, expected, rtol=tolerance, atol=tolerance))
