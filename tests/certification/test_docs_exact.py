"""The snippets of docs/exact.md run as they stand."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs/exact.md").read_text(encoding="utf-8")


def test_the_snippets_run_one_after_the_other(capsys) -> None:
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(snippet, names)
    assert "GradientComparison(" in capsys.readouterr().out
