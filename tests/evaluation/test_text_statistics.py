import numpy as np
import pytest

from textgym.evaluation import distinct_n, repetition, text_statistics
from textgym.evaluation.tables import markdown_table


def test_distinct_n_by_hand():
    texts = ["a b a b", "a b c"]
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 3 / 7  # ab, ba, bc over the words
    assert distinct_n(texts, 4) == 1 / 7
    assert distinct_n([""], 1) == 0.0


def test_distinct_n_joins_no_words_of_different_texts():
    assert distinct_n(["a b", "c d"], 2) == 2 / 4


def test_repetition_is_what_the_penalty_charges():
    from textgym.rewards import RepetitionPenalty

    texts = ["so so so so so", "one two three four", "a b"]
    assert repetition(texts, 2) == [0.75, 0.0, 0.0]
    assert repetition(texts) == [-penalty for penalty in RepetitionPenalty(3, -1.0)(completions=texts)]


def test_statistics_of_texts():
    statistics = text_statistics(["The the", "a b c"], [[5, 5, 1], [3, 4, 5, 6]], eos_token_ids=(1, 2))
    assert (statistics.count, statistics.words, statistics.tokens, statistics.ended) == (2, 2.5, 3.5, 0.5)
    assert statistics.distinct_1 == 4 / 5  # "The" and "the" are one word
    assert text_statistics(["a"]).tokens is None and text_statistics(["a"], [[1]]).ended is None


def test_conversations_are_read_as_their_contents():
    texts = ["a b c", "d"]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert text_statistics(messages) == text_statistics(texts)


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="at least one text"):
        text_statistics([])
    with pytest.raises(ValueError, match="one list per text"):
        text_statistics(["a"], [[1], [2]])
    with pytest.raises(ValueError, match="`n`"):
        distinct_n(["a"], 0)


def test_tables_line_up():
    table = markdown_table(["", "A"], [["reward", "1.5"], ["a|b", "10"]])
    assert table.splitlines() == ["|        |   A |", "|--------|----:|", "| reward | 1.5 |", "| a\\|b   |  10 |"]
    assert np.unique([len(line) for line in table.splitlines()]).size == 1
