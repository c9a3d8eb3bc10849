"""`textgym sft` and `textgym train dpo|kto`: what they learn from, what they measure, resuming, one-sentence errors."""

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from textgym.cli import default_data
from textgym.cli.offline_workplace import prompt_of
from textgym.cli.run_folder import read_json_lines
from textgym.tokenizers import decode

DEVICE = os.environ.get("TEXTGYM_TEST_DEVICE", "cpu")
QUICK = ["--device", DEVICE, "--max-new-tokens", "8", "--total-timesteps", "400"]
exact = pytest.mark.skipif(DEVICE != "cpu", reason="runs are bit-identical on the CPU only")
THINGS = ("plot", "film", "story", "music", "acting", "ending", "cast", "director", "script", "movie", "picture", "scene")  # 12 prompts
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": f"the {thing}", "completion": " was good."} for thing in THINGS],
    "dpo": [
        {"prompt": f"the {thing}", "chosen": " was good.", "rejected": f" was {word}."}
        for thing, word in zip(THINGS, ("bad", "dull", "slow", "silly") * 3, strict=True)
    ],
    "kto": [
        {"prompt": f"the {thing}", "completion": f" was {word}.", "label": word == "good"}
        for thing, word in zip(THINGS, ("bad", "good") * 6, strict=True)
    ],
}
COMMANDS = {"sft": ["sft", "--examples"], "dpo": ["train", "dpo", "--preferences"], "kto": ["train", "kto", "--preferences"]}
everyone = pytest.mark.parametrize("kind", COMMANDS)


@pytest.fixture
def file() -> Any:
    """Writes rows to rows.jsonl in the current folder and returns the command that learns from them."""

    def write(kind: str, rows: list[dict[str, Any]] | None = None) -> list[str]:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or EXAMPLES[kind]))
        return [*COMMANDS[kind], "rows.jsonl"]

    return write


def summary() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("run/summary.json").read_text())
    return found


def weights(folder: str) -> dict[str, np.ndarray]:
    return load_file(Path(folder) / "model" / "model.safetensors")


@everyone
def test_a_file_of_ones_own(textgym, file, kind: str, capsys) -> None:
    assert textgym(*file(kind), *QUICK, "--out", "run", "--set", "batch_size=4") == 0
    measured = summary()
    assert measured["after"]["loss"] != measured["before"]["loss"]
    assert kind == "kto" or measured["after"]["loss"] < measured["before"]["loss"]  # the one held-out label says little
    assert measured["before"]["reward"] is None and measured["before"]["true_reward"] is None
    assert measured["before"]["kl_per_sequence"] == pytest.approx(0, abs=1e-4) and measured["after"]["kl_per_sequence"] > 1e-3
    assert (measured["after"]["accuracy"] is not None) == (kind == "dpo")
    shown = capsys.readouterr().out
    assert "no reward" in " ".join(shown.partition("Measuring")[0].split())
    assert "loss on held-out examples" in shown and "reward" not in shown.partition("Measuring")[2].partition("Run folder")[0]
    samples = read_json_lines(Path("run/samples-after.jsonl"))
    assert {row["prompt"] for row in samples} <= {row["prompt"] for row in EXAMPLES[kind]}
    rows = list(csv.DictReader(Path("run/progress.csv").read_text().splitlines()))
    assert {"train/loss", "eval/loss", "train/learning_rate", "train/epoch"} <= set(rows[-1])
    assert not Path("run/best-model").exists()
    assert json.loads(Path("run/config.json").read_text())["settings"]["examples"] == str(Path("rows.jsonl").resolve())


@everyone
def test_with_a_reward_it_is_measured(textgym, file, kind: str) -> None:
    Path("short_words.py").write_text("def short(completions): return [-float(len(c)) for c in completions]\n")
    assert textgym(*file(kind), *QUICK, "--out", "run", "--reward", "short_words:short", "--eval-interval", "1") == 0
    assert summary()["before"]["reward"] < 0
    assert "eval/reward_mean" in Path("run/progress.csv").read_text()
    assert Path("run/best-model").exists()


@everyone
def test_without_a_file_the_bundled_data(textgym, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(default_data, "DEMONSTRATIONS", 100)
    monkeypatch.setattr(default_data, "COMPLETIONS_PER_PROMPT", 2)
    command = ["sft"] if kind == "sft" else ["train", kind]
    assert textgym(*command, *QUICK, "--out", "run") == 0
    measured = summary()["after"]
    assert None not in (measured["reward"], measured["true_reward"], measured["loss"])


def test_the_bundled_preferences_are_labelled_by_the_bundled_reward() -> None:
    from textgym.agents import CausalLMPolicy
    from textgym.bundled import bundled_model_path
    from textgym.rewards.resolve import resolve_reward

    policy = CausalLMPolicy.from_pretrained(bundled_model_path(), device=DEVICE)
    pairs = default_data.preferences(policy, 0, 16)
    assert 1950 < len(pairs) <= 2000, "of 2,000 pairs of samples, those that are the same are left out"
    assert pairs == default_data.preferences(policy, 0, 16) != default_data.preferences(policy, 1, 16)
    prompts = decode(policy.tokenizer, [row["prompt_ids"] for row in pairs])
    reward = resolve_reward("film-review")[1]
    chosen, rejected = (decode(policy.tokenizer, [row[side] for row in pairs]) for side in ("chosen_ids", "rejected_ids"))
    margins = np.subtract(*(reward(prompts=prompts, completions=texts) for texts in (chosen, rejected)))
    # Bradley-Terry: a margin of size m is on the right side with probability σ(m)
    expected = (1 / (1 + np.exp(-np.abs(margins)))).mean()
    assert (margins > 0).mean() == pytest.approx(expected, abs=0.03)


def test_demonstrations_are_favourable_sentences_of_the_grammar() -> None:
    from textgym.bundled import bundled_prompts, true_reward

    rows = default_data.demonstrations(0)
    assert len(rows) == 2000
    scores = true_reward([row["prompt"] for row in rows], [row["completion"] for row in rows])
    references = bundled_prompts("train")
    usual = true_reward([row["prompt"] for row in references], [row["reference"] for row in references])
    assert np.mean(scores) > np.mean(usual) + 0.3
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in bundled_prompts("eval")}


@exact
@everyone
def test_an_interrupted_run_that_goes_on_is_the_uninterrupted_one(textgym, file, kind: str, monkeypatch, capsys) -> None:
    from textgym.agents.offline import OfflineAgent

    command, train = file(kind), OfflineAgent.train
    assert textgym(*command, *QUICK, "--out", "whole") == 0
    calls = []

    def interrupted(agent: OfflineAgent, rows: Any) -> None:
        calls.append(len(rows))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        train(agent, rows)

    monkeypatch.setattr(OfflineAgent, "train", interrupted)
    assert textgym(*command, *QUICK, "--out", "run") == 130
    again = "textgym sft --resume run" if kind == "sft" else f"textgym train {kind} --resume run"
    assert again in capsys.readouterr().out
    assert textgym(*again.split()[1:]) == 0
    first, second = weights("whole"), weights("run")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_the_passes_are_counted(textgym, file) -> None:
    assert textgym(*file("sft"), "--epochs", "2", "--packing", "--device", DEVICE, "--max-new-tokens", "8", "--out", "run") == 0
    settings = json.loads(Path("run/config.json").read_text())["settings"]
    assert settings["total_timesteps"] == summary()["timesteps"] == 2 * 11 * 4  # was, good, ., EOS


def test_plain_texts_are_begun_and_gone_on_with(textgym, file) -> None:
    rows = [{"text": f"i watched this film with two friends and it was {word}."} for word in ("good", "bad") * 4]
    assert textgym(*file("sft", rows), *QUICK, "--out", "run") == 0
    assert read_json_lines(Path("run/samples-after.jsonl"))[0]["prompt"] == "i watched this film with"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("sft --examples nowhere.jsonl", "--examples given as a path must be a file"),
        ("sft --examples bad.jsonl", "bad.jsonl' must have the columns prompt and completion"),
        ("sft --examples one.jsonl", "one.jsonl holds one row"),
        ("sft --examples same.jsonl", "same.jsonl holds 3 rows of one prompt, so no prompt can be held out: give --held-out too"),
        ("sft --examples empty.jsonl", "empty.jsonl is empty: it must hold one JSON object per line"),
        ("sft --examples two.jsonl --held-out one.jsonl", "has 1 of its 1 prompts in common with --examples"),
        ("sft --examples two.jsonl --held-out nowhere.jsonl", "--held-out given as a path must be a file"),
        ("sft --model ./nowhere", "--model: there is no folder"),
        ("sft --model other", "--examples must be given with --model"),
        ("sft --epochs 0", "--epochs must be"),
        ("sft --set rollout_size=3", "SFT has no such argument"),
        ("sft --set beta=3", "has an option of its own"),
        ("sft --resume nowhere", "there is no run"),
        ("sft --examples ids.jsonl", "--eval-prompts must be given"),
        ("train dpo --preferences bad.jsonl", "bad.jsonl' must have the columns prompt, chosen and rejected"),
        ("train dpo --prompts one.jsonl", "--prompts cannot be given with dpo: it samples nothing and learns from --preferences"),
        ("train kto --num-envs 3", "--num-envs cannot be given with kto"),
        ("train ppo --preferences one.jsonl", "--preferences cannot be given with ppo"),
        ("train dpo --beta 0", "--beta must be a number above 0"),
        ("train sft", "'sft' is not one of"),
    ],
)
def test_one_sentence(textgym, save_model, capsys, arguments: str, sentence: str) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"question": "a"}\n')
    Path("one.jsonl").write_text('{"prompt": "the", "completion": " plot"}\n')
    Path("ids.jsonl").write_text("".join(f'{{"prompt_ids": [{i}], "completion_ids": [6]}}\n' for i in range(5, 9)))
    Path("same.jsonl").write_text('{"prompt": "the", "completion": " plot"}\n' * 3)
    Path("empty.jsonl").write_text("\n  \n")
    Path("two.jsonl").write_text('{"prompt": "the", "completion": " plot"}\n{"prompt": "a", "completion": " plot"}\n')
    save_model("other", 0)
    before = sorted(Path().rglob("*"))
    assert textgym(*arguments.split()) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and sentence in output.err, output.err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, [{"role": "user", "content": "a"}]),
        (
            {side: [{"role": "user", "content": "a"}, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")},
            [{"role": "user", "content": "a"}],
        ),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "\n\nHuman: a\n\nAssistant:"),
        ({"text": "one two three four five six"}, "one two three four five"),
    ],
)
def test_what_is_sampled_from_of_a_held_out_example(row: dict[str, Any], prompt: Any) -> None:
    assert prompt_of(row) == prompt
