"""Loading a causal LM and its tokenizer from a folder or the hub, adapters included."""

import os
from pathlib import Path
from typing import Any

import torch

from textgym.agents.common.adapters import load_outside
from textgym.tokenizers import load_tokenizer


def load_model(path: str | os.PathLike[str], dtype: torch.dtype | str, trust_remote_code: bool, lora: Any) -> tuple[Any, Any]:
    """Returns (model, tokenizer); see `CausalLMPolicy.from_pretrained` for the arguments."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.fspath(path)
    _check_source(name)
    loader: Any = AutoModelForCausalLM
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": Path(name).is_dir()}
    if (Path(name) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM  # an extra: needed only for adapters

        loader, options = AutoPeftModelForCausalLM, {"trust_remote_code": trust_remote_code, "is_trainable": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True) if trust_remote_code else load_tokenizer(name)
        model = loader.from_pretrained(name, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`path`: no causal language model with its tokenizer could be loaded from {name!r}; give a folder that holds both, or an id "
            f"of the Hugging Face hub that can be reached from here. {str(error).strip().splitlines()[0]}"
        ) from error
    load_outside(model, Path(name))
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)
    return model, tokenizer


def _check_source(name: str) -> None:
    """A path that does not exist should say so, instead of asking a hub for a repository of that name."""
    looks_like_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name
    if looks_like_path and not Path(name).is_dir():
        raise ValueError(f"`path`: there is no folder {name!r}; give one that `save_pretrained` wrote, or an id of the Hugging Face hub.")
