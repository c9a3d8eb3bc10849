"""`textgym reward`: what it learns from, what it writes, resuming, one-sentence errors."""

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from textgym.agents import RewardModel, RewardModelTrainer
from textgym.cli import default_data
from textgym.cli.reward_feedback import split
from textgym.feedback import Comment, Comparison, Label, Ranking, read_feedback, write_feedback
from textgym.rewards import ClassifierReward

DEVICE = os.environ.get("TEXTGYM_TEST_DEVICE", "cpu")
QUICK = ["--device", DEVICE, "--out", "run"]
exact = pytest.mark.skipif(DEVICE != "cpu", reason="runs are bit-identical on the CPU only")
WORDS = ("bad", "dull", "slow", "silly", "good", "fine", "kind", "warm")


@pytest.fixture
def feedback(textgym) -> str:
    """A file in the current folder: what is in the second half of the words is better."""
    rng = np.random.default_rng(0)
    pairs = [(rng.choice(WORDS[4:]), rng.choice(WORDS[:4])) for _ in range(60)]
    write_feedback("feedback.jsonl", [Comparison(f"the plot {i % 15} was", f" {a}.", f" {b}.") for i, (a, b) in enumerate(pairs)])
    return "feedback.jsonl"


def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("run/report.json").read_text())
    return found


def weights(folder: str) -> dict[str, np.ndarray]:
    return load_file(Path(folder) / "checkpoint" / "model" / "model.safetensors")


def test_a_run_on_a_file(textgym, feedback: str, capsys) -> None:
    assert textgym("reward", "--feedback", feedback, "--epochs", "8", "--batch-size", "8", *QUICK) == 0
    shown = capsys.readouterr().out
    assert "textgym train rloo --reward run/model" in shown and "wins" in shown
    numbers = report()
    assert numbers["after"]["num_records"] == 4  # all records of one of the fifteen prompts
    assert numbers["after"]["accuracy"]["mean"] == 1.0 and numbers["after"]["loss"] < numbers["before"]["loss"]
    assert numbers["normalisation"]["source"] == "the feedback's own texts" and numbers["normalisation"]["left_out"] == 0
    assert numbers["feedback"]["training"]["records"] == 56 and numbers["feedback"]["training"]["prompts"] == 14
    assert numbers["feedback"]["held_out"] == {"records": 4, "prompts": 1, "left_out": {"too_long": 0, "same_answers": 0, "comments": 0}}
    for name in ("config.json", "progress.csv", "curves.png", "reliability.png", "model/config.json", "best-model/config.json"):
        assert (Path("run") / name).stat().st_size > 0
    # Both ways of reading the folder, and the reward of the texts that it was normalised on, are the same.
    reward = ClassifierReward("run/model", device=DEVICE)
    texts = [f" {word}." for word in WORDS]
    scores = reward(["the plot 1 was"] * 8, texts)
    np.testing.assert_allclose(RewardModel.from_pretrained("run/model", device=DEVICE)(["the plot 1 was"] * 8, texts), scores, atol=1e-5)
    assert min(scores[4:]) > max(scores[:4])


def test_without_options_it_learns_from_the_bundled_models_texts(textgym, monkeypatch, capsys) -> None:
    monkeypatch.setattr(default_data, "COMPLETIONS_PER_PROMPT", 2)
    assert textgym("reward", "--total-timesteps", "2000", *QUICK) == 0
    assert report()["after"]["num_records"] == 20
    assert textgym("train", "ppo", "--total-timesteps", "200", "--num-envs", "8", "--max-new-tokens", "6", "--reward", "run/model",
                   "--device", DEVICE, "--out", "rl") == 0  # fmt: skip


def test_the_mean_is_zero_on_the_reference_texts(textgym, feedback: str) -> None:
    rows = [{"prompt": "the end was", "completion": f" {word}."} for word in WORDS]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert textgym("reward", "--feedback", feedback, "--reference-texts", "texts.jsonl", *QUICK) == 0
    scores = ClassifierReward("run/model", device=DEVICE)(["the end was"] * 8, [row["completion"] for row in rows])
    assert np.mean(scores) == pytest.approx(0, abs=1e-4)
    assert textgym("reward", "--feedback", feedback, "--no-normalise", *QUICK, "--force") == 0
    trained, saved = weights("run"), load_file("run/model/model.safetensors")
    assert all(np.array_equal(trained[name], saved[name]) for name in trained)


@exact
def test_resuming_equals_an_uninterrupted_run(textgym, feedback: str, monkeypatch, capsys) -> None:
    command = ["reward", "--feedback", feedback, "--epochs", "4", "--batch-size", "8", "--eval-interval", "2", "--set", "center_coef=0.1"]
    assert textgym(*command, "--out", "whole", "--device", DEVICE) == 0
    train, steps = RewardModelTrainer.train, [0]

    def interrupted(trainer: RewardModelTrainer, rows: Any) -> None:
        train(trainer, rows)
        steps[0] += 1
        if steps[0] == 9:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RewardModelTrainer, "train", interrupted)
        assert textgym(*command, *QUICK) == 130
    assert "textgym reward --resume run" in capsys.readouterr().out
    assert textgym("reward", "--resume", "run", "--device", DEVICE) == 0
    whole, resumed = weights("whole"), weights("run")
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
    assert report()["after"] == json.loads(Path("whole/report.json").read_text())["after"]
    assert textgym("reward", "--resume", "run") == 2
    assert "has its" in capsys.readouterr().err


def test_patience_stops_early(textgym, feedback: str) -> None:
    records = [Comparison("the plot 3 was", f" {bad}.", f" {good}.") for good, bad in zip(WORDS[4:], WORDS[:4], strict=True)]
    write_feedback("opposite.jsonl", records)
    command = ["--feedback", feedback, "--held-out", "opposite.jsonl", "--epochs", "40", "--patience", "2", "--eval-interval", "2"]
    assert textgym("reward", *command, *QUICK) == 0
    settings = json.loads(Path("run/config.json").read_text())["settings"]
    assert report()["timesteps"] < 0.5 * settings["total_timesteps"]


def test_labels_and_spans(textgym) -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"the plot was {word} {i}.", "label": "pos" if word == "good" else "neg"} for i in range(15) for word in ("good", "bad")
    ]
    Path("labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert textgym("reward", "--feedback", "labels.jsonl", "--positive", "pos", "--epochs", "10", "--batch-size", "8", *QUICK) == 0
    assert report()["after"]["num_records"] == 3 and report()["after"]["accuracy"]["mean"] == 1.0
    spans = [
        {"prompt": f"say {i}", "completion": " the plot was bad. the end was good.", "spans": [{"category": "rude", "start": 0, "end": 18}]}
        for i in range(20)
    ]
    Path("spans.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spans))
    assert textgym("reward", "--feedback", "spans.jsonl", *QUICK, "--force") == 0
    assert RewardModel.from_pretrained("run/model").output_names == ["rude"]


def test_whole_prompts_are_held_out() -> None:
    records = [Comparison(f"prompt {i % 30}", "a", "b") for i in range(300)]
    train, held_out = split(records, seed=0)
    assert len(held_out) == 30 and not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert split(records, seed=0) == (train, held_out) != split(records, seed=1)
    labels = [Label("", f"text {i}", i % 2 == 0) for i in range(50)]
    assert [len(part) for part in split(labels, seed=0)] == [45, 5]
    same = [Comparison("one prompt", f"{i}", "b") for i in range(50)]
    assert [len(part) for part in split(same, seed=0)] == [45, 5]
    many = [Comparison(f"prompt {i}", "a", "b") for i in range(9000)]
    assert len(split(many, seed=0)[1]) == 500


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "somewhere"], "--feedback must be given with --model"),
        (["--held-out", "x.jsonl"], "--held-out must be given with --feedback"),
        (["--feedback", "none.jsonl"], "--feedback given as a path must be a file"),
        (["--feedback", "feedback.jsonl", "--model", "./nowhere"], "--model: "),
        (["--feedback", "feedback.jsonl", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--feedback", "feedback.jsonl", "--set", "center=1"], "Did you mean center_coef?"),
        (["--feedback", "feedback.jsonl", "--set", "seed=1"], "it has an option of its own"),
        (["--feedback", "feedback.jsonl", "--no-normalise", "--reference-texts", "x"], "cannot be given with --no-normalise"),
        (["--feedback", "feedback.jsonl", "--reference-texts", "none.jsonl"], "there is none at 'none.jsonl'"),
        (["--resume", "run"], "there is no run"),
        (["--resume", "run", "--epochs", "2"], "--epochs cannot be given with --resume"),
    ],
)
def test_errors_are_one_sentence(textgym, feedback: str, arguments: list[str], said: str, capsys) -> None:
    assert textgym("reward", *arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "unknown to the tokenizer" not in line]
    assert len(error) == 1 and said in error[0]
    assert not Path("runs").exists()


def test_bad_rows_are_said_in_short_lines(textgym, capsys) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"}\n{"prompt": "b"}\n')
    assert textgym("reward", "--feedback", "bad.jsonl") == 2
    error = capsys.readouterr().err.splitlines()
    assert error[0] == "textgym: --feedback must have good rows only, got 2 bad of 3:"
    assert error[1].startswith("  lines 2, 3 of ") and error[2] == "Mend them, or give --keep-good to leave them out."
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n' * 200)
    assert textgym("reward", "--feedback", "prompts.jsonl") == 2
    assert len(capsys.readouterr().err) < 700 and not Path("runs").exists()


def test_bad_rows_can_be_left_out(textgym, feedback: str, capsys) -> None:
    with Path(feedback).open("a") as file:
        file.write('{"prompt": "a"}\n')
    assert textgym("reward", "--feedback", feedback, "--keep-good", *QUICK) == 0
    assert "left out 1 row; the first: line 61" in capsys.readouterr().out
    assert report()["feedback"]["bad_rows"] == 1


def test_a_reward_run_is_no_policy(textgym, feedback: str, capsys) -> None:
    assert textgym("reward", "--feedback", feedback, *QUICK) == 0
    assert textgym("train", "ppo", "--resume", "run") == 2
    assert "is a run of textgym reward, which trains no policy" in capsys.readouterr().err


# -- what is left out ----------------------------------------------------------------------------------------------------


def with_long_ones(path: str) -> None:
    """Adds to the feedback records of five prompts whose texts are longer than the bundled model reads."""
    long = " good." + " fine." * 300
    write_feedback(path, [Comparison(f"the end {i} was", long, " bad.") for i in range(5)], append=True)


def test_what_is_longer_than_max_tokens_is_left_out_everywhere_and_counted(textgym, feedback: str, capsys, monkeypatch) -> None:
    """Training, both measurements, the texts that the reward is normalised on: nothing that was left out comes back."""
    with_long_ones(feedback)
    monkeypatch.setenv("COLUMNS", "80")
    assert textgym("reward", "--feedback", feedback, *QUICK) == 2
    assert "pass --set max_tokens=" in capsys.readouterr().err
    assert textgym("reward", "--feedback", feedback, "--set", "max_tokens=40", "--epochs", "2", *QUICK) == 0
    shown = capsys.readouterr().out
    numbers = report()
    sides = numbers["feedback"]
    assert sides["training"]["left_out"]["too_long"] + sides["held_out"]["left_out"]["too_long"] == 5
    assert sides["training"]["records"] + sides["held_out"]["records"] == 60
    assert numbers["after"]["left_out"] == sides["held_out"]["left_out"]
    assert f"left out: {sides['training']['left_out']['too_long']} longer than max_tokens=40" in shown
    assert 0 < numbers["normalisation"]["texts"] <= 120 and numbers["normalisation"]["left_out"] > 0
    assert numbers["finished"] == numbers["timesteps"]
    assert Path("run/reliability.png").exists() and ClassifierReward("run/model", device=DEVICE)(["the plot 1 was"], [" good."])
    assert "…" not in shown


def test_held_out_feedback_that_is_all_too_long_is_named_as_such(textgym, feedback: str, capsys) -> None:
    with_long_ones("long.jsonl")
    command = ["reward", "--feedback", feedback, "--set", "max_tokens=40", *QUICK]
    assert textgym(*command, "--held-out", "long.jsonl") == 2
    assert "--held-out must have a record within the" in capsys.readouterr().err
    write_feedback("mixed.jsonl", [Comparison(f"p {i}", " good." + " fine." * 300 * (i % 12 == 0), " bad.") for i in range(12)])
    seed = next(seed for seed in range(100) if split(list(read_feedback("mixed.jsonl")), seed)[1][0].prompt == "p 0")
    assert textgym("reward", "--feedback", "mixed.jsonl", "--set", "max_tokens=40", "--seed", str(seed), *QUICK) == 2
    error = capsys.readouterr().err
    assert "the held-out part of --feedback, 1 records: --feedback must have a record within the" in error and "Or give --held-out" in error
    assert not Path("run").exists()


def test_reference_texts_that_are_too_long_are_left_out(textgym, feedback: str, capsys) -> None:
    rows = [{"prompt": "the end was", "completion": f" {word}." * (1 if place < 3 else 300)} for place, word in enumerate(WORDS)]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert textgym("reward", "--feedback", feedback, "--reference-texts", "texts.jsonl", *QUICK) == 0
    assert report()["normalisation"]["texts"] == 3 and report()["normalisation"]["left_out"] == 5
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3:]))
    assert textgym("reward", "--feedback", feedback, "--reference-texts", "texts.jsonl", *QUICK, "--force") == 2
    assert "none of the texts of" in capsys.readouterr().err
    assert report()["finished"], "the run that was there is not replaced"


def test_a_failure_after_training_loses_nothing(textgym, feedback: str, monkeypatch, capsys) -> None:
    command = ["reward", "--feedback", feedback, "--epochs", "2", *QUICK]

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "normalise", fails)
        assert textgym(*command) == 2
    error = capsys.readouterr().err
    assert "no space left" in error and "Training is done and saved" in error and "textgym reward --resume run" in error
    assert not Path("run/model").exists(), "an unnormalised model would look like the result"
    assert "normalisation" not in report() and Path("run/error.txt").exists()
    assert textgym("reward", "--resume", "run", "--device", DEVICE) == 0
    assert "measuring and normalising" in capsys.readouterr().out
    first = load_file("run/model/model.safetensors")
    assert textgym(*command, "--force") == 0
    second = load_file("run/model/model.safetensors")
    assert all(np.allclose(first[name], second[name], atol=1e-6) for name in second)
    assert textgym("reward", "--resume", "run") == 2
    assert "has its" in capsys.readouterr().err


def test_ties_only(textgym, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ranks = [Ranking(f"the plot {i} was", (" good.", " fine."), (1, 1)) for i in range(20)]
    write_feedback("ties.jsonl", ranks)
    assert textgym("reward", "--feedback", "ties.jsonl", *QUICK) == 0
    shown, warned = capsys.readouterr()
    assert "textgym: --feedback holds 18 records, all of them ties" in warned and "decides nothing: all of it is ties" in shown
    assert report()["after"]["accuracy"]["mean"] is None and "…" not in shown
    write_feedback("same.jsonl", [Comparison(f"the plot {i} was", " good.", " good.") for i in range(20)])
    assert textgym("reward", "--feedback", "same.jsonl", *QUICK, "--force") == 2
    assert "--feedback must have answers that differ, but the answers of every row are the same tokens" in capsys.readouterr().err


def test_comments_of_label_are_no_obstacle(textgym, feedback: str, capsys) -> None:
    write_feedback(feedback, [Comment("the plot 1 was", (" good.", " bad."), "neither", columns={"by": "person"})], append=True)
    assert textgym("reward", "--feedback", feedback, *QUICK) == 0
    sides = report()["feedback"]
    assert sides["training"]["left_out"]["comments"] + sides["held_out"]["left_out"]["comments"] == 1
    assert "1 comments" in capsys.readouterr().out


def test_words_that_the_model_does_not_know_are_said(textgym, capsys) -> None:
    rows = [Comparison(f"the plot {i} was", " xylophone zebra.", " quokka.") for i in range(20)]
    write_feedback("strange.jsonl", [*rows, *[Comparison(f"the plot {i} was", " good zebra.", " bad.") for i in range(20)]])
    assert textgym("reward", "--feedback", "strange.jsonl", *QUICK) == 0
    assert "textgym: " in (said := capsys.readouterr().err) and "of the tokens of --feedback are unknown to the tokenizer" in said


# -- other names, and what is printed at the end -------------------------------------------------------------------------


def printed_commands(shown: str) -> list[list[str]]:
    lines = shown.partition("To train a policy by it:\n")[2].splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip().startswith("textgym train")]


SPANS = [
    {"prompt": f"say {i}", "completion": " the plot was bad. the end was good.", "errors": [{"type": kind, "start": 0, "end": 18}]}
    for i in range(20)
    for kind in ("rude", "false")
]


@pytest.mark.parametrize("options", [[], ["--per-token"]])
def test_after_spans_every_printed_command_works_and_each_category_is_reported(textgym, capsys, monkeypatch, options: list[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    Path("spans.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SPANS))
    assert textgym("reward", "--feedback", "spans.jsonl", "--rename", "errors=spans", "--form", "marking", *options, *QUICK) == 0
    shown = capsys.readouterr().out
    assert "Segments by category" in shown and "AUC" in shown and "…" not in shown
    assert set(report()["after"]["by_category"]) == {"rude", "false"}
    commands = printed_commands(shown)
    assert len(commands) == 2
    for number, command in enumerate(commands):
        small = ["--total-timesteps", "100", "--num-envs", "8", "--max-new-tokens", "4", "--device", DEVICE, "--out", f"rl{number}"]
        assert textgym(*command, *small) == 0, command


def test_the_printed_command_of_one_output_works_from_a_folder_with_a_space(textgym, feedback: str, capsys) -> None:
    assert textgym("reward", "--feedback", feedback, "--device", DEVICE, "--out", "my run") == 0
    (command,) = printed_commands(capsys.readouterr().out)
    small = ["--total-timesteps", "100", "--num-envs", "8", "--max-new-tokens", "4", "--device", DEVICE, "--out", "rl"]
    assert textgym(*command, *small) == 0
