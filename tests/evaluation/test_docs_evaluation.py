"""Every snippet of docs/evaluation.md runs, in order, and prints what the comment after its `print` says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)


@pytest.mark.slow
def test_snippets_print_what_they_say():
    namespace = {}
    for snippet in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(snippet, str(PAGE), "exec"), namespace)
        assert output.getvalue().splitlines() == PRINTED.findall(snippet), snippet
        assert snippet.count("print(") == len(PRINTED.findall(snippet)), snippet


def test_every_public_name_is_on_the_page():
    import textgym.evaluation

    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in textgym.evaluation.__all__ if name not in page] == []
