import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from textgym.bundled import bundled_tokenizer_path
from textgym.tokenizers import SharedTokenizer, decode, end_token_ids, filler_token_id, load_tokenizer


def byte_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE({**alphabet, "<end>": 256, "<pad>": 257}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words, **{"eos_token": "<end>", **kwargs})


@pytest.mark.parametrize("as_type", [str, Path])
@pytest.mark.parametrize("file", ["", "tokenizer.json"])
def test_load_from_a_folder(as_type: Any, file: str, tmp_path: Path) -> None:
    byte_tokenizer(pad_token="<pad>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(as_type(tmp_path / file))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)


def test_load_does_not_import_torch() -> None:
    code = f"""
import sys
from textgym.tokenizers import load_tokenizer
load_tokenizer({str(bundled_tokenizer_path())!r})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_a_tokenizer_is_returned_as_it_is() -> None:
    tokenizer = byte_tokenizer()
    assert load_tokenizer(tokenizer) is tokenizer
    shared = SharedTokenizer(tokenizer)
    assert load_tokenizer(shared) is tokenizer
    assert copy.deepcopy(shared) is shared
    assert repr(shared) == "SharedTokenizer(TokenizersBackend, vocab_size=258)"


def test_raw_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="got Tokenizer; wrap one"):
        load_tokenizer(byte_tokenizer().backend_tokenizer)


@pytest.mark.parametrize(
    ("given", "expected"), [(None, (256,)), (3, (3,)), ([3, 4, 3], (3, 4)), (np.array([5, 6]), (5, 6)), (np.int64(7), (7,)), ((8,), (8,))]
)
def test_end_token_ids(given: Any, expected: tuple[int, ...]) -> None:
    ids = end_token_ids(byte_tokenizer(), given)
    assert ids == expected
    assert all(type(one) is int for one in ids)


def test_filler_is_the_pad_token_if_there_is_one() -> None:
    assert filler_token_id(byte_tokenizer(pad_token="<pad>"), (256,)) == 257
    assert filler_token_id(byte_tokenizer(), (256, 3)) == 256


def sequences() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 258, length).tolist() for length in (0, 1, 5, 40)]


def test_decode_is_the_tokenizers_own() -> None:
    tokenizer = byte_tokenizer(pad_token="<pad>")
    assert decode(tokenizer, sequences()) == [tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences()]
    assert decode(tokenizer, []) == []


def test_decode_honours_cleaning_up() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, ".": 1, "<end>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", clean_up_tokenization_spaces=True)
    assert decode(tokenizer, [[0, 1]]) == [tokenizer.decode([0, 1])] == ["a."]


def test_decode_honours_a_subclass() -> None:
    class Loud(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **kwargs: Any) -> str:
            return str(super()._decode(*args, **kwargs)).upper()

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = Loud(tokenizer_object=words, eos_token="b")
    assert decode(tokenizer, [[0, 0]]) == ["A A"]


def test_special_tokens_stay_out_of_texts() -> None:
    tokenizer = byte_tokenizer(pad_token="<pad>")
    ids = tokenizer("hi")["input_ids"]
    assert decode(tokenizer, [[*ids, 256], [257, *ids]]) == ["hi", "hi"]
