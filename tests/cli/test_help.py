"""`--help` of every command at 80 columns: nothing is cut, everything has its panel; `-h`, `--version`, `--set help`."""

import re

import pytest

from textgym.cli.algorithms import ALGORITHMS, SFT, Algorithm
from textgym.cli.main import app

COMMANDS = [(one.callback.__name__ if one.name is None else one.name) for one in app.registered_commands]  # type: ignore[union-attr]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns without colours."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    for name, value in {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_nothing_is_cut_at_80_columns(textgym, terminal, capsys, command: list[str]) -> None:
    assert textgym(*command, "--help") == 0
    long = capsys.readouterr().out
    assert "…" not in long and max(map(len, long.splitlines())) <= 80
    assert textgym(*command, "-h") == 0
    assert capsys.readouterr().out == long


def test_every_name_stands_in_one_piece(textgym, terminal, capsys) -> None:
    from textgym.rewards.named import reward_names

    textgym("train", "--help")
    words = re.split(r"[\s│,()]+", capsys.readouterr().out)
    assert set(Algorithm) <= {word.strip(".") for word in words}
    assert set(reward_names()) <= set(words)


@pytest.mark.parametrize("command", ["train", "sft", "evaluate", "generate", "bench"])
def test_options_stand_in_panels(textgym, terminal, capsys, command: str) -> None:
    textgym(command, "--help")
    said = capsys.readouterr().out
    general = re.search(r"╭─ Options ─.*?╰", said, flags=re.DOTALL)
    assert general and set(re.findall(r"--[\w-]+", general.group())) == {"--help"}
    for panel in ("Model", "Sampling", "Run"):
        assert f"╭─ {panel} ─" in said


def test_the_version_is_said(textgym, capsys) -> None:
    from importlib.metadata import version

    assert textgym("--version") == 0
    assert capsys.readouterr().out == f"textgym {version('textgym')}\n"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_set_can_name_is_listed_and_can_be_given(textgym, terminal, capsys, algorithm: str) -> None:
    from textgym.cli.algorithms import agent_class
    from textgym.cli.arguments import RESERVED, check_options, described_arguments

    command = ["sft"] if algorithm == SFT else ["train", algorithm]
    assert textgym(*command, "--set", "help") == 0
    said = capsys.readouterr().out
    kind = agent_class(algorithm)
    names = re.findall(r"│\s*(\w+)=", said)
    assert {"micro_batch_size", "max_grad_norm"} <= set(names) and ("clip_range_vf" in names) == (algorithm in ("ppo", "nlpo"))
    assert not set(names) & set(RESERVED)
    for name in names:
        check_options({name: 1}, kind, RESERVED)
        assert described_arguments(kind).get(name), name
