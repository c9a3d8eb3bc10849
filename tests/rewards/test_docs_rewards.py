"""Every snippet of docs/rewards.md runs, in order, and prints what the comment after its `print` says."""

import ast
import contextlib
import io
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$|^<!-- setup:\n(.*?)^-->$", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)


def snippets():
    return [shown or hidden for shown, hidden in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]


def test_snippets_print_what_they_say():
    namespace = {}
    for snippet in snippets():
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(snippet, str(PAGE), "exec"), namespace)
        assert output.getvalue().splitlines() == PRINTED.findall(snippet), snippet


def test_every_print_says_what_it_prints():
    for snippet in snippets():
        prints = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"]
        assert len(prints) == len(PRINTED.findall(snippet)), snippet


def test_every_public_name_is_on_the_page():
    import textgym.rewards

    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in textgym.rewards.__all__ if name not in page] == []
