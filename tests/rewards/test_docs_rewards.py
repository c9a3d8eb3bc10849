"""Every snippet of docs/rewards.md runs, in order, and prints what the comment after its `print` says."""

import ast


def test_every_print_says_what_it_prints(docs_page):
    page = docs_page("rewards.md")
    for snippet in page.snippets:
        prints = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"]
        assert len(prints) == len(page.printed(snippet)), snippet


def test_every_public_name_is_on_the_page(docs_page):
    import textgym.rewards

    page = docs_page("rewards.md").text
    assert [name for name in textgym.rewards.__all__ if name not in page] == []
