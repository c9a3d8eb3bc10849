"""`score_texts`: a reward on texts, outside of any environment."""

from typing import Any

import pytest

from textgym.rewards import RewardSet, token_level
from textgym.rewards.texts import score_texts


def length(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(str(text))) for text in completions]


def test_functions_sets_and_bundled_rewards() -> None:
    assert score_texts(length, ["x", "y"], ["a", "bbb"]).tolist() == [1, 3]
    both = RewardSet.build([length, lambda prompts, bonus: bonus], [2.0, 1.0])
    assert score_texts(both, ["x", "y"], ["a", "bbb"], bonus=[10, 20]).tolist() == [12, 26]
    good, bad = score_texts("film-review-true", ["the film was"] * 2, [" great.", " awful."])
    assert good > bad


def test_conversations_keep_their_form() -> None:
    seen = []

    def reward(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.append((prompts, completions))
        return [0.0] * len(prompts)

    chat, answer = [{"role": "user", "content": "x"}], [{"role": "assistant", "content": "a"}]
    score_texts(reward, [chat, "y"], [answer, "b"])
    assert seen == [([chat, "y"], [answer, "b"])]


def test_ids_that_are_not_there_are_not_made_up() -> None:
    def tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    def first(completion_ids: list[list[int]]) -> list[float]:
        return [float(len(completion_ids[0]))]

    for reward in (tokens, first):
        with pytest.raises(ValueError, match="reads `completion_ids`"):
            score_texts(reward, ["x"], ["a"])
    assert score_texts(tokens, ["x"], ["a"], [[1, 2]]).tolist() == [2]


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="whole completions, got one of tokens"):
        score_texts(token_level(lambda completion_ids: [[0.0]]), ["x"], ["a"])
    with pytest.raises(ValueError, match="one prompt per completion: 2 completions, 1 prompts"):
        score_texts(length, ["x"], ["a", "b"])
    with pytest.raises(ValueError, match="one list per completion: 1 completions, 2 lists"):
        score_texts(length, ["x"], ["a"], [[1], [2]])
    with pytest.raises(ValueError, match="column 'bonus' must hold one value"):
        score_texts(length, ["x"], ["a"], bonus=[1, 2])
