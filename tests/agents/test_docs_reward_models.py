"""Every snippet of docs/reward_models.md runs, in order, and prints what the comments after its `print`s say."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "reward_models.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)


@pytest.mark.slow
def test_snippets_print_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for snippet in SNIPPETS:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(snippet, str(PAGE), "exec"), namespace)
        assert output.getvalue().splitlines() == PRINTED.findall(snippet), snippet
        assert snippet.count("print(") == len(PRINTED.findall(snippet)) > 0


def test_every_logged_key_is_on_the_page() -> None:
    from textgym.agents.reward_model_trainer import RewardModelTrainer

    trainer = object.__new__(RewardModelTrainer)
    trainer.center_coef = 1.0
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in ["train/loss", *trainer._metric_names()] if f"`{name}`" not in page] == []
