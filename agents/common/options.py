"""The options that agents take by keyword, and their defaults."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypedDict, get_args, get_type_hints

import torch
from stable_baselines3.common.type_aliases import Schedule

from textgym.agents.common.checks import check_count, check_number
from textgym.agents.common.evaluation import Evaluation
from textgym.agents.common.held_out import HeldOut

OptimizerFactory: TypeAlias = Callable[[Iterable[Any]], torch.optim.Optimizer]


class CommonOptions(TypedDict, total=False):
    """Options that every agent takes by keyword, with their defaults.

    Attributes:
        micro_batch_size: completions (offline: examples) per forward and backward pass; smaller needs less memory and changes no
            gradient (default: the whole minibatch).
        micro_batch_tokens: tokens, prompts included, per forward and backward pass; rows are sorted by length, so passes hold rows of like
            length; changes no gradient. A row that is longer is a pass by itself. Both bounds hold where both are given (default: none).
        gradient_checkpointing: the layers' activations are made again in the backward pass: less memory for a third more work; changes no
            gradient. Only for models that this package runs itself, see `textgym.agents.common.trunks` (default False: as the model is).
        max_grad_norm: the gradient is scaled down to this norm; None never (default 1.0).
        optimizer: a function from parameters (or groups of them) to an optimiser (default Adam with eps 1e-5, detail 3 of Huang et
            al. 2022).
        evaluation: an `Evaluation` on held-out prompts, or, of learners from examples, a `HeldOut` on held-out examples (default None).
        tensorboard_log: folder of TensorBoard logs (default None).
        verbose: 1 prints the log table of each iteration (default 0).
        device: where the policy is trained; "auto" leaves it where it is (default "auto").
        seed: of sampling, the order of prompts or examples, and minibatches (default: fresh entropy).
        stats_window_size: episodes in the rolling means `rollout/ep_rew_mean` and `rollout/ep_len_mean` (default 100).
    """

    micro_batch_size: int | None
    micro_batch_tokens: int | None
    gradient_checkpointing: bool
    max_grad_norm: float | None
    optimizer: OptimizerFactory
    evaluation: Evaluation | HeldOut | None
    tensorboard_log: str | None
    verbose: int
    device: torch.device | str
    seed: int | None
    stats_window_size: int


class AgentOptions(CommonOptions, total=False):
    """Further options that every online agent takes by keyword, with their defaults.

    Attributes:
        rollout_size: completions per iteration; a multiple of the number of environments (default: that number).
        num_generations: completions per prompt, neighbours in a batch (default 1).
        critic_learning_rate: of the critic alone, a number or a schedule; a fresh head wants more than a trained policy bears
            (default: the policy's).
        missing_eos_penalty: subtracted from the reward of a completion that does not end in EOS (default 0: J is unchanged).
        whiten_rewards: scale the rewards of a rollout to variance 1, the mean kept (default False: J is unchanged).
    """

    rollout_size: int | None
    num_generations: int
    critic_learning_rate: float | Schedule | None
    missing_eos_penalty: float
    whiten_rewards: bool


def adam(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The default optimiser: Adam with eps 1e-5, in one kernel where there is one; its learning rate is set before every update."""
    groups = list(parameters)
    tensors = [tensor for group in groups for tensor in (group["params"] if isinstance(group, dict) else [group])]
    fused = all(tensor.device.type in ("cpu", "cuda") and tensor.is_floating_point() for tensor in tensors)
    return torch.optim.Adam(groups, lr=0.0, eps=1e-5, fused=fused)


COMMON_DEFAULTS: CommonOptions = {
    "micro_batch_size": None,
    "micro_batch_tokens": None,
    "gradient_checkpointing": False,
    "max_grad_norm": 1.0,
    "optimizer": adam,
    "evaluation": None,
    "tensorboard_log": None,
    "verbose": 0,
    "device": "auto",
    "seed": None,
    "stats_window_size": 100,
}
DEFAULTS: AgentOptions = {
    **COMMON_DEFAULTS,
    "rollout_size": None,
    "num_generations": 1,
    "critic_learning_rate": None,
    "missing_eos_penalty": 0.0,
    "whiten_rewards": False,
}


def arguments_of(kind: type) -> dict[str, Any]:
    """Returns the types of what an agent's constructor takes, its own arguments and those that it passes on, by name."""
    hints = get_type_hints(kind.__init__, include_extras=True)  # type: ignore[misc]
    own = {name: hints.get(name, Any) for name in list(inspect.signature(kind).parameters) if name != "options"}
    # `**options: Unpack[...]`: the names are those of the TypedDict.
    inherited = get_type_hints(get_args(hints["options"])[0]) if "options" in hints else {}
    return {**own, **inherited}


def default_arguments(kind: type) -> dict[str, Any]:
    """Returns the defaults of what an agent's constructor takes, by name; arguments that must be given are missing."""
    found: dict[str, Any] = {**DEFAULTS}
    for cls in reversed(kind.__mro__):
        if cls is not object and "__init__" in vars(cls):
            parameters = inspect.signature(cls).parameters.values()
            found |= {one.name: one.default for one in parameters if one.default is not one.empty}
    return {name: found[name] for name in arguments_of(kind) if name in found}


def unknown_argument(kind: type, name: str) -> TypeError:
    """Returns the error for an argument that a class does not have: as Python's own, and what may be meant, and what there is."""
    possible = list(arguments_of(kind))
    close = difflib.get_close_matches(name, possible, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return TypeError(f"{kind.__name__} has no argument `{name}`.{hint} It has: {', '.join(possible)}.")


def _check_names(kind: type, given: set[str], known: set[str]) -> None:
    for name in sorted(given - known):
        raise unknown_argument(kind, name)


def with_defaults(options: AgentOptions, kind: type) -> AgentOptions:
    """Fills in the defaults of an online agent, a `kind`, and refuses what is not an option or out of range."""
    _check_names(kind, set(options), set(DEFAULTS))
    settings: AgentOptions = {**DEFAULTS, **options}
    _check_common(settings)
    for name in ("rollout_size", "num_generations"):
        if settings[name] is not None:
            check_count(name, settings[name], "completions")
    check_number("missing_eos_penalty", settings["missing_eos_penalty"])
    if isinstance(settings["evaluation"], HeldOut):
        raise ValueError("`evaluation` must be an Evaluation of an agent that learns from its own samples, got a HeldOut of examples.")
    return settings


def with_common_defaults(options: CommonOptions, kind: type) -> CommonOptions:
    """Fills in the defaults of an offline agent, a `kind`, and refuses what is not an option or out of range."""
    _check_names(kind, set(options), set(COMMON_DEFAULTS))
    settings: CommonOptions = {**COMMON_DEFAULTS, **options}
    _check_common(settings)
    return settings


def _check_common(settings: CommonOptions) -> None:
    if settings["micro_batch_size"] is not None:
        check_count("micro_batch_size", settings["micro_batch_size"], "completions")
    if settings["micro_batch_tokens"] is not None:
        check_count("micro_batch_tokens", settings["micro_batch_tokens"], "tokens")
    if settings["max_grad_norm"] is not None:
        check_number("max_grad_norm", settings["max_grad_norm"], 0, above=True)
