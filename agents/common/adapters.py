"""Adapters of peft: which parameters they train, what is trained besides, and whether they change their model's outputs yet."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from textgym.alignment import load_tensors

OUTSIDE_FILE, NAMES_FILE = "trained_outside_adapter.safetensors", "adapters.json"


def is_adapter(model: Any) -> bool:
    """Whether a model is a peft model: its adapter is trained, most of its weights are not."""
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


def adds_nothing(model: Any) -> bool:
    """Whether the outputs of a peft model are those of the model under it, and nothing but LoRA's two matrices is trained.

    Both hold of a fresh LoRA adapter, whose product B A begins at 0; other kinds are not looked into. Then the model with its adapter
    off is, and stays, what the policy is now.

    Args:
        model: a peft model.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    matrices: set[int] = set()
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        other_kind = not isinstance(layer, LoraLayer) or hasattr(layer, "lora_E")  # AdaLoRA's third factor
        if other_kind or layer.merged or layer.disable_adapters or getattr(layer, "lora_variant", None):
            return False
        for name in layer.active_adapters:
            factors = [list(_factor(layer, side, name)) for side in ("A", "B")]
            if all(any(bool(tensor.any()) for tensor in factor) for factor in factors):
                return False
        matrices |= {id(tensor) for name in layer.active_adapters for side in ("A", "B") for tensor in _factor(layer, side, name)}
    return {id(parameter) for parameter in model.parameters() if parameter.requires_grad} <= matrices


def _factor(layer: Any, side: str, name: str) -> Iterator[Tensor]:
    """Yields the tensors of A or of B of one adapter in a LoRA layer (a linear map with its bias, or the table of an embedding)."""
    modules, tables = getattr(layer, f"lora_{side}"), getattr(layer, f"lora_embedding_{side}")
    if name in modules:
        yield from modules[name].parameters()
    if name in tables:
        yield tables[name]


def adapter_parameters(model: Any) -> list[nn.Parameter]:
    """Returns the parameters of a peft model that it does not have with its adapters off."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            layer: Any = module
            own = tuple(layer.adapter_layer_names)
            inside = tuple(f"{name}." for name in own)
            found += [parameter for name, parameter in layer.named_parameters() if name in own or name.startswith(inside)]
    return found


def merged_layers(model: nn.Module) -> int:
    """Returns how many layers of a model have an adapter merged into their weights."""
    return sum(bool(getattr(module, "merged_adapters", None)) for module in model.modules())


def trained_outside(model: Any) -> dict[str, nn.Parameter]:
    """Returns the parameters of a peft model that are trained though no adapter holds them (biases, a norm that was unfrozen), by name."""
    inside = {id(parameter) for parameter in adapter_parameters(model)}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}


def save_names(model: Any, folder: Path) -> None:
    """Writes which adapters there are, which are active and what is trained, where that is not one adapter called "default".

    Args:
        model: a peft model.
        folder: where its `save_pretrained` has just written; peft puts an adapter of another name into a folder of that name.
    """
    (folder / NAMES_FILE).unlink(missing_ok=True)
    names = list(model.peft_config)
    if names != ["default"]:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        document = {"adapters": names, "active": list(model.base_model.active_adapters), "trained": trained}
        (folder / NAMES_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load_adapters(folder: Path, **options: Any) -> Any:
    """Returns the model that adapters in a folder belong to, with all of them on it, those active that were.

    Args:
        folder: what `save_pretrained` of a policy or of peft wrote.
        **options: for `from_pretrained` of the model.
    """
    from peft import AutoPeftModelForCausalLM

    if not (folder / NAMES_FILE).is_file():
        return AutoPeftModelForCausalLM.from_pretrained(str(folder), is_trainable=True, **options)
    document = json.loads((folder / NAMES_FILE).read_text(encoding="utf-8"))
    first, *others = document["adapters"]
    model: Any = AutoPeftModelForCausalLM.from_pretrained(
        str(adapter_folder(folder, first)), adapter_name=first, is_trainable=True, **options
    )
    for name in others:
        model.load_adapter(str(adapter_folder(folder, name)), adapter_name=name, is_trainable=True)
    if len(document["active"]) == 1:
        model.set_adapter(document["active"][0])
    else:
        model.base_model.set_adapter(document["active"])
    trained = set(document["trained"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def adapter_folder(folder: Path, name: str = "") -> Path:
    """Returns where an adapter lies in a folder of several; without a name, the first of them."""
    if not name and (folder / NAMES_FILE).is_file():
        name = json.loads((folder / NAMES_FILE).read_text(encoding="utf-8"))["adapters"][0]
    return folder if name in ("", "default") else folder / name


def save_outside(model: Any, folder: Path) -> None:
    """Writes beside an adapter what is trained outside of it and peft did not write, if there is any; of that a warning speaks.

    Args:
        model: a peft model.
        folder: where its `save_pretrained` has just written.
    """
    (folder / OUTSIDE_FILE).unlink(missing_ok=True)
    written: set[str] = set()
    for path in (adapter_folder(folder, name) / "adapter_model.safetensors" for name in model.peft_config):
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                written |= set(file.keys())
    left = {name: parameter.detach().cpu().contiguous() for name, parameter in trained_outside(model).items() if name not in written}
    if not left:
        return
    save_file(left, folder / OUTSIDE_FILE)
    warnings.warn(
        f"Besides the adapter {', '.join(list(left)[:3])}{', ...' if len(left) > 3 else ''} of the model under it are trained, which peft "
        f"does not save. They are written into {OUTSIDE_FILE}, which textgym reads and others do not; "
        "`policy.model.merge_and_unload().save_pretrained(folder)` writes a whole model that everybody reads.",
        stacklevel=3,
    )


def load_outside(model: Any, folder: Path) -> None:
    """Reads what `save_outside` wrote, if there is any: these parameters have their values again, and are trained."""
    if not (folder / OUTSIDE_FILE).is_file():
        return
    parameters = dict(model.named_parameters())
    for name, tensor in load_tensors(folder / OUTSIDE_FILE).items():
        with torch.no_grad():
            parameters[name].copy_(tensor)
        parameters[name].requires_grad_(True)


def check_reference(policy: Any, reference: Any) -> None:
    """Raises a `ValueError` if training a policy would move its reference: if the two share weights that are trained.

    Args:
        policy: a `CausalLMPolicy`.
        reference: another one, or the same.
    """
    shared = {id(parameter) for parameter in reference.model.parameters()}
    if reference.backbone.frozen is not None:
        shared -= {id(parameter) for parameter in reference.backbone.frozen.parameters}
    if reference.backbone.without_adapter:
        shared -= {id(parameter) for parameter in adapter_parameters(reference.model)}
    moving = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad and id(parameter) in shared]
    if moving:
        raise ValueError(
            f"`reference` must stay as it is, but shares weights with `policy` that are trained: {', '.join(moving[:3])}"
            f"{', ...' if len(moving) > 3 else ''}. Make it with `policy.reference()`, after choosing which weights are trained."
        )
