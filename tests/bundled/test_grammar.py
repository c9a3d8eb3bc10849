import random

import pytest

from textgym.bundled.grammar import GRAMMAR, is_sentence, sample_review, split_words, to_text, vocabulary
from textgym.bundled.true_reward import judge


def sentences(review: list[str]) -> list[tuple[str, ...]]:
    found, current = [], []
    for word in review:
        if word in ".!":
            found.append(tuple(current))
            current = []
        else:
            current.append(word)
    assert not current, "a review ends with a stop"
    return found


def test_every_sampled_sentence_is_recognised_and_uses_known_words() -> None:
    rng, known = random.Random(0), set(vocabulary())
    for _ in range(500):
        review = sample_review(rng)
        assert set(review) <= known
        assert all(is_sentence(sentence) for sentence in sentences(review))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "brilliant",
        "the plot was",
        "plot the was dull",
        "the plot was brilliant brilliant",
        "the actors was good",
        "i loved the plot the plot",
        "although the plot was dull",
        "the plot was an good",
    ],
)
def test_what_the_grammar_cannot_produce_is_no_sentence(text: str) -> None:
    assert not is_sentence(tuple(text.split()))


@pytest.mark.parametrize(
    "text",
    [
        "the plot was brilliant",
        "although the jokes were silly , i loved the plot",
        "it is worth seeing",
        "i saw this movie at home and i hated it",
    ],
)
def test_sentences(text: str) -> None:
    assert is_sentence(tuple(text.split()))


def test_the_grammar_is_finite() -> None:
    def visit(symbol: str, path: tuple[str, ...]) -> None:
        assert symbol not in path, f"{symbol} reaches itself"
        for production in GRAMMAR[symbol]:
            for part in production.expansion:
                if part.lstrip("~") in GRAMMAR:
                    visit(part.lstrip("~"), (*path, symbol))

    visit("REVIEW", ())


def test_mood_moves_opinions() -> None:
    rng = random.Random(0)
    happy, sad = ([judge(to_text(sample_review(rng, mood=mood))).sentiment for _ in range(300)] for mood in (1.0, 0.0))
    assert sum(happy) / 300 > 0.4
    assert sum(sad) / 300 < -0.4


def test_text_and_words_are_inverse() -> None:
    rng = random.Random(0)
    for _ in range(100):
        review = sample_review(rng)
        assert split_words(to_text(review)) == review
    assert to_text(["well", ",", "the", "end", "!"]) == "well, the end!"


def test_sampling_is_seeded() -> None:
    assert [sample_review(random.Random(7)) for _ in range(2)] == [sample_review(random.Random(7))] * 2
