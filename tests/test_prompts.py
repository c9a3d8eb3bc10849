import copy
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from textgym.prompts import PromptSet, encode_prompts, read_prompts

BOS, EOS = 1, 2
ROWS = [{"prompt": "a b", "answer": 3}, {"prompt": "c", "answer": 4, "hint": "x"}]


def make_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["?", "<s>", "</s>", *"abcdefg"])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        words.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="?")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def ids_of(prompts: PromptSet) -> list[list[int]]:
    return [ids.tolist() for ids in prompts.ids]


def test_strings(tokenizer: Any) -> None:
    prompts = PromptSet(["a b", "c"], tokenizer)
    assert ids_of(prompts) == [[3, 4], [5]]
    assert (prompts.texts, prompts.columns, len(prompts), prompts.longest) == (["a b", "c"], {}, 2, 2)
    assert all(ids.dtype == np.int64 for ids in prompts.ids)
    assert prompts.lengths.tolist() == [2, 1]


def _write(path: Path, lines: list[str]) -> str:
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("source", ["rows", "tuple", "jsonl", "jsonl.gz", "path", "dataset"])
def test_rows_with_columns_from_every_source(source: str, tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    given: Any = {
        "rows": lambda: ROWS,
        "tuple": lambda: tuple(ROWS),
        "jsonl": lambda: _write(tmp_path / "p.jsonl", [lines[0], "", lines[1]]),
        "jsonl.gz": lambda: _write(tmp_path / "p.jsonl.gz", lines),
        "path": lambda: Path(_write(tmp_path / "p.jsonl", lines)),
        "dataset": lambda: _dataset([{**ROWS[0], "hint": None}, ROWS[1]]),
    }[source]()
    prompts = PromptSet(given, tokenizer)
    assert prompts.texts == ["a b", "c"]
    assert prompts.columns == {"answer": [3, 4], "hint": [None, "x"]}
    assert ids_of(prompts) == [[3, 4], [5]]
    prompt = prompts[1]
    assert (prompt.prompt_index, prompt.text, prompt.ids.tolist(), prompt.columns) == (1, "c", [5], {"answer": 4, "hint": "x"})


def _dataset(rows: list[dict[str, Any]]) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(rows)


def test_a_json_line_may_be_a_prompt(tmp_path: Path) -> None:
    assert read_prompts(_write(tmp_path / "p.jsonl", ['"a b"', '"c"'])) == (["a b", "c"], {})


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.jsonl", ['{"prompt": "a"}', "", "{oops"])
    with pytest.raises(ValueError, match=r"line 3 of .* is not JSON .*oops"):
        read_prompts(path)


def test_a_line_without_a_prompt_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.jsonl", ['{"prompt": "a"}', '{"text": "b", "label": 1}'])
    with pytest.raises(ValueError, match=r"row 1 of '.*p\.jsonl' must have a \"prompt\" column, got the columns \['text', 'label'\]"):
        read_prompts(path)


def test_data_sets_that_cannot_serve() -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_list([{"text": "a"}])
    with pytest.raises(ValueError, match=r"must have a \"prompt\" column, got the columns \['text'\]; use `dataset.rename_column"):
        read_prompts(split)
    with pytest.raises(ValueError, match=r"one split of a map-style .*choose a split \(`dataset\[\"train\"\]`\)"):
        read_prompts(datasets.DatasetDict({"train": split}))
    with pytest.raises(ValueError, match="make a list of an iterable data set"):
        read_prompts(split.to_iterable_dataset())


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (None, "a", [3]),
        ("<s> $A", "a", [BOS, 3]),
        ("<s> $A", "", [BOS]),  # only the token that starts a text: fine
        ("$A </s>", "a", [3]),  # an end that the tokenizer appends would leave nothing to continue
        ("<s> $A </s>", "a", [BOS, 3]),
        ("<s> $A </s>", "", [BOS]),
        ("$A </s>", "a </s>", [3, EOS]),  # the user's own stays
        (None, "a </s>", [3, EOS]),
        ("<s> $A", "</s>", [BOS, EOS]),
    ],
)
def test_special_tokens_of_strings(template: str | None, text: str, expected: list[int]) -> None:
    assert encode_prompts(make_tokenizer(template), [text])[0].tolist() == expected


def test_truncation_stored_in_the_tokenizer_is_not_applied() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(1)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    assert encode_prompts(tokenizer, ["a b c"])[0].tolist() == [3, 4, 5]


def test_prompts_longer_than_the_tokenizer_believes_in_are_no_warning() -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 2
    assert encode_prompts(tokenizer, ["a b c"])[0].tolist() == [3, 4, 5]


CHAT = (
    "<s> {% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}g{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("<s> $A")
    tokenizer.chat_template = CHAT
    return tokenizer


def test_messages_get_no_second_bos() -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert encode_prompts(chat_tokenizer(), [messages])[0].tolist() == [BOS, 3, 4, 9]


def test_messages_that_end_with_the_assistant_are_continued() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert encode_prompts(chat_tokenizer(), [messages])[0].tolist() == [BOS, 3, 4]


def test_strings_and_messages_may_be_mixed() -> None:
    prompts = PromptSet(["a", [{"role": "user", "content": "b"}]], chat_tokenizer())
    assert ids_of(prompts) == [[BOS, 3], [BOS, 4, 9]]


def test_messages_of_a_data_set() -> None:
    rows = _dataset([{"prompt": [{"role": "user", "content": "b"}], "answer": 1}])
    prompts = PromptSet(rows, chat_tokenizer())
    assert prompts.texts == [[{"role": "user", "content": "b"}]]
    assert prompts.columns == {"answer": [1]}


def test_fit(tokenizer: Any) -> None:
    prompts = PromptSet(["a b c", "d", "e f g", "a b"], tokenizer)
    assert prompts.fit(3) is prompts
    with pytest.raises(ValueError, match=r"row 0 \(3 tokens\), row 2 \(3 tokens\); raise `max_prompt_tokens` \(the longest needs 3\)"):
        prompts.fit(2)
    fitted = prompts.fit(2, truncate=True)
    assert ids_of(fitted) == [[4, 5], [6], [8, 9], [3, 4]]
    assert ids_of(prompts) == [[3, 4, 5], [6], [7, 8, 9], [3, 4]]
    assert fitted.texts == prompts.texts
    many = PromptSet(["a b"] * 9, tokenizer)
    with pytest.raises(ValueError, match=r"row 4 \(2 tokens\) and 4 more;"):
        many.fit(1)


def test_left_padded(tokenizer: Any) -> None:
    prompts = PromptSet(["a b c", "d", "e f"], tokenizer)
    ids, real = prompts.left_padded(np.array([1, 0, 2, 1]), 4, 0)
    np.testing.assert_array_equal(ids, [[0, 0, 0, 6], [0, 3, 4, 5], [0, 0, 7, 8], [0, 0, 0, 6]])
    np.testing.assert_array_equal(real, ids > 0)


def test_copies_share(tokenizer: Any) -> None:
    prompts = PromptSet(["a"], tokenizer)
    assert copy.deepcopy({"prompts": prompts})["prompts"] is prompts
    assert PromptSet.build(prompts, tokenizer) is prompts
    assert repr(prompts) == "PromptSet(1 prompts, columns=[])"


def test_another_tokenizer_reads_the_texts_again(tokenizer: Any) -> None:
    prompts = PromptSet(ROWS, tokenizer)
    other = PromptSet.build(prompts, make_tokenizer("<s> $A"))
    assert ids_of(other) == [[BOS, 3, 4], [BOS, 5]]
    assert other.columns == prompts.columns
    assert ids_of(prompts) == [[3, 4], [5]]


def test_the_users_rows_are_not_held() -> None:
    rows = [{"prompt": [{"role": "user", "content": "b"}], "answer": 1}]
    prompts = PromptSet(rows, chat_tokenizer())
    rows[0]["prompt"][0]["content"] = "changed"  # type: ignore[index]
    rows.append({"prompt": "a"})
    assert prompts.texts == [[{"role": "user", "content": "b"}]]
