"""Every snippet of docs/feedback.md runs, in order, and prints what the comments after its `print`s say."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "feedback.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)


def test_snippets_print_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for snippet in SNIPPETS:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(snippet, str(PAGE), "exec"), namespace)
        assert output.getvalue().splitlines() == PRINTED.findall(snippet), snippet
        assert snippet.count("print(") == len(PRINTED.findall(snippet)) > 0


def test_every_public_name_is_on_the_page() -> None:
    import textgym.feedback

    page = PAGE.read_text(encoding="utf-8")
    internal = {"BadRow", "CommentJudge", "Feedback", "PairJudge", "TextJudge", "Record", "Segment", "record_to_row", "judge_texts"}
    assert [name for name in textgym.feedback.__all__ if name not in page and name not in internal] == []
