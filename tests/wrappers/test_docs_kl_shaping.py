"""Every snippet of docs/kl_shaping.md runs and prints what it says, and its table has the keys that there are."""

import contextlib
import io
import re
from pathlib import Path

from textgym.wrappers.shaping import EPISODE_KEYS, STEP_KEYS

PAGE = Path(__file__).parents[2] / "docs" / "kl_shaping.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$|^<!-- setup:\n(.*?)^-->$", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)


def test_snippets_print_what_they_say() -> None:
    namespace: dict[str, object] = {}
    for shown, hidden in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(shown or hidden, str(PAGE), "exec"), namespace)
        assert output.getvalue().splitlines() == PRINTED.findall(shown or hidden)


def test_the_table_has_every_key() -> None:
    keys = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(keys) == sorted([*STEP_KEYS, *EPISODE_KEYS, "kl_full_per_sequence"])
