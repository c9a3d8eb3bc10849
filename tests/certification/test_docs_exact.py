"""The snippets of docs/exact.md run as they stand."""

from typing import Any


def test_the_snippets_run_one_after_the_other(docs_page: Any, capsys) -> None:
    names: dict[str, object] = {}
    for snippet in docs_page("exact.md").snippets:
        exec(snippet, names)
    assert "GradientComparison(" in capsys.readouterr().out
