"""`EpisodeBatch`: the completions that rewards see, with the ids of their prompts."""

import functools
from typing import Any

import pytest

from textgym.rewards import EpisodeBatch
from textgym.tokenizers import decode_completions


@pytest.fixture
def batch(sentencepiece_tokenizer: Any) -> EpisodeBatch:
    prompts = [sentencepiece_tokenizer(text)["input_ids"] for text in ("a", "", "to a")]
    (time,) = sentencepiece_tokenizer("time")["input_ids"]
    decode = functools.partial(decode_completions, sentencepiece_tokenizer)
    return EpisodeBatch(["a", "", "to a"], [[time]] * 3, {"row": [0, 1, 2]}, prompt_ids=prompts, decode=decode)


def test_texts_are_those_behind_the_prompts(batch: EpisodeBatch) -> None:
    assert batch.texts == batch.completions == [" time", "time", " time"]


def test_some_rows(batch: EpisodeBatch) -> None:
    some = batch.select([1, 2, 2])
    assert (some.prompts, some.texts, some.columns) == (["", "to a", "to a"], ["time", " time", " time"], {"row": [1, 2, 2]})
    twice = batch.select([0, 1], [ids * 2 for ids in batch.completion_ids[:2]])
    assert (twice.prompts, twice.texts) == (["a", ""], [" time time", "time time"])


def test_given_texts_stay_as_they_are(sentencepiece_tokenizer: Any) -> None:
    texts = ["time", " time", "", "metime", " é"]
    assert EpisodeBatch.from_texts(["a"] * 5, texts, sentencepiece_tokenizer).texts == texts


def test_as_many_prompts_as_completions() -> None:
    with pytest.raises(ValueError, match="`prompt_ids` must hold one sequence per completion: 2 completions, 1 sequences"):
        EpisodeBatch(["p"] * 2, [[1], [2]], prompt_ids=[[1]], decode=lambda prompts, rows: [""] * len(rows))
