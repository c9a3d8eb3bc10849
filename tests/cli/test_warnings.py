"""What a run is warned of is one line on stderr, once, and stands in its folder; a resumed run does not say it again."""

import warnings
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def shown_as_for_a_user() -> None:
    warnings.simplefilter("default")


def test_a_constant_reward_is_told_once_in_one_line(textgym, small, capsys: pytest.CaptureFixture[str]) -> None:
    Path("dull.py").write_text("def reward(completions):\n    return [1.0] * len(completions)\n")
    assert textgym("train", "reinforce", *small, "--reward", "dull:reward", "--out", "run") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == 1
    assert told[0].startswith("textgym: warning: Every completion got the same reward, 1 (`rollout/reward_std` is 0)")
    assert Path("run/warnings.txt").read_text() == told[0].removeprefix("textgym: warning: ") + "\n"

    assert textgym("train", "reinforce", "--resume", "run", "--total-timesteps", "700") == 0
    assert "warning" not in capsys.readouterr().err
    assert len(Path("run/warnings.txt").read_text().splitlines()) == 1


def test_a_run_that_is_well_has_no_file_of_warnings(run: Path) -> None:
    assert (run / "progress.csv").exists() and not (run / "warnings.txt").exists()
