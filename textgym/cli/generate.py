"""`textgym generate`: completions of prompts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.cli.algorithms import REWARD
from textgym.cli.announcing import model_name, model_words
from textgym.cli.errors import UserError
from textgym.cli.measuring import text_of
from textgym.cli.run_folder import RunFolder
from textgym.cli.workplace import Precision, load_policy, model_path, quiet_transformers
from textgym.conversations import with_template_columns
from textgym.prompts import PromptText, read_prompts

DEFAULT_PROMPTS = 5  # bundled held-out prompts, for a model that knows them
BATCH = 64  # prompts completed at once


@dataclass(frozen=True)
class GenerateSettings:
    """The options of `textgym generate`; see its `--help` for what each means."""

    model: str | None
    num_generations: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    device: str
    json_lines: bool
    dtype: str = "auto"
    autocast: str = "auto"


def generate(settings: GenerateSettings, arguments: Sequence[str], file: Path | None) -> None:
    """Completes prompts and prints the completions as they come."""
    _check(settings)
    quiet_transformers()
    path, knows_bundled = _model(settings.model)
    prompts = _prompts(arguments, file, knows_bundled)
    policy = load_policy("--model", path, settings.device, precision=Precision(settings.dtype, settings.autocast))
    options = {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "num_generations", "top_k", "top_p")}
    if settings.seed is not None:
        policy.seed(settings.seed)
    limit, needed = policy.backbone.max_positions, int(policy.encode_prompts(prompts)[1].max()) + settings.max_new_tokens
    if limit is not None and needed > limit:
        raise UserError(f"--max-new-tokens and the longest prompt make {needed} tokens together, but the model has {limit} positions.")
    print(f"textgym: {_announced(settings, policy, len(prompts))}", file=sys.stderr)
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        generation = policy.generate(part, **options)
        rows = zip(
            generation.texts, generation.completion_ids, generation.log_probs.sum(1).tolist(), generation.finish_reasons, strict=True
        )
        for index, row in enumerate(rows):
            prompt = part[index // settings.num_generations]
            _print(prompt["prompt"] if isinstance(prompt, dict) else prompt, *row, json_lines=settings.json_lines)


def _announced(settings: GenerateSettings, policy: Any, prompts: int) -> str:
    """Returns in one line what completes what."""
    many = "1 prompt" if prompts == 1 else f"{prompts:,} prompts"
    return f"{model_words(model_name(settings.model), policy)}; {many}; {settings.max_new_tokens} new tokens at most"


def _check(settings: GenerateSettings) -> None:
    rules = (
        ("--num-generations", settings.num_generations >= 1, "at least 1", settings.num_generations),
        ("--max-new-tokens", settings.max_new_tokens >= 1, "at least 1", settings.max_new_tokens),
        ("--temperature", 0 <= settings.temperature < float("inf"), "0 or above", settings.temperature),
        ("--top-k", settings.top_k >= 0, "0 (off) or above", settings.top_k),
        ("--top-p", 0 < settings.top_p <= 1, "above 0 and at most 1", settings.top_p),
    )
    for name, holds, rule, value in rules:
        if not holds:
            raise UserError(f"{name} must be {rule}, not {value}.")


def _model(given: str | None) -> tuple[str, bool]:
    """Returns the folder or id of the model, and whether it was made from the bundled one."""
    if given is None:
        return str(bundled_model_path()), True
    run = RunFolder.of_model(given)
    if run is None:
        return model_path("--model", given), False
    return str(run.model), run.algorithm != REWARD and run.settings().model is None


def _prompts(arguments: Sequence[str], file: Path | None, knows_bundled: bool) -> list[Any]:
    """Returns the prompts (or their rows) of the command line, a file, standard input (`-`), or some of the bundled held-out ones."""
    if list(arguments) == ["-"]:
        prompts: list[PromptText] = [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not prompts:
            raise UserError("there are no prompts on standard input: one per line.")
        return prompts
    if file is not None:
        if arguments:
            raise UserError("prompts come from the command line or from --prompts, not from both.")
        texts, columns = read_prompts(file)
        return with_template_columns(texts, columns)
    if not arguments and knows_bundled:
        return [row["prompt"] for row in bundled_prompts("eval")[:DEFAULT_PROMPTS]]
    if not arguments or not all(prompt.strip() for prompt in arguments):
        raise UserError('give a prompt that is not empty ("once upon a time"), a file (--prompts FILE.jsonl), or - for standard input.')
    return list(arguments)


def _print(prompt: PromptText, completion: str, ids: list[int], log_prob: float, finish_reason: str, *, json_lines: bool) -> None:
    if json_lines:
        row: dict[str, Any] = {"prompt": prompt, "completion": completion, "completion_ids": ids, "log_prob": log_prob}
        print(json.dumps({**row, "finish_reason": finish_reason}, ensure_ascii=False))
    else:
        Console().print(Text.assemble((text_of(prompt), "bold"), completion), soft_wrap=True)
