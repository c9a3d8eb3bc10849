"""Every snippet of docs/rlhf.md runs, in order, and prints what the comment after its `print` says."""

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_snippets_print_what_they_say(docs_page: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    docs_page("rlhf.md").run()
    assert Path("runs/mine/round-2/round.json").exists()
