"""Messages of the library in words that can be typed: each is raised through the command that a user gave."""

import json
from pathlib import Path
from typing import Any

import pytest

from textgym.cli.translating import Vocabulary, translated

CASES = [
    ("train ppo --max-prompt-tokens 2", "raise --max-prompt-tokens (the longest needs"),
    ("train ppo --max-prompt-tokens 2", "or pass --truncate-prompts to keep the end of each."),
    ("train ppo --set n_epochs=0", "--set n_epochs=... must be a whole number of passes"),
    ("train ppo --set num_generations=7", "--set num_generations=... must divide the number of environments"),
    ("train ppo --set clip_range=wide", "--set clip_range=... must be a number at least 0, got 'wide'. A schedule is taken too"),
    ("train ppo --set ptx_coef=1", "--set ptx_texts=... must be given if and only if --set ptx_coef=... is above 0, got"),
    ("train ppo --prompts bad.jsonl", "bad.jsonl' is not JSON"),
    ("train ppo --reward film-reviw", "--reward 'film-reviw' is no reward. Did you mean 'film-review'? It takes"),
    ("train ppo --reward ./nothing", "--reward must be the name of a reward"),
    ("train rloo --set rollout_size=3", "--set rollout_size=... must be a multiple of the number of environments"),
    ("train grpo --set num_generations=1", "--set num_generations=... must be at least 2 for GRPO"),
    ("train rloo --model ./nowhere --prompts words.jsonl --reward length", "--model: there is no folder './nowhere'."),
    ("train dpo --beta 0", "--beta must be a number above 0, got 0.0"),
    ("train dpo --set label_smoothing=0.7", "--set label_smoothing=... must be below 0.5"),
    ("train dpo --set loss_type=ipo --set label_smoothing=0.1", "--set label_smoothing=... must be 0 with --set loss_type=ipo"),
    ("train dpo --preferences judged.jsonl", "must be a comparison or a ranking, got a judgements; "),
    ("train dpo --preferences words.jsonl", "'completion']; textgym convert --rename OLD=NEW renames those that hold them."),
    ("train ppo --prompts .", "(all but the last also in .gz), got"),
    ("train kto --set desirable_weight=-1", "--set desirable_weight=... must be a number at least 0"),
    ("train kto --preferences words.jsonl", "words.jsonl' must have the columns label"),
    ("sft --epochs 0", "--epochs must be a whole number of passes, at least 1, got 0."),
    ("sft --batch-size 0", "--batch-size must be a whole number of examples"),
    ("sft --examples long.jsonl", "the model has 192 positions; pass --set max_tokens=192 to leave out what is longer."),
    ("sft --examples long.jsonl --set max_tokens=1", "--set max_tokens=... must be at least"),
    ("sft --examples chat.jsonl", "take a model whose tokenizer has one, or give the prompt as a string"),
    ("evaluate --reward lexicon", "reward 'lexicon' needs 'lexicon?path=...'."),
    ("convert nowhere.jsonl --to pairs --out pairs.jsonl", "FILES given as a path must be a file, and there is none at"),
    ("convert empty.jsonl --to pairs --out pairs.jsonl", "FILES must hold at least one row"),
    ("reward --feedback classes.jsonl", "--positive with the one that is good"),
    ("reward --feedback some.jsonl", "Mend them, or give --keep-good to leave them out."),
]


@pytest.fixture
def files() -> None:
    """What the commands name, in the current folder."""
    rows: dict[str, list[dict[str, Any]]] = {
        "words": [{"prompt": f"the {word}", "completion": " was good."} for word in ("plot", "film", "story", "cast")],
        "long": [{"prompt": f"the {word}", "completion": " was good." * 100} for word in ("plot", "film", "story", "cast")],
        "chat": [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]}] * 3,
        "classes": [{"text": "good", "label": "noHate"}, {"text": "bad", "label": "hate"}] * 3,
        "some": [{"text": "good", "label": True}, {"text": "bad", "label": False}, {"text": "none"}] * 3,
        "judged": [{"prompt": "a", "completions": ["b", "c"], "comparisons": [{"i": 0, "j": 1, "z": 1}]}] * 3,
    }
    for name, content in rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    Path("bad.jsonl").write_text("{no json\n")
    Path("empty.jsonl").touch()


@pytest.mark.parametrize(("arguments", "sentence"), CASES)
def test_what_is_said_can_be_typed(textgym, files, capsys, arguments: str, sentence: str) -> None:
    assert textgym(*arguments.split()) == 2
    said = capsys.readouterr().err
    assert sentence in said, said
    assert said.count("\n") == 1 or arguments.startswith("reward "), said  # which has a line for each kind of bad row
    for python in (
        "=True",
        "`max_",
        "`n_epochs",
        "`prompts",
        "`path",
        "`beta",
        "`positive",
        "on_bad_row",
        "to_comparisons",
        "[...]",
        "`feedback",
    ):
        assert python not in said


def test_a_line_about_a_bad_row_does_not_name_the_option_again(textgym, files, capsys) -> None:
    assert textgym("reward", "--feedback", "bad.jsonl") == 2
    assert "\n  line 1 of " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train rloo", "sft", "reward", "evaluate", "generate", "label", "bench", "pipeline"])
def test_a_seed_below_zero_is_refused_by_its_option(textgym, capsys, command: str) -> None:
    assert textgym(*command.split(), "--seed", "-1") == 2
    said = capsys.readouterr().err
    assert "--seed" in said and said.count("\n") == 1, said


@pytest.mark.parametrize("name", ["exact-match", "rouge-l"])
def test_an_option_of_a_reward_is_said_as_a_part_of_its_name(textgym, files, capsys, name: str) -> None:
    sizes = ["--max-new-tokens", "4", "--num-envs", "4", "--out", "run", "--device", "cpu"]
    assert textgym("train", "rloo", "--prompts", "words.jsonl", "--reward", name, *sizes) == 2
    assert f"'{name}?column=...'" in capsys.readouterr().err


def test_what_the_user_wrote_stays_as_it_is() -> None:
    known = Vocabulary({"max_tokens": "--max-tokens", "flag": "--flag"}, {"flag": ""}, {"gamma": "--set"})
    said = "row 3 must be true, got 'pass `max_tokens=1`, don\\'t `flag=True`'; the model's `max_tokens` is 3, its `gamma` 1"
    assert translated(said, known) == (
        "row 3 must be true, got 'pass `max_tokens=1`, don\\'t `flag=True`'; the model's --max-tokens is 3, its --set gamma=... 1"
    )
    assert translated('got "it\'s `gamma`", not `gamma=2`', known) == 'got "it\'s `gamma`", not --set gamma=2'
    assert translated("reward `gamma` returned nan for `other`", known) == "reward `gamma` returned nan for `other`"
    assert translated("`flag=True` or `flag=False`", known) == "--flag or no --flag"


def test_a_model_that_cannot_be_reached_is_said_in_two_sentences() -> None:
    said = (
        "--model: no model could be loaded from 'a/b'; give an id of the hub that can be reached from here. `tokenizer` must be a "
        "transformers tokenizer or the path or id of one, got 'a/b', from which none could be loaded: No connection."
    )
    expected = "--model: no model could be loaded from 'a/b'; give an id of the hub that can be reached from here. No connection."
    assert translated(said, Vocabulary({"model": "--model"})) == expected


def test_what_code_of_the_user_says_stays_as_it_is(textgym, small, capsys) -> None:
    Path("mine.py").write_text("def reward(completions): raise ValueError('set `beta=1` and `max_new_tokens`')\n")
    assert textgym("train", "ppo", *small, "--reward", "mine:reward", "--out", "run") == 2
    assert "set `beta=1` and `max_new_tokens`" in capsys.readouterr().err
