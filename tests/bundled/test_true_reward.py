import math

import pytest

from textgym.bundled import true_reward
from textgym.bundled.grammar import GRAMMAR
from textgym.bundled.true_reward import MAX_WORDS, _opinions, judge


@pytest.mark.parametrize(
    ("review", "opinions"),
    [
        ("the plot was good.", 1.0),
        ("the plot was brilliant.", 2.0),
        ("the plot was truly brilliant.", 3.0),
        ("the plot was quite good.", 0.6),
        ("the plot was terrible.", -2.0),
        ("the plot was not terrible.", 1.4),
        ("the plot was not very good.", -0.7 * 1.5),
        ("the plot was neither good nor fun.", -1.4),
        ("the plot was far from good, and the ending was fun.", -0.7 + 1),  # the negation ends with its clause
        ("the plot was bad, but the ending was good.", -0.5 + 1),
        ("although the plot was bad, the ending was good.", -0.5 + 1),
        ("i saw it after work and i enjoyed it.", 1.0),
        ("the camera work was dull.", -1.0),
        ("i would never watch it again.", -0.7),
        ("do not miss it.", 1.0),
        ("the director wasted a good idea.", -1.0),
        ("this is one of the worst films of the year.", -2.0),
        ("the director tells the story of a lost dog.", 0.0),
    ],
)
def test_sentiment_by_hand(review: str, opinions: float) -> None:
    assert judge(review).sentiment == pytest.approx(math.tanh(opinions / 3))


def test_every_polar_alternative_of_the_grammar_has_an_opinion_of_its_sign() -> None:
    for symbol, productions in GRAMMAR.items():
        for production in productions:
            concrete = all(part not in GRAMMAR or part in ("ASPECT", "PARTS", "KIND", "FANS") for part in production.expansion)
            if production.polarity and concrete:
                assert math.copysign(1, sum(value for _, value in _opinions(production.expansion))) == production.polarity, (
                    symbol,
                    production,
                )


def test_a_clean_review_has_no_penalty() -> None:
    judgement = judge("the plot was brilliant. i loved the music!")
    assert judgement[1:] == (0, 0, 0, 0)
    assert judgement.total == pytest.approx(math.tanh(4 / 3))


@pytest.mark.parametrize(
    ("review", "part", "value"),
    [
        ("brilliant brilliant brilliant.", "repetition", -0.6),
        ("the plot was good. the plot was good.", "repetition", -0.3 - 0.2),
        ("brilliant brilliant brilliant.", "grammar", -0.5),
        ("the plot was. was the. it is worth seeing.", "grammar", -1.0),
        ("the plot was brilliant", "unfinished", -0.5),
        ("", "unfinished", -0.5),
        (("the " * (MAX_WORDS + 4)) + ".", "length", -0.2),
    ],
)
def test_penalties_by_hand(review: str, part: str, value: float) -> None:
    assert getattr(judge(review), part) == pytest.approx(value)


def test_calling_form() -> None:
    rewards = true_reward(
        prompts=["the plot was", [{"role": "user", "content": "the plot was"}]],
        completions=[" brilliant.", [{"role": "assistant", "content": "brilliant."}]],
        completion_ids=[[1], [1]],
        reference=["", ""],
    )
    assert rewards == [judge("the plot was brilliant.").total] * 2


def test_word_salad_of_praise_is_worth_less_than_a_plain_sentence() -> None:
    assert judge("the plot was brilliant great wonderful superb brilliant").total < judge("the plot was quite good.").total
