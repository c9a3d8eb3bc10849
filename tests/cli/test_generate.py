import io
import json
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def on_cpu_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_bundled_prompts_without_options(textgym, capsys) -> None:
    from textgym.bundled import bundled_prompts

    assert textgym("generate", "--device", "cpu") == 0
    prompts = [row["prompt"] for row in bundled_prompts("eval")[:5]]
    assert [line.startswith(prompt) for line, prompt in zip(lines(capsys), prompts, strict=True)] == [True] * 5


def test_json_lines_are_prompt_major_and_complete(textgym, capsys) -> None:
    assert textgym("generate", "the plot was", "i loved", "--num-generations", "3", "--json", "--seed", "1", "--device", "cpu") == 0
    rows = [json.loads(line) for line in lines(capsys)]
    assert [row["prompt"] for row in rows] == ["the plot was"] * 3 + ["i loved"] * 3
    assert all(set(row) == {"prompt", "completion", "completion_ids", "log_prob", "finish_reason"} for row in rows)
    assert all(row["log_prob"] < 0 and row["finish_reason"] in ("eos", "length") for row in rows)


def test_seed_and_temperature(textgym, capsys) -> None:
    def texts(*options: str) -> list[str]:
        assert textgym("generate", "the film", "--num-generations", "4", "--device", "cpu", *options) == 0
        return lines(capsys)

    assert texts("--seed", "5") == texts("--seed", "5") != texts("--seed", "6")
    assert texts() != texts()
    greedy = texts("--temperature", "0")
    assert len(set(greedy)) == 1 and greedy == texts("--top-k", "1")


def test_batches_go_on_drawing(textgym, capsys) -> None:
    """More prompts than one batch holds: the second batch does not repeat the first one's draws."""
    Path("p.jsonl").write_text('{"prompt": "the film was"}\n' * 128)
    assert textgym("generate", "--prompts", "p.jsonl", "--seed", "0", "--device", "cpu") == 0
    found = lines(capsys)
    assert len(found) == 128 and found[:64] != found[64:]


def test_prompts_from_standard_input(textgym, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the hero was\n\nthe ending was\n"))
    assert textgym("generate", "-", "--device", "cpu") == 0
    assert [line.split()[1] for line in lines(capsys)] == ["hero", "ending"]


def test_max_new_tokens(textgym, capsys) -> None:
    assert textgym("generate", "the film was", "--max-new-tokens", "2", "--json", "--num-generations", "20", "--device", "cpu") == 0
    assert {len(json.loads(line)["completion_ids"]) for line in lines(capsys)} == {2}


def test_the_precision_is_said_and_taken(textgym, capsys) -> None:
    assert textgym("generate", "the plot", "--device", "cpu", "--dtype", "bfloat16", "--autocast", "none") == 0
    assert "(0.2 M parameters, bfloat16, on cpu)" in capsys.readouterr().err
    assert textgym("generate", "the plot", "--device", "cpu", "--autocast", "bfloat16") == 0
    assert "(0.2 M parameters, float32, computed in bfloat16, on cpu)" in capsys.readouterr().err
