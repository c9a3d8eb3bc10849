"""A tokenizer of one character per token and batches made with it."""

from collections.abc import Callable, Sequence

import pytest

from textgym.rewards import EpisodeBatch

EOS = 1


def decode_characters(prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> list[str]:
    """Ids are code points; 0 and 1 (padding, EOS) are special and leave no text."""
    return ["".join(chr(i) for i in ids if i > 1) for ids in rows]


@pytest.fixture
def make_batch() -> Callable[..., EpisodeBatch]:
    def make(*texts: str, prompts: list | None = None, eos: bool = True, **columns: list) -> EpisodeBatch:
        ids = [[ord(c) for c in text] + [EOS] * eos for text in texts]
        return EpisodeBatch(prompts or ["a prompt"] * len(texts), ids, columns, decode=decode_characters)

    return make
