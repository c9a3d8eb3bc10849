"""The tokens that end a completion where nobody names them: of the tokenizer, of its chat template, and of `generation_config`.

A chat model ends its turn with a token that need not be the tokenizer's end-of-sequence token (Gemma's `<end_of_turn>`, Phi's `<|end|>`).
Policy and environment look in the same places, so that the two agree: the environment in the files beside its tokenizer, without torch.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_FILE, MODEL_FILE = "generation_config.json", "config.json"
_MARK = "textgym"  # an answer that no template changes, and that is found again in what it is rendered to
_TURN = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]


def default_end_ids(tokenizer: "PreTrainedTokenizerBase", model: Any = None) -> tuple[int, ...]:
    """Returns the ids that end a completion, the tokenizer's own first; none where nothing names one.

    - the tokenizer's end-of-sequence token;
    - `eos_token_id` of `generation_config.json` in the folder (or the stored hub repository) that the tokenizer was loaded from, and of the
      model's own `generation_config`, as far as they are tokens of the tokenizer. What transformers copied there from the model's
      configuration, where a class's default may stand, counts if it is a list or one of the special tokens;
    - the special token with which the chat template closes an answer.

    Args:
        tokenizer: a transformers tokenizer.
        model: a transformers model, whose `generation_config` is looked at too.
    """
    eos = tokenizer.eos_token_id
    found = [] if eos is None else [eos]
    found += _chosen(tokenizer, *_of_files(tokenizer))
    if model is not None:
        found += _chosen(tokenizer, *_of_model(model))
    closing = closing_token_id(tokenizer)
    found += [] if closing is None else [closing]
    return tuple(dict.fromkeys(int(token) for token in found if 0 <= token < len(tokenizer)))


def write_end_ids(folder: str | os.PathLike[str], tokenizer: "PreTrainedTokenizerBase", eos_token_ids: Sequence[int]) -> None:
    """Writes end tokens into a folder's `generation_config.json`, unless they are what is found there anyway.

    So transformers' `generate`, an environment made with the folder's tokenizer, and whoever loads the folder end where its policy did.

    Args:
        folder: where a model and its tokenizer were saved.
        tokenizer: the tokenizer.
        eos_token_ids: the ids.
    """
    path = Path(folder) / GENERATION_FILE
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    there = document.get("eos_token_id", tokenizer.eos_token_id)
    if set(there if isinstance(there, list) else [there]) != set(eos_token_ids) and eos_token_ids:
        document["eos_token_id"] = list(eos_token_ids) if len(eos_token_ids) > 1 else eos_token_ids[0]
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _of_model(model: Any) -> tuple[Any, bool]:
    """Returns `eos_token_id` of a model's generation configuration, and whether it was only copied from the model's configuration."""
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    copied = getattr(generation, "_from_model_config", False) and ends == getattr(model.config, "eos_token_id", None)
    return ends, bool(copied)


def _of_files(tokenizer: "PreTrainedTokenizerBase") -> tuple[Any, bool]:
    """The same of the files beside a tokenizer; without a generation configuration transformers makes one of the model's."""
    generation = _read(tokenizer, GENERATION_FILE)
    if not generation:
        return _read(tokenizer, MODEL_FILE).get("eos_token_id"), True
    ends = generation.get("eos_token_id")
    if not generation.get("_from_model_config", False):
        return ends, False
    return ends, ends == _read(tokenizer, MODEL_FILE).get("eos_token_id", ends)


def _read(tokenizer: "PreTrainedTokenizerBase", name: str) -> dict[str, Any]:
    """Returns a JSON file that lies beside a tokenizer's own, or was stored with them by the hub's client; {} if there is none."""
    source = str(getattr(tokenizer, "name_or_path", None) or "")
    if not source:
        return {}
    path = Path(source) / name if Path(source).is_dir() else _stored(source, name)
    try:
        document = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _stored(repository: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(repository, name)
    except ValueError:  # not the name of a repository
        return None
    return Path(path) if isinstance(path, str) else None


def _chosen(tokenizer: "PreTrainedTokenizerBase", ends: Any, copied: bool) -> list[int]:
    """Returns those of the ids of a generation configuration that somebody meant."""
    if isinstance(ends, Sequence) and not isinstance(ends, str):
        return [token for token in ends if isinstance(token, int)]
    if not isinstance(ends, int):
        return []
    # LlamaConfig() ends with 2 whatever the tokenizer; in another vocabulary that is any token.
    others = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}
    return [ends] if not copied or (ends in dict(_special_tokens(tokenizer)) and ends not in others) else []


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[int, str]]:
    """Yields id and text of each special token."""
    yield from zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        if getattr(token, "special", False):
            yield token_id, str(getattr(token, "content", token))


_CLOSING: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[Any, int], int | None]]" = WeakKeyDictionary()


def closing_token_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Returns the special token with which a tokenizer's chat template closes an answer; None without a template, or without such a token.

    Args:
        tokenizer: a transformers tokenizer.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    state = str(template), len(tokenizer)
    known = _CLOSING.get(tokenizer)
    if known is None or known[0] != state:
        known = _CLOSING[tokenizer] = state, _find_closing(tokenizer)
    return known[1]


def _find_closing(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    try:
        rendered = str(tokenizer.apply_chat_template(_TURN, tokenize=False))
    except Exception:  # a template's own language, and whatever it refuses; the tokenizer's end stays
        return None
    _, mark, behind = rendered.rpartition(_MARK)
    behind = behind.lstrip()
    found = [(len(text), token) for token, text in _special_tokens(tokenizer) if text and behind.startswith(text)]
    return max(found)[1] if mark and found else None
