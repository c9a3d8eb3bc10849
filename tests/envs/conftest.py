from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def make_tokenizer(vocab_size: int = 12, **special: str) -> PreTrainedTokenizerFast:
    """Words `w0`, `w1`, ..., but number 1 is `<end>`, the end token unless other special tokens are given."""
    model = models.WordLevel({"<end>" if i == 1 else f"w{i}": i for i in range(vocab_size)}, unk_token="w0")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special or {"eos_token": "<end>"}))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def word_tokenizer() -> Any:
    return make_tokenizer


def count_reward(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Any function of text and ids will do: this one tells most episodes apart."""
    return [len(text) + 0.01 * sum(ids) for text, ids in zip(completions, completion_ids, strict=True)]


@pytest.fixture(scope="session")
def reward() -> Any:
    return count_reward


def _had(infos: dict[str, Any]) -> dict[str, Any]:
    """Infos without the keys that their masks say no row has: the same as infos in which they are absent."""
    none = {key for key in infos if f"_{key}" in infos and not np.any(infos[f"_{key}"])}
    return {key: value for key, value in infos.items() if key not in none and key.removeprefix("_") not in none}


def _assert_equal(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), f"{path}: {type(one)} and {type(other)}"
    if isinstance(one, dict):
        one, other = _had(one), _had(other)
        assert one.keys() == other.keys(), f"{path}: {sorted(one)} and {sorted(other)}"
        for key in one:
            _assert_equal(one[key], other[key], f"{path}[{key!r}]")
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape, f"{path}: {one.dtype}{one.shape} and {other.dtype}{other.shape}"
        if one.dtype == object:
            for i, (left, right) in enumerate(zip(one, other, strict=True)):
                _assert_equal(left, right, f"{path}[{i}]")
        else:
            assert np.array_equal(one, other), f"{path}:\n{one}\n{other}"
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            _assert_equal(left, right, f"{path}[{i}]")
    else:
        assert one == other, f"{path}: {one!r} and {other!r}"


@pytest.fixture(scope="session")
def assert_equal() -> Any:
    """Compares two nested structures exactly: types, dtypes, shapes and values."""
    return _assert_equal
