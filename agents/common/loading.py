"""Loading a causal LM and its tokenizer from a folder or the hub, adapters included."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from textgym.agents.common.adapters import adapter_folder, load_adapters, load_outside
from textgym.agents.common.precision import AUTO, CHECKPOINT, HALF, checked_dtype, stored_dtype
from textgym.tokenizers import load_tokenizer

ADAPTER_FILE = "adapter_config.json"


class LoadedModel(NamedTuple):
    """What was loaded.

    Attributes:
        model: the transformers or peft model.
        tokenizer: its tokenizer.
        widened: the half-precision dtype that the weights were stored in, where they were loaded as float32; else None.
    """

    model: Any
    tokenizer: Any
    widened: torch.dtype | None


def load_model(path: str | os.PathLike[str], dtype: torch.dtype | str, trust_remote_code: bool, lora: Any) -> LoadedModel:
    """Loads model and tokenizer; see `CausalLMPolicy.from_pretrained` for the arguments.

    Raises:
        ValueError: there is none, or the model that an adapter belongs to cannot be found.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.fspath(path)
    dtype = checked_dtype(dtype)
    _check_source(name)
    is_adapter = (adapter_folder(Path(name)) / ADAPTER_FILE).is_file()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": Path(name).is_dir()}
    if is_adapter:
        _check_base(adapter_folder(Path(name)))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True) if trust_remote_code else load_tokenizer(name)
        # What lies frozen under an adapter takes no steps that could round away; the adapter itself is float32 (peft's own rule).
        plain, widened = AUTO if dtype == CHECKPOINT else dtype, None
        model: Any
        if is_adapter:
            model = load_adapters(Path(name), dtype=plain, trust_remote_code=trust_remote_code)
        elif dtype == AUTO and lora is None:
            model, widened = load_for_training(AutoModelForCausalLM, name, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=plain, **options)
    except (OSError, ValueError) as error:
        what = f"no causal language model with its tokenizer could be loaded from {name!r}"
        if is_adapter:
            what = f"the adapter in {name!r} belongs to the model {_base_of(adapter_folder(Path(name)))!r}, and the two could not be loaded"
        raise ValueError(
            f"`path`: {what}; give a folder that holds both, or an id of the Hugging Face hub that can be reached from here. "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    load_outside(model, Path(name))
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)
    return LoadedModel(model, tokenizer, widened)


def load_for_training(loader: Any, name: str, **options: Any) -> tuple[Any, torch.dtype | None]:
    """Loads a model in the dtype it was stored in, but half precision as float32; returns it, and that dtype if it was widened.

    It is loaded as float32 and not converted, because some models compute constants while they are made, in their dtype. Quantised weights,
    which nobody trains, stay as they are.

    Args:
        loader: an auto class of transformers.
        name: a folder, or an id of the hub.
        **options: for `from_pretrained`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, **options)
    stored = stored_dtype(config)
    if getattr(config, "quantization_config", None) is not None:
        return loader.from_pretrained(name, dtype=AUTO, **options), None
    if stored is None:
        model = loader.from_pretrained(name, dtype=AUTO, **options)
        stored = model.dtype
        if stored not in HALF:
            return model, None
    if stored not in HALF:
        return loader.from_pretrained(name, dtype=AUTO, **options), None
    return loader.from_pretrained(name, dtype=torch.float32, **options), stored


def _check_source(name: str) -> None:
    """A path that does not exist should say so, instead of asking a hub for a repository of that name."""
    if _looks_like_path(name) and not Path(name).is_dir():
        raise ValueError(f"`path`: there is no folder {name!r}; give one that `save_pretrained` wrote, or an id of the Hugging Face hub.")


def _check_base(folder: Path) -> None:
    """The model that an adapter belongs to must be there."""
    base = _base_of(folder)
    if not base or (_looks_like_path(base) and not Path(base).is_dir()):
        where = f"the folder {base!r}, which does not exist" if base else "a model that it does not name"
        raise ValueError(
            f"`path`: {str(folder)!r} holds an adapter of {where}. Put that model there, or its place into `base_model_name_or_path` of "
            f"{ADAPTER_FILE}."
        )


def _base_of(folder: Path) -> Any:
    """Returns the place of the model that an adapter belongs to."""
    return json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name
