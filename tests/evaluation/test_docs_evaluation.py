"""Every snippet of docs/evaluation.md runs, in order, and prints what the comment after its `print` says."""


def test_every_print_says_what_it_prints(docs_page):
    page = docs_page("evaluation.md")
    for snippet in page.snippets:
        assert snippet.count("print(") == len(page.printed(snippet)), snippet


def test_every_public_name_is_on_the_page(docs_page):
    import textgym.evaluation

    page = docs_page("evaluation.md").text
    assert [name for name in textgym.evaluation.__all__ if name not in page] == []
