"""Tokenizers: loading one without torch, its end-of-sequence ids, and decoding completions behind their prompts, fast.

Any transformers tokenizer serves. Nothing here imports transformers before a tokenizer is loaded from a path.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

from textgym.end_tokens import default_end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from textgym.types import IntArray

Decode: TypeAlias = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[str]]
"""From N prompts and N completions, ids both, to the completions' texts: `decode_completions` of a tokenizer."""

UNFINISHED = "\ufffd"  # how a decoder shows the first bytes of a character whose other bytes are still to come
_NEAR = 3  # tokens before a border that its text can depend on: a character has at most four bytes, and a token at least one
# Decoders for which that holds, by the types of their parts; none at all joins tokens with spaces. Llama, Mistral and Gemma have the last.
_NEAR_SIGHTED = re.compile(r"|ByteLevel|Metaspace|WordPiece|Replace( ByteFallback)? Fuse( Strip)?")


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
    tokenizer: "PreTrainedTokenizerBase",
    eos_token_ids: int | Sequence[int] | None = None,
    *,
    argument: str = "eos_token_ids",
    model: Any = None,
) -> tuple[int, ...]:
    """Returns the ids that end a completion: those given, else those of `textgym.end_tokens`. None at all is an error.

    Args:
        tokenizer: a transformers tokenizer.
        eos_token_ids: one id or several, or None for the tokenizer's, its chat template's and those of `generation_config`.
        argument: what the error message calls `eos_token_ids`.
        model: the model whose `generation_config` counts too, where there is one.
    """
    given: Any = default_end_ids(tokenizer, model) if eos_token_ids is None else eos_token_ids
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


def decode_completions(
    tokenizer: "PreTrainedTokenizerBase", prompts: "Sequence[Sequence[int] | IntArray]", completions: Sequence[Sequence[int]]
) -> list[str]:
    """Returns the text of each completion as it reads behind its prompt, without special tokens.

        text(completion) = text(prompt + completion) − text(prompt)

    so that the text of a prompt with that of its completion is the text of the whole. On its own a completion may read otherwise:
    SentencePiece tokenizers (Llama 2, Mistral) drop the space before the first word of a text, WordPiece ones have none there.

    A tokenizer may read the end of the prompt differently once the completion is there. Then one of two holds:

    - The prompt's ids end inside of a character. The character, if the completion finishes it, is the completion's: its text begins where
      text(prompt + completion) departs from text(prompt).
    - The prompt's text was finished, and what follows spoils it (in Llama's, a stray byte behind characters that are spelt in bytes
      makes all of them unreadable; some tokenizers clean up spaces before an apostrophe). The prompt keeps its text, and the completion
      has that of its ids alone.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: N id sequences, or only their ends (`prompt_ends`), which give the same texts. Behind an empty one a text begins.
        completions: N id sequences.
    """
    ends = [tuple(ids) for ids in prompt_ends(tokenizer, prompts)]
    different = [ids for ids in dict.fromkeys(ends) if ids]
    before = {(): "", **dict(zip(different, decode(tokenizer, different), strict=True))}
    wholes = decode(tokenizer, [[*end, *ids] for end, ids in zip(ends, completions, strict=True)])
    texts = []
    for end, ids, whole in zip(ends, completions, wholes, strict=True):
        prompt = before[end]
        if whole.startswith(prompt):
            texts.append(whole[len(prompt) :])
        elif prompt.endswith(UNFINISHED):
            texts.append(whole[common_length(prompt, whole) :])
        else:
            texts += decode(tokenizer, [ids])
    return texts


def common_length(a: str, b: str) -> int:
    """Returns how many characters two texts have in common at their beginning."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def prompt_ends(tokenizer: "PreTrainedTokenizerBase", prompts: "Sequence[Sequence[int] | IntArray]") -> list[list[int]]:
    """Returns of each prompt the last tokens, as many as the texts of completions depend on.

    Three with a text of their own are enough for the usual tokenizers (byte-level BPE, SentencePiece, WordPiece), none where texts are
    the tokens put end to end. Special tokens do not count, nor do the bytes that SentencePiece falls back on, which are read together. Of
    a tokenizer that is not known to be like that, the whole prompts are returned.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: N id sequences.
    """
    border = _border(tokenizer)
    if border is None:
        return [[int(token) for token in ids] for ids in prompts]
    needed, passed_over = border
    ends = []
    for ids in prompts:
        start, missing = len(ids), needed
        while start and missing:
            start -= 1
            missing -= ids[start] not in passed_over
        ends.append([int(token) for token in ids[start:]])
    return ends


_BORDERS: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, tuple[int, frozenset[int]] | None]]" = WeakKeyDictionary()


def _border(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, frozenset[int]] | None:
    """Returns how many tokens of a prompt's end count, and the ids that do not; None where all do. Looked up once per tokenizer."""
    size = len(tokenizer)  # special tokens may have been added meanwhile
    known = _BORDERS.get(tokenizer)
    if known is None or known[0] != size:
        known = _BORDERS[tokenizer] = size, _find_border(tokenizer)
    return known[1]


def _find_border(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, frozenset[int]] | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind: Any = type(tokenizer)
    if backend is None or not _decodes_as_usual(kind):
        return None
    if tokenizer.clean_up_tokenization_spaces and type(backend.model).__name__ != "BPE":  # of BPE's texts transformers cleans none
        return None
    parts = [] if backend.decoder is None else list(_parts(json.loads(backend.decoder.__getstate__())))
    kinds = " ".join(part["type"] for part in parts)
    if kinds == "Fuse":
        return 0, frozenset()
    if not _NEAR_SIGHTED.fullmatch(kinds) or any(part.get("start", 0) > _NEAR for part in parts):
        return None
    special = {id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special}
    single_bytes = {backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)} if "ByteFallback" in kinds else set()
    return _NEAR, frozenset(special | single_bytes)


def _parts(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the decoders that one is made of, in order."""
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for part in decoder["decoders"]:
        yield from _parts(part)


@functools.cache
def _decodes_as_usual(kind: type) -> bool:
    """Whether a class of tokenizers decodes as transformers' fast ones do (looked up once: an import in every call is slow)."""
    from transformers import PreTrainedTokenizerFast

    return all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name) for name in ("decode", "_decode"))
