"""From texts to ids: plain, as the beginning of a text, and as completions are written behind their prompts."""

import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from textgym.tokenizers import UNFINISHED, decode, decode_completions, prompt_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]

# What a completion is encoded behind, to find its tokens in the middle of a text. Several, because some beginnings of a completion are
# merged with one or the other of these.
_ANCHORS = (":", "\n", "a", "1", ".")


def encode_plain(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], **options: Any) -> list[Ids]:
    """Returns the tokens of each text and nothing else: no BOS, no EOS, no truncation unless `options` of the tokenizer's call say so."""
    return _call(tokenizer, list(texts), add_special_tokens=False, **options) if texts else []


def encode_beginnings(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[Ids]:
    """Returns the tokens of texts that a model goes on with.

    Each gets the special tokens that the tokenizer puts in front (a BOS where it has one), unless the text itself begins with them, as one
    that a chat template has written does. An EOS that the tokenizer appends by itself is dropped, since the text goes on.
    """
    encoded = encode_whole(tokenizer, texts)
    end = tokenizer.eos_token_id
    suspects = [i for i, ids in enumerate(encoded) if len(ids) > 1 and ids[-1] == end]
    for i, plain in zip(suspects, encode_plain(tokenizer, [texts[i] for i in suspects]), strict=True):
        # what ends the text by itself is the user's, one more end is the tokenizer's
        if _trailing(encoded[i], end) > _trailing(plain, end):
            encoded[i] = encoded[i][:-1]
    return encoded


def encode_whole(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], **options: Any) -> list[Ids]:
    """Returns the tokens of texts with all special tokens that the tokenizer adds; those in front not a second time.

    Args:
        tokenizer: a transformers tokenizer.
        texts: strings.
        **options: further arguments of the tokenizer's call.
    """
    if not texts:
        return []
    encoded = _call(tokenizer, list(texts), add_special_tokens=True, **options)
    suspects = [i for i, ids in enumerate(encoded) if _longest_repeat(ids)]
    for i, plain in zip(suspects, encode_plain(tokenizer, [texts[i] for i in suspects]), strict=True):
        encoded[i] = _without_repeat(encoded[i], plain)
    return encoded


def _longest_repeat(ids: Ids) -> int:
    """Returns how many tokens at the beginning come a second time right behind themselves; tokenizers add few."""
    return next((count for count in range(min(4, len(ids) // 2), 0, -1) if ids[:count] == ids[count : 2 * count]), 0)


def _without_repeat(ids: Ids, plain: Ids) -> Ids:
    """Takes from `ids` what the tokenizer put in front of `plain` if that begins with the same."""
    for count in range(1, len(ids) - len(plain) + 1):
        if ids[count : count + len(plain)] == plain and plain[:count] == ids[:count]:
            return ids[count:]
    return ids


def _trailing(ids: Ids, token: int) -> int:
    """Returns how often `token` stands at the end."""
    return len(list(takewhile(token.__eq__, reversed(ids))))


def _call(tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, add_special_tokens: bool, **options: Any) -> list[Ids]:
    # `truncation=False` also switches off a truncation that is stored in the tokenizer's own file.
    arguments = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False, **options}
    batch = tokenizer(texts, add_special_tokens=add_special_tokens, **arguments)
    return [list(ids) for ids in batch["input_ids"]]


# -- behind a prompt ----------------------------------------------------------------------------------------------------------------------


def encode_completions(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[int]], texts: Sequence[str]) -> list[Ids]:
    """Returns the tokens of completions as a model writes them when it goes on behind its prompt.

    The tokens of the prompt stay as they are: none stands across the joint. Those of the completion read, behind the prompt, as the text
    (`decode_completions`): many tokenizers put a space in front of every text that they encode (SentencePiece's of Llama 2, Mistral and T5,
    WordPiece, byte-level ones with `add_prefix_space`), which the middle of a text does not have. There the completion is encoded behind
    something else, the end of the prompt first of all, and cut off. What a tokenizer changes everywhere (capitals, unknown words) it may
    change here. Where it cannot write a completion as it stands, the tokens are those of the text on its own, and a warning says so.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: N id sequences.
        texts: N completions.
    """
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    plain = encode_plain(tokenizer, list(places))
    found = [plain[places[text]] for text in texts]
    shown = _special_texts(tokenizer)
    odd, example = 0, ""
    for row, own in enumerate(decode_completions(tokenizer, prompts, found)):
        wanted = texts[row] if shown is None else shown.sub("", texts[row])
        if own == wanted:
            continue
        better = _encode_behind(tokenizer, prompts[row], texts[row], wanted, found[row])
        if better is None:
            odd, example = odd + 1, example or f"{texts[row][:60]!r} reads {own[:60]!r}"
        else:
            found[row] = better
    if odd:
        warnings.warn(
            f"{odd} of {len(texts)} completions cannot be written behind their prompts in this tokenizer as they stand: {example}. They "
            "are taken as they read; begin them as the prompt goes on, with or without a space.",
            stacklevel=2,
        )
    return found


def completion_offsets(
    tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], text: str, ids: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Returns the characters of a completion that each of its tokens stands for.

    Args:
        tokenizer: a fast tokenizer, which knows the characters of its tokens.
        prompt: the tokens of the prompt.
        text: the completion.
        ids: its tokens, from `encode_completions`; fewer are the first of them.

    Returns:
        One pair (first, behind the last) per token; None where `ids` are not the tokens of `text`.
    """
    before, _ = _before(tokenizer, prompt)
    for context in dict.fromkeys(("", before, *_ANCHORS)):
        if context and _if_known(tokenizer, [context, context + text]) is None:
            continue
        alone = encode_plain(tokenizer, [context])[0] if context else []
        encoded: Any = tokenizer(context + text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
        whole, here = list(encoded["input_ids"]), slice(len(alone), len(alone) + len(ids))
        if whole[: len(alone)] == alone and whole[here] == list(ids):
            return [(max(0, first - len(context)), max(0, last - len(context))) for first, last in encoded["offset_mapping"][here]]
    return None


def _encode_behind(tokenizer: Any, prompt: Sequence[int], text: str, wanted: str, plain: Ids) -> Ids | None:
    """Returns the tokens of a completion that does not read as `wanted` if encoded on its own; None where there are none."""

    def read(ids: Ids) -> str:
        return decode_completions(tokenizer, [prompt], [ids])[0]

    before, begins = _before(tokenizer, prompt)
    joint, usual = (None, decode(tokenizer, [plain])[0]) if begins else _joint(tokenizer, before, text)
    if joint is not None and read(joint) == wanted:
        return joint
    if usual is not None and read(plain) == usual:  # how the tokenizer writes this text there, with what it changes everywhere
        return plain
    for ids in (joint, *_cut(tokenizer, text)):
        if ids and read(ids) in (wanted, usual):
            return ids
    return plain if usual is None else None


def _before(tokenizer: Any, prompt: Sequence[int]) -> tuple[str, bool]:
    """Returns the end of a prompt's text, and whether it has none, so that the text begins with the completion."""
    text = decode(tokenizer, prompt_ends(tokenizer, [prompt]))[0] if len(prompt) else ""
    return ("a", False) if text.endswith(UNFINISHED) else (text, not text)


def _joint(tokenizer: Any, before: str, text: str) -> tuple[Ids | None, str | None]:
    """Encodes a text with what stands before it.

    Returns:
        the tokens of the text, None if one stands across the joint; and how the tokenizer reads it there, None if it reads the end of what
        stands before in another way, as one of whole words does that puts an unknown word in the place of both.
    """
    encoded = _if_known(tokenizer, [before, before + text])
    if encoded is None:
        return None, None
    alone, whole = encoded
    base, full = decode(tokenizer, [alone, whole])
    return (whole[len(alone) :] if whole[: len(alone)] == alone else None), (full[len(base) :] if full.startswith(base) else None)


def _cut(tokenizer: Any, text: str) -> Iterator[Ids]:
    """Yields the tokens of a text behind each of several others, where none stands across the joint."""
    for anchor in _ANCHORS:
        alone, whole = _if_known(tokenizer, [anchor, anchor + text]) or ([], [])
        if alone and whole[: len(alone)] == alone:
            yield whole[len(alone) :]


def _if_known(tokenizer: Any, texts: list[str]) -> list[Ids] | None:
    """Returns the tokens of texts; None where the tokenizer refuses one, as one without an unknown token does a word that it lacks."""
    try:
        return encode_plain(tokenizer, texts)
    except Exception:  # what the tokenizers library raises
        return None


_SPECIAL_TEXTS: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, re.Pattern[str] | None]]" = WeakKeyDictionary()


def _special_texts(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Returns what matches the texts of special tokens, which do not show where ids are decoded; None without any."""
    size = len(tokenizer)  # special tokens may have been added meanwhile
    known = _SPECIAL_TEXTS.get(tokenizer)
    if known is None or known[0] != size:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        texts = sorted((token.content for token in added if token.special and token.content), key=len, reverse=True)
        known = _SPECIAL_TEXTS[tokenizer] = size, re.compile("|".join(map(re.escape, texts))) if texts else None
    return known[1]
