"""From settings to objects: prompts, rewards, environments, models. Each mistake in an option ends in one sentence that names it."""

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.cli.errors import UserError, one_line
from textgym.cli.run_folder import RunFolder, is_run_config
from textgym.cli.settings import TrainSettings, check_precision
from textgym.cli.splitting import Row, Split, given_sides, prompt_key, split_rows
from textgym.feedback import PairJudge
from textgym.prompts import read_prompts
from textgym.rewards import RewardSet, load_reward
from textgym.rewards.named import canonical_name, reward_names
from textgym.rows import iterate_file

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from textgym.agents import CausalLMPolicy
    from textgym.agents.base import Trainable

T = TypeVar("T")
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
    _check_reward_name(name, spec)
    try:
        return RewardSet.build(spec)
    except ValueError as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    except Exception as error:  # the user's module may raise anything while it is loaded
        raise UserError(f"{name} {spec} could not be loaded: {type(error).__name__}: {one_line(str(error))}.") from error


def _check_reward_name(name: str, spec: str) -> None:
    """Raises if a word is no reward: the long list of what there is comes last."""
    word = spec.partition("?")[0]
    if ":" in word or os.sep in word or "/" in word or Path(word).exists() or canonical_name(word) is not None:
        return
    close = difflib.get_close_matches(word.lower(), reward_names(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UserError(
        f"{name} {spec!r} is no reward.{hint} It takes module:function, file.py:function, the folder of a classifier, or a name: "
        f"{', '.join(reward_names())}."
    )


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


def load_prompts(settings: TrainSettings) -> Split:
    """Returns the prompts to train on and the held-out ones, with their columns.

    Held-out prompts are those of `--eval-prompts`, else the bundled ones, else a random tenth of `--prompts` (at most 64 rows), which is
    then not trained on.
    """
    if settings.prompts is not None and settings.eval_prompts is None:
        cure = f"--prompts {settings.prompts}: give --eval-prompts too."
        return split_rows(read_prompt_rows("--prompts", settings.prompts), _prompt_key, settings.seed, cure)
    train = bundled_prompts("train") if settings.prompts is None else read_prompt_rows("--prompts", settings.prompts)
    held_out = bundled_prompts("eval") if settings.eval_prompts is None else read_prompt_rows("--eval-prompts", settings.eval_prompts)
    return given_sides(train, held_out, _prompt_key)


def _prompt_key(row: Row) -> str:
    return prompt_key(row["prompt"])


def read_prompt_rows(name: str, path: str) -> list[Row]:
    """Reads the file of prompts that option `name` gives."""
    texts, columns = read_file(name, path, read_prompts)
    return [{"prompt": text, **{column: values[row] for column, values in columns.items()}} for row, text in enumerate(texts)]


def read_file(name: str, path: str, read: Callable[[str], T]) -> T:
    """Returns what `read` makes of the file that option `name` gives.

    Raises:
        UserError: it is not there, is empty, or cannot be read.
    """
    try:
        return read(path)
    except (ValueError, OSError) as error:
        if is_empty(Path(path)):
            raise UserError(f"{name} {path} is empty: it must hold one JSON object per line.") from error
        raise UserError(f"{name}: {one_line(error)}") from error


def is_empty(path: Path) -> bool:
    """Whether there is a file of JSON lines that holds none."""
    return path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")) and next(iterate_file(path, "file"), None) is None


def quiet_transformers() -> None:
    """Silences the bars of loading and saving weights, and the retries where there is no network: the error at their end says it."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()


def check_device(device: str) -> str:
    """Returns `device` if it can be used here."""
    from textgym.agents.common.devices import as_device

    try:
        as_device(device)
    except ValueError as error:
        raise UserError(f"--device {device} cannot be used here: {one_line(error).partition(': ')[2]}") from error
    return device


@dataclass(frozen=True)
class Precision:
    """`--dtype` and `--autocast`."""

    dtype: str = "auto"
    autocast: str = "auto"

    @property
    def arguments(self) -> dict[str, Any]:
        """What `CausalLMPolicy.from_pretrained` is told."""
        return {"dtype": self.dtype, "autocast": None if self.autocast == "none" else self.autocast}


def load_policy(name: str, path: str, device: str, temperature: float = 1.0, precision: Precision | None = None) -> "CausalLMPolicy":
    """Loads the model that option `name` gives, or that of a run folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from textgym.agents import CausalLMPolicy

    path = model_path(name, path)
    if not Path(path).is_dir():  # an id, which can take a while
        print(f"textgym: looking for {path} in the Hugging Face cache and hub ...", file=sys.stderr)
    precision = precision or Precision()
    check_precision(precision.dtype, precision.autocast)
    try:
        return CausalLMPolicy.from_pretrained(path, device=check_device(device), temperature=temperature, **precision.arguments)
    except (ValueError, OSError) as error:
        raise UserError(f"{name}: {one_line(error)}") from error


def model_path(name: str, given: str) -> str:
    """Returns the folder or id of the model that option `name` gives: of a run folder, the model that it trained.

    Raises:
        UserError: it is a path at which there is nothing, a file, a checkpoint, or a run that has saved no model.
    """
    path = Path(given).expanduser()
    run = RunFolder.of_model(given)
    if run is not None:
        return str(run.model)
    if not path.exists():
        looks_like_a_path = given.startswith((".", "~", "/")) or given.count("/") != 1 or path.parent.is_dir()
        if looks_like_a_path and (os.sep in given or "/" in given):
            raise UserError(f"{name}: there is no folder {given!r}.")
        return given
    if path.is_file():
        raise UserError(f"{name} {given} is a file: give the folder that it is in.")
    if (path / "agent.json").is_file() and (path / "model").is_dir():
        run_folder = f"the run, {path.parent}, or " if (path.parent / "config.json").is_file() else ""
        raise UserError(f"{name} {given} is the checkpoint of an agent: give {run_folder}its model, {path / 'model'}.")
    if (path / "progress.csv").is_file() or is_run_config(path / "config.json"):
        raise UserError(f"{name} {given} is the folder of a run that has saved no model yet.")
    return str(path)


def check_model_paths(given: Mapping[str, str | None]) -> None:
    """Raises for the first option whose model cannot be there, before anything is loaded; see `model_path`."""
    for name, path in given.items():
        if path is not None:
            model_path(name, path)


def check_writable(out: Path | None) -> None:
    """Raises unless the folder that `--out` gives can be made and written to, before anything is measured for it.

    Raises:
        UserError: it cannot.
    """
    if out is None:
        return
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    reason = "" if there.is_dir() else "Not a directory"
    if not reason and not os.access(there, os.W_OK | os.X_OK):
        reason = "Permission denied"
    if reason:
        raise UserError(f"--out {out} cannot be made: {reason}.")


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
    precision = Precision(settings.dtype, settings.autocast)
    policy = load_policy("--model", path, settings.device, settings.temperature, precision)
    if settings.reference is None:
        return policy, None
    reference = load_policy("--reference", settings.reference, settings.device, settings.temperature, precision).reference()
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


@contextmanager
def unknown_options() -> Iterator[None]:
    """Turns the complaint of a constructor about its arguments into one about `--set`."""
    try:
        yield
    except TypeError as error:
        raise UserError(f"--set: {one_line(str(error))}") from error


@dataclass(frozen=True)
class Prepared:
    """What a run is made of.

    Attributes:
        agent: what learns.
        environment: over held-out prompts, with the trained reward and the measured one.
        true_name: the name of the reward that is only measured; None if there is none.
        rows: what is trained on and what is held out.
    """

    agent: Any
    environment: Any
    true_name: str | None
    rows: Split


@dataclass(frozen=True)
class Workplace:
    """What an online agent learns in and is measured in.

    Attributes:
        envs: to learn in.
        held_out: over held-out prompts.
        rewards: of both.
        prompts: of both.
    """

    envs: "VectorEnv[Any, Any, Any]"
    held_out: "VectorEnv[Any, Any, Any]"
    rewards: Rewards
    prompts: Split


def make_environments(settings: TrainSettings, tokenizer: Any) -> Workplace:
    """Makes the environment to learn in and the one over held-out prompts."""
    rewards = load_rewards(settings)
    prompts = load_prompts(settings)
    return Workplace(
        envs=make_environment(settings, prompts.train, tokenizer, rewards.trained, settings.num_envs),
        held_out=make_environment(settings, prompts.held_out, tokenizer, rewards.measured),
        rewards=rewards,
        prompts=prompts,
    )


def make_environment(
    settings: TrainSettings, prompts: list[Row], tokenizer: Any, reward: RewardSet, rows: int | None = None
) -> "VectorEnv[Any, Any, Any]":
    """Makes an environment over some prompts; `rows` None stands for one to measure in, of at most `MAX_EVALUATION_ROWS` rows."""
    import gymnasium

    import textgym.envs  # noqa: F401  (registers the id)

    return gymnasium.make_vec(
        "TextGen-v0",
        num_envs=rows or min(len(prompts), MAX_EVALUATION_ROWS),
        prompts=prompts,
        tokenizer=tokenizer,
        reward=reward,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_new_tokens=settings.max_new_tokens,
        truncate_prompts=settings.truncate_prompts,
    )
