"""Texts in words that a tokenizer does not know: all of them become one token, from which nothing can be told. It is said once per set."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from textgym.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MUCH = 0.1  # the share of unknown tokens in a set above which something is said
_SHOWN_ROWS = 5


def unknown_token_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Returns the id that stands for what a tokenizer does not know; None where it knows everything, or where the id has another use.

    Byte-level tokenizers know every byte; those of the GPT-2 kind call their end of text the unknown token too.
    """
    unknown = tokenizer.unk_token_id
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if unknown is None or unknown in others else int(unknown)


def check_known(
    tokenizer: "PreTrainedTokenizerBase",
    tokens: IntArray,
    lengths: IntArray,
    what: str,
    name: Callable[[int], str],
    *,
    refuse: bool = True,
) -> None:
    """Warns where many tokens of a set of texts are unknown, or all of some text.

    Args:
        tokenizer: what made the tokens.
        tokens: those of all texts, one after the other, (sum of `lengths`,).
        lengths: how many each text has, (N,), at least 1.
        what: what messages call the set.
        name: what they call a text, by its place.
        refuse: a set in which nothing is known is an error; otherwise it is only warned of, as one that is a batch of a larger one.

    Raises:
        ValueError: no text has a token that is known, and `refuse`.
    """
    unknown = unknown_token_id(tokenizer)
    if unknown is None or not len(lengths):
        return
    starts = np.cumsum(lengths) - lengths
    odd = np.add.reduceat(tokens == unknown, starts, dtype=np.int64)  # (N,)
    if not odd.any():
        return
    special = [token for token in tokenizer.all_special_ids if token != unknown]  # a BOS says nothing of the text
    words = np.add.reduceat(~np.isin(tokens, special), starts, dtype=np.int64)
    nothing, share = (odd == words) & (odd > 0), odd.sum() / max(1, words.sum())
    if share <= MUCH and not nothing.any():
        return
    order = np.argsort(-(odd / np.maximum(words, 1)), kind="stable")[:_SHOWN_ROWS]
    shown = ", ".join(name(int(row)) for row in order if odd[row]) + (", ..." if (odd > 0).sum() > _SHOWN_ROWS else "")
    cure = "Give the tokenizer that the texts are for, or the model (the bundled one knows 321 words), or texts in its words."
    if nothing.all() and refuse:
        raise ValueError(
            f"{what} must have tokens that the tokenizer knows, but every token of every text is unknown to it ({tokenizer.unk_token}): "
            f"{shown}. {cure}"
        )
    whole = f", and in {int(nothing.sum())} of {len(lengths)} texts all" if nothing.any() else ""
    warnings.warn(
        f"{share:.0%} of the tokens of {what} are unknown to the tokenizer ({tokenizer.unk_token}){whole}: {shown}. What differs only "
        f"there is the same to the model. {cure}",
        stacklevel=2,
    )
