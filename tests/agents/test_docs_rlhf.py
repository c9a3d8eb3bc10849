"""Every snippet of docs/rlhf.md runs, in order, and prints what the comment after its `print` says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "rlhf.md"
PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)


@pytest.mark.slow
def test_snippets_print_what_they_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    snippets = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert snippets
    for snippet in snippets:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(snippet, str(PAGE), "exec"), namespace)
        assert output.getvalue().splitlines() == PRINTED.findall(snippet), snippet
    assert Path("runs/mine/round-2/round.json").exists()
