"""From settings to objects: prompts, rewards, environments, models. Each mistake in an option ends in one sentence that names it."""

import difflib
import inspect
import os
import random
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.cli.errors import UserError, one_line
from textgym.cli.settings import TrainSettings
from textgym.feedback import PairJudge
from textgym.prompts import read_prompts
from textgym.rewards import RewardSet, load_reward

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from textgym.agents import CausalLMPolicy
    from textgym.agents.base import Trainable

Row = dict[str, Any]
MAX_HELD_OUT = 64  # prompts that are taken from a file of prompts where no file of held-out ones is given
MAX_EVALUATION_ROWS = 64
SMALL_MODEL = 2_000_000  # parameters


@dataclass(frozen=True)
class Rewards:
    """The reward that is trained on, and the same with the measured one beside it at weight 0.

    Attributes:
        trained: for the environment that the agent learns in.
        measured: for held-out prompts.
        true_name: the name, in `measured`, of the reward that is only measured; None if there is none.
    """

    trained: RewardSet
    measured: RewardSet
    true_name: str | None


def load_rewards(settings: TrainSettings) -> Rewards:
    """Loads `--reward` and `--true-reward`."""
    loaded = [load_reward_option("--reward", spec) for spec in settings.reward]
    weights = list(settings.reward_weights or [1.0] * len(loaded))
    trained = RewardSet.build(loaded, weights)
    if settings.measured_reward is None:
        return Rewards(trained, trained, None)
    measured = RewardSet.build([*loaded, load_reward_option("--true-reward", settings.measured_reward)], [*weights, 0.0])
    return Rewards(trained, measured, measured.names[-1])


def load_reward_option(name: str, spec: str) -> RewardSet:
    """Returns the reward that option `name` gives."""
    try:
        return RewardSet.build(spec)
    except ValueError as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    except Exception as error:  # the user's module may raise anything while it is loaded
        raise UserError(f"{name} {spec} could not be loaded: {type(error).__name__}: {one_line(str(error))}.") from error


def load_judge_option(name: str, spec: str) -> PairJudge:
    """Returns the judge of pairs that option `name` gives, as module:function or file.py:function."""
    try:
        judge = load_reward(spec)
    except ValueError as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    except Exception as error:  # the user's module may raise anything while it is loaded
        raise UserError(f"{name} {spec} could not be loaded: {type(error).__name__}: {one_line(str(error))}.") from error
    if not callable(judge):
        raise UserError(f"{name} {spec} must be a function judge(prompt, first, second), not a {type(judge).__name__}.")
    found: PairJudge = judge
    return found


def load_prompts(settings: TrainSettings) -> tuple[list[Row], list[Row]]:
    """Returns the prompts to train on and the held-out ones, with their columns.

    Held-out prompts are those of `--eval-prompts`, else the bundled ones, else a random tenth of `--prompts` (at most 64), which is then
    not trained on.
    """
    if settings.prompts is None:
        train: list[Row] = list(bundled_prompts("train"))
        held_out: list[Row] = list(bundled_prompts("eval"))
        return train, held_out if settings.eval_prompts is None else read_prompt_rows("--eval-prompts", settings.eval_prompts)
    rows = read_prompt_rows("--prompts", settings.prompts)
    if settings.eval_prompts is not None:
        return rows, read_prompt_rows("--eval-prompts", settings.eval_prompts)
    if len(rows) < 2:
        raise UserError(f"--prompts {settings.prompts} holds one prompt, so none can be held out: give --eval-prompts too.")
    random.Random(settings.seed).shuffle(rows)
    count = min(MAX_HELD_OUT, max(1, len(rows) // 10))
    return rows[count:], rows[:count]


def read_prompt_rows(name: str, path: str) -> list[Row]:
    """Reads the file of prompts that option `name` gives."""
    try:
        texts, columns = read_prompts(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    return [{"prompt": text, **{column: values[row] for column, values in columns.items()}} for row, text in enumerate(texts)]


def quiet_transformers() -> None:
    """Silences the bars of loading and saving weights, and the retries where there is no network: the error at their end says it."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()


def check_device(device: str) -> str:
    """Returns `device` if it can be used here."""
    import torch

    if device == "auto":
        return device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {one_line(str(error)).partition('. ')[0]}.") from error
    return device


def load_policy(name: str, path: str, device: str, temperature: float = 1.0) -> "CausalLMPolicy":
    """Loads the model that option `name` gives."""
    from textgym.agents import CausalLMPolicy

    if not Path(path).is_dir() and not path.startswith((".", "~", "/")):  # no path: an id, which can take a while
        print(f"textgym: looking for {path} in the Hugging Face cache and hub ...", file=sys.stderr)
    try:
        return CausalLMPolicy.from_pretrained(path, device=check_device(device), temperature=temperature)
    except (ValueError, OSError) as error:
        raise UserError(f"{name}: {one_line(error)}") from error


def limit_threads(policy: "Trainable") -> None:
    """Computes a small model on the CPU with one thread, unless OMP_NUM_THREADS says otherwise.

    Its matrices are too small to share out: the threads spend their time waiting for each other, and on a machine that has anything else to
    do that made training ten times slower.
    """
    import torch

    small = sum(parameter.numel() for parameter in policy.parameters()) < SMALL_MODEL
    if small and policy.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def load_policies(settings: TrainSettings) -> tuple["CausalLMPolicy", "CausalLMPolicy | None"]:
    """Returns the policy to train and `--reference`, None standing for a frozen copy of the policy as it is at the start."""
    path = settings.model or str(bundled_model_path())
    policy = load_policy("--model", path, settings.device, settings.temperature)
    if settings.reference is None:
        return policy, None
    reference = load_policy("--reference", settings.reference, settings.device, settings.temperature).reference()
    if reference.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(f"--reference {settings.reference} has another vocabulary than the model: KL needs the same tokens in both.")
    return policy, reference


def check_positions(environments: Sequence["VectorEnv[Any, Any, Any]"], policy: "CausalLMPolicy") -> None:
    """Raises if prompt and completion together are longer than the model can read."""
    limit = policy.backbone.max_positions
    needed = max(envs.single_observation_space["input_ids"].shape[0] for envs in environments)  # type: ignore[index]
    if limit is not None and needed > limit:
        raise UserError(
            f"--max-new-tokens and the longest prompt make {needed} tokens together, but the model has {limit} positions: "
            "give fewer new tokens, or a lower --max-prompt-tokens with --truncate-prompts."
        )


def check_options(options: Mapping[str, Any], agent_class: type, reserved: Collection[str], given_by: str = "--set") -> None:
    """Raises if `--set` names something that is no argument of the class, or that the command sets itself."""
    own = [name for name in inspect.signature(agent_class).parameters if name != "options"]
    # `**options: Unpack[...]`: the names are those of the TypedDict.
    (inherited,) = get_args(get_type_hints(agent_class.__init__, include_extras=True)["options"])  # type: ignore[misc]
    possible = [name for name in (*own, *get_type_hints(inherited)) if name not in reserved]
    for name in options:
        if name in reserved:
            raise UserError(f"{given_by} {name}=... is not possible: it has an option of its own, or the command sets it.")
        if name not in possible:
            close = difflib.get_close_matches(name, possible, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UserError(f"{given_by} {name}=...: {agent_class.__name__} has no such argument.{hint} It has: {', '.join(possible)}.")


def make_environments(settings: TrainSettings, tokenizer: Any) -> tuple["VectorEnv[Any, Any, Any]", "VectorEnv[Any, Any, Any]", Rewards]:
    """Returns the environment to learn in, the one over held-out prompts, and the rewards of both."""
    import gymnasium

    import textgym.envs  # noqa: F401  (registers the id)

    rewards = load_rewards(settings)
    train, held_out = load_prompts(settings)

    def make(prompts: list[Row], reward: RewardSet, rows: int) -> "VectorEnv[Any, Any, Any]":
        return gymnasium.make_vec(
            "TextGen-v0",
            num_envs=rows,
            prompts=prompts,
            tokenizer=tokenizer,
            reward=reward,
            max_prompt_tokens=settings.max_prompt_tokens,
            max_new_tokens=settings.max_new_tokens,
            truncate_prompts=settings.truncate_prompts,
        )

    return (
        make(train, rewards.trained, settings.num_envs),
        make(held_out, rewards.measured, min(len(held_out), MAX_EVALUATION_ROWS)),
        rewards,
    )
