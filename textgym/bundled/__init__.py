"""What `TextGen-v0` uses when it is told nothing: a tiny film-review language model, its tokenizer, prompts and rewards.

Everything lies in the package (`data/`, made by `python -m textgym.bundled.build`), nothing is ever downloaded, and nothing here imports
torch. The rewards have names: `"film-review"` is the trained reward model, `"film-review-true"` the rule it was trained to imitate.
"""

import json
from pathlib import Path
from typing import Final

from textgym.bundled.true_reward import true_reward

__all__ = [
    "BUNDLED_PATHS",
    "BUNDLED_REWARDS",
    "bundled_model_path",
    "bundled_path",
    "bundled_prompts",
    "bundled_reward_model_path",
    "bundled_tokenizer_path",
    "true_reward",
]

_DATA = Path(__file__).parent / "data"

BUNDLED_PATHS: Final = {
    "model": "model",
    "tokenizer": "model",
    "reward-model": "reward-model",
    "prompts-train": "prompts-train.jsonl",
    "prompts-eval": "prompts-eval.jsonl",
    "manifest": "manifest.json",
}
"""Each thing that ships, and its file or folder in the package's data. Model and tokenizer share a folder, as transformers saves them."""

BUNDLED_REWARDS: Final = ("film-review", "film-review-true")
"""The names under which the bundled rewards can be asked for: the trained reward model and the true reward."""


def bundled_path(name: str) -> Path:
    """Returns the file or folder of a bundled thing.

    Args:
        name: a key of `BUNDLED_PATHS`.

    Raises:
        ValueError: if there is nothing of that name.
    """
    if name not in BUNDLED_PATHS:
        raise ValueError(f"`name` must be one of {', '.join(BUNDLED_PATHS)}, not {name!r}.")
    return _DATA / BUNDLED_PATHS[name]


def bundled_model_path() -> Path:
    """Returns the folder of the language model (config, safetensors, tokenizer), as `from_pretrained` reads it."""
    return bundled_path("model")


def bundled_tokenizer_path() -> Path:
    """Returns the folder that holds the language model's `tokenizer.json`."""
    return bundled_path("tokenizer")


def bundled_reward_model_path() -> Path:
    """Returns the folder of the trained reward model: a one-label sequence classifier with its tokenizer."""
    return bundled_path("reward-model")


def bundled_prompts(split: str = "train") -> list[dict[str, str]]:
    """Returns prompts, each with a reference: how the review that it was cut from went on.

    Args:
        split: `"train"` (200 prompts) or `"eval"` (50 held-out prompts, none of them among the others).

    Returns:
        Fresh rows `{"prompt": ..., "reference": ...}`; the reference begins with its space, or with a punctuation mark.

    Raises:
        ValueError: if there is no such split.
    """
    if split not in ("train", "eval"):
        raise ValueError(f'`split` must be "train" or "eval", not {split!r}.')
    text = bundled_path(f"prompts-{split}").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
