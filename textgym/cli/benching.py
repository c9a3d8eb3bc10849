"""What `textgym bench` measures: sampling beside transformers' `generate`, and whole iterations of two agents."""

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import transformers
from gymnasium.vector import VectorEnv
from torch import Tensor

import textgym.envs  # noqa: F401  (registers the id)
from textgym.agents import PPO, RLOO, CausalLMPolicy
from textgym.cli.bench import GENERATIONS, BenchSettings
from textgym.cli.errors import one_line
from textgym.cli.run_folder import versions
from textgym.cli.timing import alternate, per_second
from textgym.sequences import step_sequence

TEXTGYM = "textgym"
GENERATE = {"transformers' generate, growing cache": None, "transformers' generate, static cache": "static"}
ITERATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "PPO": (PPO, {"n_epochs": 1}),
    "RLOO": (RLOO, {"num_generations": GENERATIONS}),
}


@dataclass(frozen=True)
class Figures:
    """What was measured.

    Attributes:
        setting: device, threads, versions, sizes.
        tokens_per_second: of sampling, by who samples.
        completions_per_second: of whole iterations, by algorithm.
        environment_share: of a PPO iteration, spent in environment and rewards.
        peak_memory: in bytes: on the CPU of the whole process, on an accelerator what torch allocated there; None where the system does
            not say.
        failed: what could not be measured, and why.
    """

    setting: dict[str, Any]
    tokens_per_second: dict[str, float]
    completions_per_second: dict[str, float]
    environment_share: float
    peak_memory: int | None
    failed: dict[str, str]

    @property
    def ratio(self) -> float | None:
        """Tokens per second of textgym over those of the faster cache of transformers; None if neither could be measured."""
        others = [rate for name, rate in self.tokens_per_second.items() if name != TEXTGYM]
        return self.tokens_per_second[TEXTGYM] / max(others) if others else None

    def lines(self) -> list[tuple[str, str]]:
        """Returns what is printed, as pairs of a label and a number."""
        lines = [(f"sampled tokens/s, {name}", f"{rate:,.0f}") for name, rate in self.tokens_per_second.items()]
        if self.ratio is not None:
            lines.append(("  textgym over the faster of transformers", f"{self.ratio:.2f}"))
        lines += [(f"completions/s, {name} iteration", f"{rate:,.0f}") for name, rate in self.completions_per_second.items()]
        lines.append(("environment and rewards, of a PPO iteration", f"{self.environment_share:.1%}"))
        if self.peak_memory is not None:
            lines.append(("peak memory, MB", f"{self.peak_memory / 1e6:,.0f}"))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON types."""
        return {**asdict(self), "ratio": self.ratio}


def measurements(repeats: int) -> int:
    """Returns how often `measure` calls `measured`, where every candidate works."""
    candidates = 1 + len(GENERATE) + len(ITERATIONS) + 1  # the last is the environment alone
    return candidates * (repeats + 1)


def measure(policy: CausalLMPolicy, settings: BenchSettings, measured: Callable[[], object]) -> Figures:
    """Measures sampling, the iterations and the environment.

    Args:
        policy: the model; its weights stay what they are.
        settings: sizes, repeats and seed.
        measured: called after each measurement.
    """
    policy.seed(settings.seed)
    make = _EnvironmentMaker(policy, settings)
    with _quiet_transformers():
        candidates, failed = _working(_sampling(policy, make.prompts(), settings))
        tokens = alternate(
            {name: per_second(work, policy.device) for name, work in candidates.items()}, settings.repeats, measured=measured
        )
    completions = {}
    for name, (agent_class, options) in ITERATIONS.items():
        agent = agent_class(policy, make(), 0.0, seed=settings.seed, **options)
        completions[name] = _alone(lambda agent=agent: _iteration(agent, settings), policy, settings, measured)  # type: ignore[misc]
        del agent
        policy.zero_grad(set_to_none=True)
    walks = _alone(_walk(policy, make(), settings), policy, settings, measured)
    return Figures(
        setting=_setting(policy, settings),
        tokens_per_second=tokens,
        completions_per_second=completions,
        environment_share=completions["PPO"] / walks,
        peak_memory=peak_memory(policy.device),
        failed=failed,
    )


def peak_memory(device: torch.device) -> int | None:
    """Returns the most memory that was held so far, in bytes; see `Figures`."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device)) or None
    try:
        import resource
    except ImportError:  # Windows
        return None
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found


class _EnvironmentMaker:
    """Makes environments over the same prompts, which are cut to one length, with a plain Python reward."""

    def __init__(self, policy: CausalLMPolicy, settings: BenchSettings) -> None:
        self._arguments = {
            "num_envs": settings.batch_size,
            "prompts": _random_texts(policy.tokenizer, settings),
            "tokenizer": policy.tokenizer,
            "reward": _characters,
            "max_prompt_tokens": settings.prompt_tokens,
            "truncate_prompts": True,
            "max_new_tokens": settings.max_new_tokens,
        }
        self._prompt_tokens = settings.prompt_tokens

    def __call__(self) -> "VectorEnv[Any, Any, Any]":
        return gym.make_vec("TextGen-v0", **self._arguments)

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Returns the prompts' ids and mask, (B, P), left-padded."""
        observations, _ = self().reset(seed=0)
        return tuple(torch.from_numpy(observations[key][:, : self._prompt_tokens]).long() for key in ("input_ids", "attention_mask"))  # type: ignore[return-value]


def _random_texts(tokenizer: Any, settings: BenchSettings) -> list[str]:
    """Texts of at least as many tokens as a prompt shall have: a tokenizer may join some of what it is given."""
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(len(tokenizer)) if i not in special]
    ids = np.random.default_rng(settings.seed).choice(ordinary, (settings.batch_size, 4 * settings.prompt_tokens))
    return [tokenizer.decode(row.tolist()) for row in ids]


def _characters(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def _sampling(policy: CausalLMPolicy, prompts: tuple[Tensor, Tensor], settings: BenchSettings) -> dict[str, Callable[[], int]]:
    """Returns who samples: functions that complete the prompts to full length and return the tokens that they made."""
    ids, mask = (tensor.to(policy.device) for tensor in prompts)

    def ours() -> int:
        return int(policy.generate_ids(ids, mask.sum(1), settings.max_new_tokens, eos_token_ids=()).lengths.sum())

    def theirs(cache: str | None) -> int:
        out = policy.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=settings.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=policy.fill_token_id,
            cache_implementation=cache,
        )
        return int(out[:, ids.shape[1] :].numel())

    return {TEXTGYM: ours, **{name: lambda cache=cache: theirs(cache) for name, cache in GENERATE.items()}}  # type: ignore[misc]


def _working(candidates: dict[str, Callable[[], int]]) -> tuple[dict[str, Callable[[], int]], dict[str, str]]:
    """Calls each once; returns those that work, and of the others what they said: transformers' caches do not serve every model."""
    failed: dict[str, str] = {}
    for name, work in candidates.items():
        try:
            work()
        except Exception as error:
            if name == TEXTGYM:
                raise
            failed[name] = one_line(error)
    return {name: work for name, work in candidates.items() if name not in failed}, failed


def _alone(work: Callable[[], int], policy: CausalLMPolicy, settings: BenchSettings, measured: Callable[[], object]) -> float:
    return alternate({"": per_second(work, policy.device)}, settings.repeats, measured=measured)[""]


def _iteration(agent: Any, settings: BenchSettings) -> int:
    """One whole iteration: learning goes on until at least one more token is sampled, and that takes a rollout."""
    agent.learn(1, reset_num_timesteps=False)
    return settings.batch_size


def _walk(policy: CausalLMPolicy, envs: "VectorEnv[Any, Any, Any]", settings: BenchSettings) -> Callable[[], int]:
    """Returns what takes the environment through a batch of the policy's completions and returns how many there are."""
    observations, _ = envs.reset(seed=settings.seed)
    generation = policy.generate(observations, settings.max_new_tokens)
    actions, lengths = generation.ids.cpu().numpy(), generation.lengths.cpu().numpy()

    def walk() -> int:
        envs.reset()
        step_sequence(envs, actions, lengths)
        return settings.batch_size

    return walk


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' advice on how to generate."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _setting(policy: CausalLMPolicy, settings: BenchSettings) -> dict[str, Any]:
    sizes = {name: getattr(settings, name) for name in ("batch_size", "prompt_tokens", "max_new_tokens", "repeats", "seed")}
    return {
        "model": settings.model or "bundled",
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "dtype": str(policy.backbone.dtype).removeprefix("torch."),
        "device": str(policy.device),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        **sizes,
        "versions": versions(),
    }
