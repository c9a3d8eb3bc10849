"""An agent as a folder: weights and optimiser in safetensors, everything else in JSON. Nothing is pickled.

agent.json              class, constructor arguments, counters, schedules, generators' states
model/                  the policy (or reward model) and its tokenizer, readable by transformers
reference/              the frozen reference; of a policy with an adapter what is trained, as it was at the start, and nothing while
                        the reference is the model with the adapter off
critic/                 the value function, where there is one
optimizer.safetensors   the optimiser's tensors
generator.safetensors   the state of the sampling generator
extra.safetensors       further tensors of the algorithm (a replay, a target network), where it has some
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from textgym.agents.common.critic import Critic
from textgym.agents.common.schedules import schedule_from_json, schedule_to_json
from textgym.agents.policy import CausalLMPolicy
from textgym.alignment import load_tensors
from textgym.kl import AdaptiveKLController

if TYPE_CHECKING:
    from textgym.agents.base import Agent

FORMAT = 2
EXTRA_FILE, FROZEN_FILE = "extra.safetensors", "frozen.safetensors"
AgentT = TypeVar("AgentT", bound="Agent")


def save_agent(agent: "Agent", path: Path) -> None:
    """Writes `agent` to the folder `path`; what is there is replaced only when all of the new checkpoint is on the disk.

    Stable-Baselines3's callbacks name zip files; a folder is not called one.
    """
    path = path.with_suffix("") if path.suffix == ".zip" else path
    path.mkdir(parents=True, exist_ok=True)
    fresh = path / ".saving"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    agent.policy.save_pretrained(fresh / "model")
    kind = _reference_kind(agent)
    if kind == "saved":
        agent.reference.save_pretrained(fresh / "reference")
    elif kind.startswith("adapter") and agent.reference.backbone.frozen is not None:
        (fresh / "reference").mkdir()
        save_file(_contiguous(agent.reference.backbone.frozen.tensors()), fresh / "reference" / FROZEN_FILE)
    if agent.critic is not None:
        agent.critic.save(fresh / "critic")
    tensors, optimizer_state = _split_tensors(agent.optimizer.state_dict())
    save_file(tensors, fresh / "optimizer.safetensors")
    save_file({"sampling": agent.sampling_generator.get_state()}, fresh / "generator.safetensors")
    extra = agent.extra_tensors()
    if extra:
        save_file(_contiguous(extra), fresh / EXTRA_FILE)
    document = {
        "format": FORMAT,
        "class": type(agent).__name__,
        "arguments": _arguments(agent),
        "reference": kind,
        "reference_model": agent.reference.loading_arguments() if kind == "saved" else {},
        "state": _state(agent),
        "optimizer": optimizer_state,
    }
    (fresh / "agent.json").write_text(json.dumps(document, indent=1))
    _move_in(fresh, path)


def _move_in(fresh: Path, path: Path) -> None:
    """Moves the parts of a new checkpoint into place; `agent.json` last, and files that are not ours stay."""
    for item in sorted(fresh.iterdir(), key=lambda item: item.name == "agent.json"):
        target = path / item.name
        if target.is_dir():
            shutil.rmtree(target)
        item.replace(target)
    fresh.rmdir()


def _reference_kind(agent: "Agent") -> str:
    if agent.reference is None:
        return "none"
    if not isinstance(agent.reference, CausalLMPolicy):
        return "given"
    policy: Any = agent.policy
    if agent.reference.model is not policy.model:
        return "saved"
    return "adapter_off" if agent.reference.backbone.without_adapter else "adapter_frozen"


def _arguments(agent: "Agent") -> dict[str, Any]:
    """The constructor's arguments as JSON; a function that has no JSON form is left as null and must be given to `load` again."""
    names = [name for cls in type(agent).__mro__ for name in vars(cls).get("saved_arguments", ())]
    arguments = {name: _to_json(getattr(agent, name)) for name in names}
    functions = [name for name in arguments if arguments[name] is None and getattr(agent, name) is not None]
    return {"values": arguments, "functions": functions}


def _to_json(value: Any) -> Any:
    return {"adaptive": value.state_dict()} if isinstance(value, AdaptiveKLController) else schedule_to_json(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and "adaptive" in value:
        state = value["adaptive"]
        return AdaptiveKLController(state["value"], state["target"], state["horizon"])
    return schedule_from_json(value)


def _state(agent: "Agent") -> dict[str, Any]:
    return {
        "num_timesteps": agent.num_timesteps,
        "total_timesteps": agent._total_timesteps,
        "n_updates": agent._n_updates,
        "progress_remaining": agent._current_progress_remaining,
        "episodes": list(agent.ep_info_buffer or []),
        "position": agent.position(),
        "environment": agent.environment_state(),
        "minibatches": agent.minibatch_generator.bit_generator.state,
        "evaluation": None if agent.evaluation is None else agent.evaluation.state_dict(),
        "warnings": agent.run_warnings.state_dict(),
        "model": agent.policy.loading_arguments(),
        "extra": agent.extra_state(),
    }


def _split_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits an optimiser's state into tensors by name and the JSON rest."""
    tensors, rest = {}, {}
    for index, entries in state["state"].items():
        rest[str(index)] = {name: value for name, value in entries.items() if not isinstance(value, Tensor)}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.contiguous()
    return tensors, {"state": rest, "param_groups": state["param_groups"]}


def _join_tensors(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in rest["state"].items()}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state[int(index)][name] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def load_agent(cls: type[AgentT], path: Path, env: Any, device: torch.device | str, changes: dict[str, Any]) -> AgentT:
    """Rebuilds the agent that `save_agent` wrote.

    Raises:
        ValueError: there is no checkpoint, it is another class's, or an argument that has to be given again is missing.
    """
    path = _folder(path)
    document = _read(cls, path)
    values = {name: _from_json(value) for name, value in document["arguments"]["values"].items()}
    missing = [name for name in document["arguments"]["functions"] if name not in changes]
    if missing:
        raise ValueError(f"{path} was saved with functions for {missing}, which a checkpoint cannot hold; pass them to `load` again.")
    settings = {"dtype": "checkpoint", **document["state"]["model"]}  # earlier checkpoints name no dtype
    policy = cls.trains.from_pretrained(path / "model", device=device, **settings)
    if "reference" not in changes:
        if document["reference"] == "given":
            raise ValueError(f"{path} was saved with a `reference` of your own class; pass it to `load` again.")
        if document["reference"] == "saved":
            own = {**settings, **document.get("reference_model", {})}
            changes["reference"] = CausalLMPolicy.from_pretrained(path / "reference", device=device, **own).reference()
        if document["reference"] in ("adapter_off", "adapter_frozen"):
            changes["reference"] = _shared_reference(policy, path, document["reference"] == "adapter_frozen")
    if (path / "critic").is_dir():
        changes["critic"] = Critic.load(path / "critic", policy)
    make: Any = cls  # the constructors of online and offline agents differ behind their second argument
    agent: AgentT = make(policy, None, **{**values, **changes})
    if env is not None:
        agent.connect(env)
    _restore(agent, path, document)
    return agent


def _shared_reference(policy: CausalLMPolicy, path: Path, adapter: bool) -> CausalLMPolicy:
    """Returns the reference that shares a model with its policy: with the adapter off, or with what was trained as it was at the start."""
    reference = policy.reference(adapter=adapter)
    if reference.backbone.frozen is not None and (path / "reference" / FROZEN_FILE).exists():  # earlier checkpoints have none
        reference.backbone.frozen.load(load_tensors(path / "reference" / FROZEN_FILE))
    return reference


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _folder(path: Path) -> Path:
    """Returns the folder of a checkpoint that was asked for with or without `.zip`, as Stable-Baselines3 names what it saves and loads."""
    other = path.with_suffix("") if path.suffix == ".zip" else path.with_name(f"{path.name}.zip")
    found = next((folder for folder in (path, other) if (folder / "agent.json").is_file()), path)
    if found.is_file():
        raise ValueError(f"`path` must be the folder that `save` wrote, got the file {found}.")
    return found


def _read(cls: type[Any], path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads((path / "agent.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} holds no checkpoint: there is no agent.json in it.") from None
    if document["class"] != cls.__name__:
        raise ValueError(f"{path} is a checkpoint of {document['class']}; load it with `{document['class']}.load`.")
    if document["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {document['format']}; this version of textgym reads format {FORMAT}.")
    return document


def _restore(agent: "Agent", path: Path, document: dict[str, Any]) -> None:
    state = document["state"]
    agent.optimizer.load_state_dict(_join_tensors(load_tensors(path / "optimizer.safetensors"), document["optimizer"]))
    agent.sampling_generator.set_state(load_tensors(path / "generator.safetensors")["sampling"])
    agent.num_timesteps, agent._n_updates = state["num_timesteps"], state["n_updates"]
    agent._total_timesteps, agent._current_progress_remaining = state["total_timesteps"], state["progress_remaining"]
    agent.restore_episode_statistics(state["episodes"])
    agent.minibatch_generator.bit_generator.state = state["minibatches"]
    if state["position"] is not None:
        agent.restore_position(state["position"])
    agent.restore_environment_state(state.get("environment", []))  # earlier checkpoints have none
    if agent.evaluation is not None and state["evaluation"] is not None:
        agent.evaluation.load_state_dict(state["evaluation"])
    if "warnings" in state:  # earlier checkpoints have none
        agent.run_warnings.load_state_dict(state["warnings"])
    agent.load_extra_state(state["extra"])
    if (path / EXTRA_FILE).exists():
        agent.load_extra_tensors(load_tensors(path / EXTRA_FILE, device=str(agent.policy.device)))
