"""Where segments end, on texts cut by hand."""

import pytest

from textgym.rewards import Sentences, TokenCount
from textgym.rewards.segmenters import ENGLISH_ABBREVIATIONS, sentence, sub_sentence, whole


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


@pytest.mark.parametrize(
    ("sentences", "sub_sentences"),
    [
        (["你好。", "你好，是吗？"], ["你好。", "你好，", "是吗？"]),  # Chinese
        (["ｱｱ｡", "ｲｲ､ｳｳ｡"], ["ｱｱ｡", "ｲｲ､", "ｳｳ｡"]),  # Japanese, half-width
        (["كيف حالك؟", " بخير، شكرا."], ["كيف حالك؟", " بخير،", " شكرا."]),  # Arabic
        (["یہ ہے۔", " وہ ہے۔"], ["یہ ہے۔", " وہ ہے۔"]),  # Urdu
        (["यह है।", " वह है॥"], ["यह है।", " वह है॥"]),  # Hindi
        (["Այո։", " Ոչ։"], ["Այո։", " Ոչ։"]),  # Armenian
        (["ሰላም።", " ደህና፣ ነው።"], ["ሰላም።", " ደህና፣", " ነው።"]),  # Amharic
        (["ဟုတ်၊ ကဲ့။"], ["ဟုတ်၊", " ကဲ့။"]),  # Burmese
        (["បាទ។", " បាទ៕"], ["បាទ។", " បាទ៕"]),  # Khmer
        (["Τι\u037e", " Καλά."], ["Τι\u037e", " Καλά."]),  # Greek
        (["¿Qué?", " ¡Sí, sí!"], ["¿Qué?", " ¡Sí,", " sí!"]),  # Spanish
    ],
)
def test_other_scripts(sentences, sub_sentences):
    assert cut(sentence, "".join(sentences)) == (sentences, "")
    assert cut(sub_sentence, "".join(sub_sentences)) == (sub_sentences, "")


def test_abbreviations_and_numbers():
    plain = Sentences()
    assert cut(plain, "Dr. Who paid 3.14. Yes.") == (["Dr.", " Who paid 3.", "14.", " Yes."], "")
    careful = Sentences(abbreviations=ENGLISH_ABBREVIATIONS, numbers=False)
    assert cut(careful, "Dr. Who paid 3.14. Yes.") == (["Dr. Who paid 3.14. Yes."], "")
    assert cut(careful, "He saw e.g. Mars. In 1999. He left!") == (["He saw e.g. Mars.", " In 1999. He left!"], "")
    assert cut(Sentences(abbreviations=("Dr",)), "A MDr. B") == (["A MDr."], " B"), "only whole words are abbreviations"
    assert cut(Sentences(marks="|", numbers=False), "a. b| c") == (["a. b|"], " c")
    with pytest.raises(ValueError, match="`marks` must hold at least one character"):
        Sentences(marks="")


def test_whole_never_ends_by_itself():
    assert cut(whole, "One. Two.") == ([], "One. Two.")


def test_token_count():
    assert cut(TokenCount(3), "abcdefgh") == (["abc", "def"], "gh")
    with pytest.raises(ValueError, match="`num_tokens` must be at least 1, got 0"):
        TokenCount(0)
