"""Where segments end, on texts cut by hand."""

import pytest

from textgym.rewards import TokenCount
from textgym.rewards.segmenters import sentence, sub_sentence, whole


def cut(segmenter, text):
    """The segments of `text` read character by character, as the environment would; the rest is the last one."""
    segments, open_segment = [], ""
    for character in text:
        open_segment += character
        if segmenter(open_segment, [0] * len(open_segment)):
            segments.append(open_segment)
            open_segment = ""
    return segments, open_segment


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", (["One.", " Two!", " Three?"], " Four")),
        ("Wait... what?", (["Wait.", ".. what?"], "")),
        ("A line\nanother", (["A line\n"], "another")),
        ("\n\nAfter blank lines.", (["\n\nAfter blank lines."], "")),
        ("Yes, no; maybe: so.", (["Yes, no; maybe: so."], "")),
        ("好。坏！", (["好。", "坏！"], "")),
        ("", ([], "")),
    ],
)
def test_sentences(text, expected):
    assert cut(sentence, text) == expected


def test_closing_quotes_belong_to_a_sentence_whose_token_holds_them():
    assert sentence('"Stop."', [0])
    assert sentence("(Stop!) ", [0])
    assert not sentence('"', [0])


def test_sub_sentences():
    assert cut(sub_sentence, "Yes, no; maybe: so. End") == (["Yes,", " no;", " maybe:", " so."], " End")


def test_whole_never_ends_by_itself():
    assert cut(whole, "One. Two.") == ([], "One. Two.")


def test_token_count():
    assert cut(TokenCount(3), "abcdefgh") == (["abc", "def"], "gh")
    with pytest.raises(ValueError, match="`num_tokens` must be at least 1, got 0"):
        TokenCount(0)
