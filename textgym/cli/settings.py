"""What `textgym train` or `textgym sft` was told: one record, which is also the run folder's `config.json`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from textgym.cli.algorithms import ALGORITHMS, OTHER_LEARNING_RATE, SFT
from textgym.cli.errors import UserError
from textgym.cli.schedules import Number, told

DTYPES = ("auto", "checkpoint", "float32", "bfloat16", "float16")
AUTOCASTS = ("auto", "none", "bfloat16", "float16")
_PATHS = ("model", "reference", "prompts", "eval_prompts", "examples", "held_out")


@dataclass(frozen=True)
class TrainSettings:
    """The options of `textgym train`; see its `--help` for what each means.

    None stands for what ships with the package (`model`, `prompts`, `eval_prompts`, `examples`), for "a part of the file" (`held_out`) or
    for "not wanted"; `total_timesteps` None for the passes of an offline algorithm, until its examples are counted. `examples` is what
    `--preferences` or `--examples` names; with it `reward` is only measured.
    """

    algorithm: str
    model: str | None = None
    prompts: str | None = None
    examples: str | None = None
    held_out: str | None = None
    eval_prompts: str | None = None
    reward: tuple[str, ...] = ("film-review",)
    reward_weights: tuple[float, ...] | None = None
    true_reward: str | None = None
    reference: str | None = None
    beta: Number = 0.2
    temperature: float = 1.0
    total_timesteps: int | None = 60_000
    num_envs: int = 64
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 24
    truncate_prompts: bool = False
    learning_rate: Number | None = None
    eval_interval: int | None = None
    eval_completions: int | None = None
    max_kl: float | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    autocast: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def step_size(self) -> Number:
        """The learning rate, number or schedule: as given, else what suits the bundled model (which is tiny), else what suits others."""
        if self.learning_rate is not None:
            return self.learning_rate
        return ALGORITHMS[self.algorithm].learning_rate if self.model is None else OTHER_LEARNING_RATE

    @property
    def offline(self) -> bool:
        """Whether the algorithm learns from a file of examples."""
        return ALGORITHMS[self.algorithm].offline

    @property
    def training_length(self) -> int:
        """Timesteps to train for; counted by the time that training begins."""
        if self.total_timesteps is None:
            raise RuntimeError("The passes over the examples have not been counted yet; this is a bug of the command line.")
        return self.total_timesteps

    @property
    def measured_reward(self) -> str | None:
        """The reward that is measured beside the trained one: as given, else the known true one of the bundled reward."""
        if self.true_reward is None and self.reward == ("film-review",):
            return "film-review-true"
        return self.true_reward

    @property
    def evaluation_interval(self) -> int:
        """Iterations between two evaluations: as given, else so that a run has about twenty."""
        tokens_per_iteration = self.num_envs * self.max_new_tokens * 0.6  # completions often end before the limit
        return self.eval_interval or max(1, round(self.training_length / tokens_per_iteration / 20))

    def checked(self) -> Self:
        """Returns itself if the values can be right; whatever takes models or files to find out comes later.

        Raises:
            UserError: a value is out of its range.
        """
        at_least_one = ("total_timesteps", "num_envs", "max_new_tokens", "max_prompt_tokens", "eval_interval", "eval_completions")
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{option(name)} must be at least 1, not {value}.")
        for name in ("beta", "temperature", "learning_rate", "max_kl"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and not 0 <= value < float("inf"):
                raise UserError(f"{option(name)} must be a number, 0 or above, not {value}.")
        if self.offline and isinstance(self.beta, str):
            raise UserError(
                f"--beta {self.beta}: {self.algorithm} takes a number: its loss is that of one beta, which nothing moves during training."
            )
        if self.temperature == 0:
            raise UserError("--temperature must be above 0 in training: a policy that takes the most probable token has no gradient.")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward):
            raise UserError(f"--reward-weight must be given once per --reward: {len(self.reward)} times, not {len(self.reward_weights)}.")
        check_precision(self.dtype, self.autocast)
        self._check_what_suits_the_model()
        return self

    def _check_what_suits_the_model(self) -> None:
        """The bundled prompts and the bundled reward are film reviews for the bundled model."""
        if self.model is None or self.offline:
            return
        if self.prompts is None:
            raise UserError("--prompts must be given with --model: the bundled prompts were made for the bundled model.")
        if not self.reward:
            raise UserError("--reward must be given with --model: the bundled reward judges film reviews.")

    @property
    def title(self) -> str:
        """What the run's curves are of."""
        return self.algorithm.upper() + (f", beta {told(self.beta)}" if self.algorithm != SFT else "")

    def with_absolute_paths(self) -> Self:
        """Returns a copy in which paths that exist are absolute, so that a run can be resumed from elsewhere."""
        given = {name: getattr(self, name) for name in _PATHS}
        absolute: dict[str, Any] = {name: str(Path(path).resolve()) for name, path in given.items() if path and Path(path).exists()}
        rewards = tuple(str(Path(one).resolve()) if Path(one).is_dir() else one for one in self.reward)
        return replace(self, reward=rewards, **absolute)

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Reads what `to_json` wrote."""
        weights = document["reward_weights"]
        return cls(**{**document, "reward": tuple(document["reward"]), "reward_weights": None if weights is None else tuple(weights)})


def check_precision(dtype: str, autocast: str) -> None:
    """Raises a `UserError` unless `--dtype` and `--autocast` are among what there is."""
    for name, value, known in (("--dtype", dtype, DTYPES), ("--autocast", autocast, AUTOCASTS)):
        if value not in known:
            raise UserError(f"{name} must be one of {', '.join(known)}, not {value}.")


def option(name: str) -> str:
    """Returns the option of a setting: "--num-envs" for "num_envs", "--set" for the parameter "set_"."""
    return "--" + name.rstrip("_").replace("_", "-")


def was_given(context: Any, name: str) -> bool:
    """Returns whether a parameter of a typer context was given on the command line, and is not a default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Reads `NAME=VALUE` pairs; a value is JSON where it can be, else a string.

    Raises:
        UserError: there is no name, or no equals sign.
    """
    options = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--set takes NAME=VALUE, for example --set clip_range=0.1, not {pair!r}.")
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
    return options
