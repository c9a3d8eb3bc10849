"""Every snippet of docs/policy.md runs and prints what it says, and its table has the arguments that there are."""

import contextlib
import inspect
import io
import re
from pathlib import Path

from textgym.agents import CausalLMPolicy

PAGE = Path(__file__).parents[2] / "docs" / "policy.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^\s*print\(.*\)\s+# (.*)$", re.MULTILINE)


def test_snippets_print_what_they_say():
    namespace = {}
    for block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block, str(PAGE), "exec"), namespace)
        assert output.getvalue().splitlines() == PRINTED.findall(block)


def test_the_table_has_every_argument():
    table = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    assert named == set(inspect.signature(CausalLMPolicy.generate).parameters) - {"self"}
