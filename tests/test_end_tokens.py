"""The tokens that end a completion by default: of the tokenizer, of its chat template, of the files beside it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from textgym.end_tokens import closing_token_id, default_end_ids, write_end_ids
from textgym.tokenizers import end_token_ids, load_tokenizer

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "."]
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
)
PHI = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}{{ eos_token }}"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
REFUSES = "{{ raise_exception('no conversations') }}"
NOTHING_BEHIND = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"
SPECIAL = ["<start_of_turn>", "<end_of_turn>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"]


def make(template: str | None = None, **tokens: str | None) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **tokens}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **{name: token for name, token in named.items() if token})
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def ids(tokenizer: Any, *names: str) -> tuple[int, ...]:
    return tuple(tokenizer.convert_tokens_to_ids(name) for name in names)


def model(generation: Any = None, **config: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(**sizes, **config))
    if generation is not None:
        made.generation_config = generation
    return made


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (GEMMA, "<end_of_turn>"),
        (PHI, "<|end|>"),
        (CHATML, "<|im_end|>"),
        (LLAMA_2, "</s>"),
        (LLAMA_3, "<|eot_id|>"),
        (PLAIN, None),
        (REFUSES, None),
        (NOTHING_BEHIND, None),
        (None, None),
    ],
)
def test_the_token_that_closes_an_answer(template: str | None, closing: str | None) -> None:
    tokenizer = make(template)
    assert closing_token_id(tokenizer) == (None if closing is None else ids(tokenizer, closing)[0])
    expected = dict.fromkeys([*ids(tokenizer, "</s>"), *([] if closing is None else ids(tokenizer, closing))])
    assert end_token_ids(tokenizer) == tuple(expected)
    assert end_token_ids(tokenizer, [4]) == (4,)


def test_another_template_is_looked_at_anew() -> None:
    tokenizer = make(GEMMA)
    assert closing_token_id(tokenizer) == ids(tokenizer, "<end_of_turn>")[0]
    tokenizer.chat_template = CHATML
    assert closing_token_id(tokenizer) == ids(tokenizer, "<|im_end|>")[0]


@pytest.mark.parametrize(
    ("config", "generation", "found"),
    [
        ({}, GenerationConfig(eos_token_id=[2, 7]), (2, 7)),  # an ordinary word, named by somebody
        ({}, GenerationConfig(eos_token_id=7), (2, 7)),
        ({"eos_token_id": [2, 7]}, None, (2, 7)),
        ({"eos_token_id": 9}, None, (2, 9)),  # special in this tokenizer
        ({"eos_token_id": 4}, None, (2,)),  # might be a class's default, and is a word here
        ({"eos_token_id": 3}, None, (2,)),  # unknown words end nothing
        ({}, GenerationConfig(eos_token_id=[2, 999, 7]), (2, 7)),  # no token of this tokenizer
        ({"eos_token_id": None}, GenerationConfig(eos_token_id=None), (2,)),
    ],
)
def test_a_generation_configuration(config: dict[str, Any], generation: Any, found: tuple[int, ...], tmp_path: Path) -> None:
    tokenizer, made = make(), model(generation, **config)
    assert default_end_ids(tokenizer, made) == found
    # An environment has the files alone, and finds the same; without the generation configuration's, transformers makes the model's.
    made.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    beside = load_tokenizer(tmp_path)
    assert default_end_ids(beside) == default_end_ids(beside, LlamaForCausalLM.from_pretrained(tmp_path)) == found
    if generation is None:
        (tmp_path / "generation_config.json").unlink()
        assert default_end_ids(load_tokenizer(tmp_path)) == found


def test_a_change_of_what_was_copied_counts(tmp_path: Path) -> None:
    tokenizer, made = make(), model(eos_token_id=2)
    made.generation_config.eos_token_id = 7
    assert default_end_ids(tokenizer, made) == (2, 7)
    made.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert default_end_ids(load_tokenizer(tmp_path)) == (2, 7)


def test_llamas_own_default_is_no_end_in_another_vocabulary() -> None:
    assert LlamaConfig().eos_token_id == 2
    assert default_end_ids(make(eos_token="c"), model()) == (6,)


def test_files_that_cannot_be_read_say_nothing(tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    for text in ("no JSON", "[]", '{"eos_token_id": "7"}', '{"eos_token_id": null}'):
        (tmp_path / "generation_config.json").write_text(text)
        assert default_end_ids(load_tokenizer(tmp_path)) == (2,)
    assert default_end_ids(make()) == (2,)  # made in memory: the working directory's files are not its
    tokenizer.name_or_path = "no/such-repository"
    assert default_end_ids(tokenizer) == (2,)


def test_writing_ends(tmp_path: Path) -> None:
    tokenizer = make()
    write_end_ids(tmp_path, tokenizer, (2,))
    assert not (tmp_path / "generation_config.json").exists()
    write_end_ids(tmp_path, tokenizer, (2, 7))
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [2, 7]}
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.9, "eos_token_id": [7, 2]}')
    write_end_ids(tmp_path, tokenizer, (2, 7))
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [7, 2]
    write_end_ids(tmp_path, tokenizer, (5,))
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"top_p": 0.9, "eos_token_id": 5}


def test_an_environment_finds_them_without_torch(tmp_path: Path) -> None:
    tokenizer = make(GEMMA)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    code = (
        "import sys, gymnasium as gym, textgym\n"
        f"env = gym.make('TextGen-v0', prompts=['a b'], tokenizer={str(tmp_path)!r}, reward=lambda completions, **k: [0.0])\n"
        "print(env.unwrapped.eos_token_ids, 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == f"(2, 7, {ids(tokenizer, '<end_of_turn>')[0]}) False"
