import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from textgym.agents import CausalLMPolicy
from textgym.bundled import bundled_model_path
from textgym.cli import benching
from textgym.cli.bars import bar
from textgym.cli.bench import BenchSettings

SMALL = ["--batch-size", "8", "--prompt-tokens", "5", "--max-new-tokens", "4", "--repeats", "1", "--device", "cpu"]
SETTINGS = BenchSettings(device="cpu", batch_size=8, prompt_tokens=5, max_new_tokens=4, repeats=1)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def policy() -> CausalLMPolicy:
    return CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu")


def test_the_bundled_model(textgym, capsys) -> None:
    assert textgym("bench", *SMALL, "--out", "bench.json") == 0
    printed = capsys.readouterr().out
    assert "0.2 M parameters on cpu" in printed and "completions/s, RLOO iteration" in printed
    document = json.loads(Path("bench.json").read_text())
    assert list(document["tokens_per_second"]) == ["textgym", *benching.GENERATE] and document["failed"] == {}
    assert min(document["tokens_per_second"].values()) > 0 and set(document["completions_per_second"]) == {"PPO", "RLOO"}
    rates = dict(document["tokens_per_second"])
    assert document["ratio"] == pytest.approx(rates.pop("textgym") / max(rates.values()))
    assert f"{document['ratio']:.2f}" in printed and f"{document['environment_share']:.1%}" in printed
    assert 0 < document["environment_share"] < 1 and document["peak_memory"] > 1e7
    assert document["setting"]["batch_size"] == 8 and document["setting"]["model"] == "bundled"


def test_a_run_folder_and_a_model_of_the_users_own(textgym, run, save_model, capsys) -> None:
    assert textgym("bench", *SMALL, "--model", "run") == 0
    assert "0.2 M parameters" in capsys.readouterr().out
    save_model("mine", 0)
    assert textgym("bench", *SMALL, "--model", "mine") == 0
    assert "0.0 M parameters" in capsys.readouterr().out


def test_everybody_samples_full_length_and_whole_batches_are_learned_from(policy, monkeypatch) -> None:
    amounts: list[float] = []
    monkeypatch.setattr(benching, "per_second", lambda work, device: lambda: amounts.append(work()) or 1.0)
    seen: list[None] = []
    figures = benching.measure(policy, SETTINGS, lambda: seen.append(None))
    assert amounts == 2 * [8 * 4] * 3 + 2 * [8] * 3
    assert len(seen) == benching.measurements(1) == 12
    assert figures.environment_share == 1.0  # a batch per second both ways


def test_the_prompts_have_the_length_that_was_asked_for(policy, monkeypatch) -> None:
    shapes = []
    original = CausalLMPolicy.generate_ids

    def noting(self, ids, lengths, *arguments, **named):
        shapes.append((tuple(ids.shape), set(lengths.tolist())))
        return original(self, ids, lengths, *arguments, **named)

    monkeypatch.setattr(CausalLMPolicy, "generate_ids", noting)
    benching.measure(policy, SETTINGS, lambda: None)
    assert {lengths == {5} for _, lengths in shapes} == {True}
    assert {shape for shape, _ in shapes} == {(8, 5), (2, 5)}  # RLOO has two prompts of four completions


def test_the_model_stays_what_it_is(policy) -> None:
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    benching.measure(policy, SETTINGS, lambda: None)
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_cache_that_does_not_serve_the_model_is_left_out(textgym, capsys, monkeypatch) -> None:
    monkeypatch.setattr(benching, "GENERATE", {"no such cache": "nonsense"})
    assert textgym("bench", *SMALL, "--out", "bench.json") == 0
    assert "no such cache could not be measured: " in capsys.readouterr().out
    document = json.loads(Path("bench.json").read_text())
    assert list(document["tokens_per_second"]) == ["textgym"] and document["ratio"] is None
    assert "nonsense" in document["failed"]["no such cache"]


def test_the_package_itself_must_work(policy, monkeypatch) -> None:
    def broken(self, *arguments, **named):
        raise RuntimeError("broken")

    monkeypatch.setattr(CausalLMPolicy, "generate_ids", broken)
    with pytest.raises(RuntimeError, match="broken"):
        benching.measure(policy, SETTINGS, lambda: None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch-size", "6"], "--batch-size must be a multiple of 4, not 6: RLOO samples so many of each prompt."),
        (["--prompt-tokens", "0"], "--prompt-tokens must be at least 1, not 0."),
        (["--repeats", "0"], "--repeats must be at least 1, not 0."),
        (["--max-new-tokens", "5000"], "--prompt-tokens and --max-new-tokens make 5005 tokens together, but the model has "),
        (["--out", "nowhere/bench.json"], "--out nowhere/bench.json: there is no folder nowhere."),
        (["--device", "nonsense"], "--device nonsense cannot be used here: "),
    ],
)
def test_mistakes_end_in_one_sentence(textgym, capsys, options, said) -> None:
    assert textgym("bench", *SMALL, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"textgym: {said}") and error.count("\n") == 1


def test_help_loads_no_torch() -> None:
    code = "import sys\nfrom textgym.cli.main import main\ntry: main(['bench', '--help'])\nfinally: assert 'torch' not in sys.modules"
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert "takes turns with transformers' generate" in " ".join(done.stdout.split())


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_for_terminals(terminal: bool) -> None:
    written = io.StringIO()
    with bar(Console(file=written, force_terminal=terminal, width=80), "Measuring", 2) as advance:
        advance(1)
    assert ("Measuring" in written.getvalue()) is terminal
