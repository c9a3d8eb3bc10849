"""Tokenizers: loading one without torch, its end-of-sequence ids, and decoding completions fast.

Any transformers tokenizer serves. Nothing here imports transformers before a tokenizer is loaded from a path.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SharedTokenizer:
    """A tokenizer as an argument that copies share: `copy.deepcopy` of this object returns the object itself.

    Gymnasium copies the keyword arguments of an environment several times; a tokenizer of 50,000 entries takes a while each time.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedTokenizer":
        return self

    def __repr__(self) -> str:
        return f"SharedTokenizer({type(self.tokenizer).__name__}, vocab_size={len(self.tokenizer)})"


def load_tokenizer(tokenizer: "PreTrainedTokenizerBase | SharedTokenizer | str | os.PathLike[str]") -> "PreTrainedTokenizerBase":
    """Returns a transformers tokenizer, loading it where a path or an id is given.

    A folder with a `tokenizer.json` is read through `PreTrainedTokenizerFast`, which does not import torch; anything else goes through
    `AutoTokenizer`, which does.

    Args:
        tokenizer: a transformers tokenizer, a folder (or the `tokenizer.json` in one), or a model id that transformers knows.
    """
    if isinstance(tokenizer, SharedTokenizer):
        return tokenizer.tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        return _load(os.fspath(tokenizer))
    if not all(hasattr(tokenizer, name) for name in ("__call__", "decode", "eos_token_id")):
        raise ValueError(
            f"`tokenizer` must be a transformers tokenizer or the path or id of one, got {type(tokenizer).__name__}; "
            "wrap one of the `tokenizers` library as `PreTrainedTokenizerFast(tokenizer_object=..., eos_token=...)`."
        )
    return tokenizer


def _load(path: str) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    folder = Path(path)
    if folder.name == "tokenizer.json":
        folder = folder.parent
    tokenizer: PreTrainedTokenizerBase
    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        return tokenizer
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`tokenizer` must be a transformers tokenizer or the path or id of one, got {path!r}, from which none could be loaded: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    return tokenizer


def end_token_ids(
    tokenizer: "PreTrainedTokenizerBase", eos_token_ids: int | Sequence[int] | None = None, *, argument: str = "eos_token_ids"
) -> tuple[int, ...]:
    """Returns the ids that end a completion: those given, else the tokenizer's own. None at all is an error.

    Args:
        tokenizer: a transformers tokenizer.
        eos_token_ids: one id or several, or None for the tokenizer's.
        argument: what the error message calls `eos_token_ids`.
    """
    given = tokenizer.eos_token_id if eos_token_ids is None else eos_token_ids
    given = given.tolist() if hasattr(given, "tolist") else given
    ids = list(given) if isinstance(given, Sequence) else [given]
    if given is None or not ids:
        raise ValueError(
            f"`{argument}` must name at least one token that ends a completion, and the tokenizer has no end-of-sequence token; "
            f"pass `{argument}=[...]` or set `tokenizer.eos_token`."
        )
    for value in ids:
        if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= value < len(tokenizer):
            raise ValueError(f"`{argument}` must be token ids from 0 to {len(tokenizer) - 1} (`len(tokenizer) - 1`), got {value!r}.")
    return tuple(dict.fromkeys(int(value) for value in ids))


def filler_token_id(tokenizer: "PreTrainedTokenizerBase", eos_token_ids: Sequence[int]) -> int:
    """Returns the id that stands where there is no token: the pad token if there is one, else an end token. Nothing may depend on which."""
    pad = tokenizer.pad_token_id
    return int(pad) if pad is not None and 0 <= pad < len(tokenizer) else int(eos_token_ids[0])


def decode(tokenizer: "PreTrainedTokenizerBase", sequences: Sequence[Sequence[int]]) -> list[str]:
    """Returns the text of each id sequence without special tokens: what `tokenizer.decode` gives, for a whole batch at once."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind: Any = type(tokenizer)
    if backend is None or tokenizer.clean_up_tokenization_spaces or not _decodes_as_usual(kind):
        return [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in sequences]
    # One by one: `decode_batch` hands each text to a pool of threads, which takes longer than decoding it, and which a fork would lose.
    return [backend.decode(ids, skip_special_tokens=True) for ids in sequences]


@functools.cache
def _decodes_as_usual(kind: type) -> bool:
    """Whether a class of tokenizers decodes as transformers' fast ones do (looked up once: an import in every call is slow)."""
    from transformers import PreTrainedTokenizerFast

    return all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name) for name in ("decode", "_decode"))
