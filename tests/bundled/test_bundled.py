import hashlib
import json
import subprocess
import sys

import pytest
from transformers import PreTrainedTokenizerFast

from textgym.bundled import BUNDLED_PATHS, bundled_model_path, bundled_path, bundled_prompts, bundled_tokenizer_path
from textgym.bundled.grammar import is_sentence, split_words

SIZE_LIMIT = 6_000_000  # bytes, everything together


def test_files_are_the_ones_in_the_manifest() -> None:
    manifest = json.loads(bundled_path("manifest").read_text())
    data = bundled_path("manifest").parent
    found = {path.relative_to(data).as_posix(): path for path in data.rglob("*") if path.is_file() and path.name != "manifest.json"}
    assert set(found) == set(manifest["files"])
    for name, path in found.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest["files"][name], name


def test_size() -> None:
    assert sum(path.stat().st_size for path in bundled_path("manifest").parent.rglob("*") if path.is_file()) < SIZE_LIMIT


def test_prompts_are_many_distinct_and_held_out() -> None:
    train, held_out = bundled_prompts("train"), bundled_prompts("eval")
    assert (len(train), len(held_out)) == (200, 50)
    assert len({row["prompt"] for row in train + held_out}) == 250
    for row in train + held_out:
        review = split_words(row["prompt"] + row["reference"])
        first = review[: next(position for position, word in enumerate(review) if word in ".!")]
        assert is_sentence(tuple(first))


def test_returned_rows_are_fresh() -> None:
    bundled_prompts()[0]["prompt"] = "changed"
    assert bundled_prompts()[0]["prompt"] != "changed"


@pytest.mark.parametrize("call", [lambda: bundled_prompts("test"), lambda: bundled_path("weights")])
def test_unknown_names_say_what_there_is(call) -> None:
    with pytest.raises(ValueError, match=r"must be .*, not '(test|weights)'"):
        call()


def test_paths_exist() -> None:
    assert all(bundled_path(name).exists() for name in BUNDLED_PATHS)


def test_tokenizer_survives_decoding_and_encoding() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bundled_tokenizer_path())
    assert (
        tokenizer("The film was brilliant , and   i loved it!").input_ids == tokenizer("the film was brilliant, and i loved it !").input_ids
    )
    for row in bundled_prompts():
        prompt, both = tokenizer(row["prompt"]).input_ids, tokenizer(row["prompt"] + row["reference"]).input_ids
        assert tokenizer.unk_token_id not in both
        assert both[: len(prompt)] == prompt  # prompts end on token borders
        assert tokenizer.decode(both[len(prompt) :]) == row["reference"]


def test_the_model_fits_its_tokenizer() -> None:
    config = json.loads((bundled_model_path() / "config.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bundled_tokenizer_path())
    assert config["vocab_size"] == len(tokenizer)
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_importing_loads_no_torch() -> None:
    code = "import sys, textgym.bundled as b; b.bundled_prompts(); b.true_reward(['a'], ['b']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
