"""Every snippet of docs/feedback.md runs, in order, and prints what the comments after its `print`s say."""

from typing import Any


def test_every_snippet_says_what_each_print_prints(docs_page: Any) -> None:
    page = docs_page("feedback.md")
    for snippet in page.snippets:
        assert snippet.count("print(") == len(page.printed(snippet)) > 0, snippet


def test_every_public_name_is_on_the_page(docs_page: Any) -> None:
    import textgym.feedback

    page = docs_page("feedback.md").text
    internal = {"BadRow", "CommentJudge", "Feedback", "PairJudge", "TextJudge", "Record", "Segment", "record_to_row", "judge_texts"}
    assert [name for name in textgym.feedback.__all__ if name not in page and name not in internal] == []
