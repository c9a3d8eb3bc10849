"""`textgym pipeline`: what it leaves, that it goes on, somebody outside who compares, and its errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from textgym.cli.algorithms import ALGORITHMS, Algorithm, OnlineAlgorithm
from textgym.cli.errors import EXIT_USER_ERROR, EXIT_WAITING

SMALL = ["--pairs", "12", "--total-timesteps", "100", "--num-envs", "8", "--max-new-tokens", "6"]


@pytest.fixture(autouse=True)
def not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textgym.cli.plots.plot_curves", lambda rows, path, title: path.write_text(f"{title}: {len(rows)}"))


def test_everything_bundled(textgym: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert textgym("pipeline", *SMALL, "--rounds", "2", "--out", "run") == 0
    output = capsys.readouterr().out
    for said in ("Fine-tuning on the demonstrations", "Round 1 of 2: comparing", "Round 2 of 2: training", "after against before"):
        assert said in output
    report = json.loads(Path("run/report.json").read_text())
    assert [one["comparisons"] for one in report["rounds"]] == [12, 24]
    assert {side["name"] for side in report["sides"]} == {"after", "before"}
    assert set(report["win_rates"]) == {"reward", "true_reward"}
    assert Path("run/model/model.safetensors").exists() and Path("run/samples.jsonl").exists()
    metrics = Path("run/progress.csv").read_text().splitlines()
    assert "eval/true_reward_mean" in metrics[0] and Path("run/curves.png").read_text().startswith("RLOO in 2 rounds")
    assert textgym("generate", "the film was", "--model", "run/model", "--max-new-tokens", "4") == 0


def test_more_rounds_are_the_same_as_all_at_once(textgym: Any) -> None:
    assert textgym("pipeline", *SMALL, "--rounds", "2", "--out", "whole") == 0
    assert textgym("pipeline", *SMALL, "--out", "parts") == 0
    assert textgym("pipeline", "--resume", "parts", "--rounds", "2") == 0
    assert Path("parts/model/model.safetensors").read_bytes() == Path("whole/model/model.safetensors").read_bytes()
    first, second = (json.loads(Path(name, "report.json").read_text()) for name in ("whole", "parts"))
    assert first == second


def test_somebody_labels_by_hand(textgym: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert textgym("pipeline", *SMALL, "--annotator", "by-hand", "--out", "run") == EXIT_WAITING == 75
    output = " ".join(capsys.readouterr().out.split())
    assert "textgym label run/round-1/pairs.jsonl --out run/round-1/comparisons.jsonl" in output
    assert "textgym pipeline --resume run" in output
    assert textgym("label", "run/round-1/pairs.jsonl", "--out", "run/round-1/comparisons.jsonl", "--by", "film-review-true") == 0
    assert textgym("pipeline", "--resume", "run") == 0
    report = json.loads(Path("run/report.json").read_text())
    assert 1 <= report["rounds"][0]["comparisons"] <= 12
    assert set(report["win_rates"]) == {"reward"}  # nobody knows the truth


def test_feedback_that_is_there(textgym: Any) -> None:
    rows = [{"prompt": "the film was", "chosen": f" good, {i}.", "rejected": f" bad, {i}."} for i in "abcdefgh"]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert textgym("pipeline", *SMALL, "--feedback", "mine.jsonl", "--algorithm", "ppo", "--out", "run") == 0
    assert json.loads(Path("run/report.json").read_text())["rounds"][0]["comparisons"] == 8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--algorithm", "dpo"], "'dpo' is not one of 'ppo', 'reinforce'"),
        (["--pairs", "0"], "--pairs must be at least 1, not 0"),
        (["--annotator-temperature", "-1"], "--annotator-temperature must be 0 or above"),
        (["--annotator", "nothing-like-it"], "--annotator 'nothing-like-it' is no reward. It takes"),
        (["--model", "somewhere"], "--prompts must be given with --model"),
        (["--resume", "nowhere"], "there is no run of textgym pipeline"),
        (["--resume", "nowhere", "--pairs", "3"], "only --rounds can be given with it, not --pairs"),
        (["--resume", "nowhere", "--set", "a=1"], "only --rounds can be given with it, not --set."),
        (["--resume", "nowhere", "--set-reward-model", "a=1"], "only --rounds can be given with it, not --set-reward-model."),
        (["--set", "nonsense=1"], "--set nonsense=...: RLOO has no such argument"),
        (["--set-reward-model", "nonsense=1"], "--set-reward-model nonsense=...: RewardModelTrainer has no such argument"),
    ],
)
def test_errors_are_one_sentence(textgym: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    small = [] if "--resume" in arguments else SMALL
    assert textgym("pipeline", *small, *arguments) == EXIT_USER_ERROR
    error = capsys.readouterr().err.strip()
    assert sentence in error and "\n" not in error


def test_a_folder_in_use_is_left_alone(textgym: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/mine.txt").write_text("mine")
    assert textgym("pipeline", *SMALL, "--out", "run") == EXIT_USER_ERROR
    assert "--out run exists and is not empty" in capsys.readouterr().err


def test_a_finished_run_says_so(textgym: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert textgym("pipeline", *SMALL, "--out", "run") == 0
    assert textgym("pipeline", "--resume", "run") == EXIT_USER_ERROR
    assert "its 1 round is done; to go on, give more --rounds" in capsys.readouterr().err


def test_what_it_offers_is_what_it_can_do(textgym: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(OnlineAlgorithm) == [one for one in Algorithm if not ALGORITHMS[one].offline]
    monkeypatch.setenv("COLUMNS", "80")
    assert textgym("pipeline", "--help") == 0
    shown = capsys.readouterr().out
    assert "dpo" not in shown and "kto" not in shown and "exit code 75" in " ".join(shown.split())


@pytest.fixture
def long_prompts(textgym: Any) -> str:
    """Twenty prompts, of which five are longer than what the bundled model can read."""
    rows = [{"prompt": "the film was" + " really good." * (200 if i % 4 == 0 else 1) + f" {i}"} for i in range(20)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "prompts.jsonl"


@pytest.mark.filterwarnings("ignore:.*unknown to the tokenizer")  # which is not what this is about
def test_prompts_that_are_too_long_are_refused_at_once_or_left_out_and_counted(
    textgym: Any, long_prompts: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command = ["pipeline", *SMALL, "--prompts", long_prompts, "--eval-prompts", long_prompts, "--out", "run"]
    assert textgym(*command) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "--eval-prompts: 5 of 20" in error and "--set-reward-model max_tokens=" in error
    command[-1] = "other"
    assert textgym(*command, "--set-reward-model", "max_tokens=60", "--rounds", "2") == 0
    shown = capsys.readouterr().out
    assert "Left out: 5 of 20 prompts, with their completions longer than max_tokens=60" in shown
    assert "Left out: 5 of 20 held-out prompts" in shown and "…" not in shown
    report = json.loads(Path("other/report.json").read_text())
    assert report["left_out_prompts"] == 5
    training = report["rounds"][1]["reward_model"]["training"]
    assert training["records"] + sum(training["left_out"].values()) + report["rounds"][1]["reward_model"].get("num_records", 0) <= 24


def test_comparisons_that_are_too_long_are_counted(textgym: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"the film was {i}", "chosen": " good." * (1 if i % 3 else 300), "rejected": " bad.", "id": i} for i in range(30)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert textgym("pipeline", *SMALL, "--feedback", "mine.jsonl", "--set-reward-model", "max_tokens=60", "--out", "run") == 0
    assert "of the comparisons trained on left out:" in capsys.readouterr().out
    worth = json.loads(Path("run/report.json").read_text())["rounds"][0]["reward_model"]
    left_out = worth["training"]["left_out"]["too_long"] + worth.get("left_out", {}).get("too_long", 0)
    assert left_out == 10 or worth["not_measured"].startswith("none of the")


def test_a_reward_that_reads_tokens_compares(textgym: Any) -> None:
    assert textgym("pipeline", *SMALL, "--annotator", "length", "--annotator-temperature", "0", "--out", "run") == 0
    pairs = [json.loads(line) for line in Path("run/round-1/comparisons.jsonl").read_text().splitlines()]
    assert all(len(one["chosen"].split()) + 1 >= len(one["rejected"].split()) for one in pairs)
