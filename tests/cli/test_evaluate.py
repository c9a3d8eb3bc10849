import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from textgym.bundled import bundled_prompts


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def report(folder: str = "report") -> dict:
    return json.loads(Path(folder, "report.json").read_text())


def samples(folder: str = "report") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def test_the_bundled_model_against_the_texts_of_its_prompts(textgym, capsys) -> None:
    assert textgym("evaluate", "--device", "cpu", "--out", "report") == 0
    printed = capsys.readouterr().out
    assert "bundled against reference by true reward: " in printed and "tokens per completion" in printed
    document = report()
    assert [side["name"] for side in document["sides"]] == ["bundled", "reference"]
    assert document["compared"]["column"] == "reference" and document["over_optimisation"] is None
    rows = samples()
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in bundled_prompts("eval")]
    assert [row["reference"]["completion"] for row in rows] == [row["reference"] for row in bundled_prompts("eval")]
    wins = sum(row["bundled"]["true_reward"] > row["reference"]["true_reward"] for row in rows)
    assert document["win_rates"]["true_reward"]["wins"] == wins
    assert Path("report/report.md").read_text().splitlines()[0].split() == ["|", "|", "bundled", "|", "reference", "|"]


def test_a_run_is_compared_with_its_start_under_its_own_settings(textgym, run, capsys) -> None:
    assert textgym("evaluate", "--model", "run", "--device", "cpu", "--out", "report", "--num-generations", "2") == 0
    assert "is the reward being hacked?" in Path("report/report.md").read_text()
    assert "Verdict: " in capsys.readouterr().out
    document = report()
    assert [side["name"] for side in document["sides"]] == ["run", "the start of the run"]
    assert document["settings"]["max_new_tokens"] == 8  # the run's
    assert document["compared"]["reference"] == document["compared"]["against"]
    assert document["sides"][1]["kl_per_sequence"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert document["sides"][0]["kl_per_sequence"]["mean"] != 0.0
    assert set(document["win_rates"]) == {"reward", "true_reward"}
    assert document["over_optimisation"]["verdict"] in ("hacked", "suspicious", "improved", "not optimised")
    assert len(samples()) == 100


def test_best_of_n_beats_the_model(textgym) -> None:
    assert textgym("evaluate", "--best-of", "6", "--max-new-tokens", "12", "--device", "cpu", "--out", "report", "--seed", "3") == 0
    document = report()
    best, plain = document["sides"]
    assert (best["name"], plain["name"]) == ("best of 6 of bundled", "bundled")
    assert best["kl_is_bound"] and best["kl_per_sequence"]["mean"] == pytest.approx(0.9584, abs=1e-3)  # log 6 − 5/6
    assert (best["reward_queries"], plain["reward_queries"]) == (300, 0)
    assert document["win_rates"]["reward"]["low"] > 0.5


def test_a_judge_and_texts_of_the_users_own(textgym, save_model) -> None:
    save_model("mine", 0)
    Path("length_judge.py").write_text("def longer(prompt, first, second): return 'first' if len(first) > len(second) else 'second'\n")
    rows = [{"prompt": "abc", "answer": "x" * 200}, {"prompt": "d", "answer": "y"}]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--prompts", "mine.jsonl", "--references", "answer", "--judge", "length_judge.py:longer", "--reference", "mine"]
    assert textgym("evaluate", "--model", "mine", *options, "--device", "cpu", "--out", "report", "--num-generations", "5") == 0
    document = report()
    judged = document["win_rates"]["judge"]
    assert judged["losses"] >= 5 and judged["wins"] + judged["losses"] + judged["ties"] == 10
    assert document["sides"][0]["rewards"] == {} and set(document["win_rates"]) == {"judge"}
    assert document["sides"][1]["perplexity"]["tokens"] == 203  # with EOS


def test_two_models(textgym, save_model) -> None:
    save_model("one", 0)
    save_model("other", 1)
    Path("p.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "c"}\n')
    long = "def long(completions): return [len(c) for c in completions]\n"
    Path("two_lengths.py").write_text(long + long.replace("long", "short").replace("[len", "[-len"))
    rewards = ["--reward", "two_lengths:long", "--reward-weight", "2", "--true-reward", "two_lengths:short"]
    options = ["--prompts", "p.jsonl", *rewards, "--device", "cpu"]
    assert textgym("evaluate", "--model", "one", "--against", "other", *options, "--out", "report") == 0
    assert {row["one"]["reward"] + 2 * row["one"]["true_reward"] for row in samples()} == {0.0}
    first = Path("report/samples.jsonl").read_text()
    assert textgym("evaluate", "--model", "one", "--against", "other", *options, "--out", "report", "--force") == 0
    assert Path("report/samples.jsonl").read_text() == first
    assert textgym("evaluate", "--model", "one", "--against", "one", *options, "--out", "same") == 0
    assert [side["name"] for side in report("same")["sides"]] == ["one (A)", "one (B)"]
    assert report("same")["win_rates"]["reward"]["ties"] == 2


def test_a_reward_that_fails_is_named_with_its_place(textgym, capsys) -> None:
    Path("divides_by_zero.py").write_text("def reward(completions):\n    return [1 / 0 for _ in completions]\n")
    assert textgym("evaluate", "--reward", "divides_by_zero:reward", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert error.startswith("textgym: ZeroDivisionError: division by zero (raised by reward `reward`")
    assert "divides_by_zero.py, line 2" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("command", "said"), [("evaluate", "bootstrap intervals over prompts"), ("plot", "over √KL")])
def test_help_loads_no_torch(command: str, said: str) -> None:
    code = f"import sys\nfrom textgym.cli.main import main\ntry: main(['{command}', '--help'])\nfinally: assert 'torch' not in sys.modules"
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert said in " ".join(done.stdout.split())
