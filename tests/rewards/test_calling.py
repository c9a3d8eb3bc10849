"""What a reward function is given, and which results of it are refused."""

import functools
import math

import numpy as np
import pytest
import torch

from textgym.errors import RewardError
from textgym.rewards import RewardSet
from textgym.rewards.calling import function_name, unique_names


def terminal(function, batch):
    return RewardSet.build(function).terminal(batch)[0]


def test_a_function_gets_what_it_names(make_batch):
    seen = {}

    def narrow(completion_ids, answer, unknown_with_default=7):
        seen.update(completion_ids=completion_ids, answer=answer, unknown=unknown_with_default)
        return [0.0] * len(answer)

    terminal(narrow, make_batch("a", "b", answer=[1, 2], other=["x", "y"]))
    assert seen == {"completion_ids": [[97, 1], [98, 1]], "answer": [1, 2], "unknown": 7}


def test_a_function_with_kwargs_gets_everything_as_in_trl(make_batch):
    seen = {}

    def wide(prompts, completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(completions)

    rewards = RewardSet.build(wide)
    state = object()
    rewards.trainer_state = state
    rewards.terminal(make_batch("a", answer=[1]))
    assert set(seen) == {"completion_ids", "answer", "trainer_state", "log_extra", "log_metric"}
    assert seen["trainer_state"] is state


def test_texts_are_decoded_once_and_only_when_asked_for(make_batch):
    decoded = []

    def ids_only(completion_ids):
        return [0.0] * len(completion_ids)

    def by_text(completions):
        return [0.0] * len(completions)

    batch = make_batch("a", "b")
    decode = batch.decode
    batch.decode = lambda prompts, rows: decoded.append(len(rows)) or decode(prompts, rows)
    RewardSet.build([ids_only, ids_only]).terminal(batch)
    assert decoded == []
    RewardSet.build([by_text, by_text]).terminal(batch)
    assert decoded == [2]


def test_conversational_prompts_give_message_lists(make_batch):
    chat = [{"role": "user", "content": "Hi"}]

    def reward(prompts, completions):
        assert prompts == [chat, "plain"]
        assert completions == [[{"role": "assistant", "content": "one"}], "two"]
        return [1.0, 2.0]

    np.testing.assert_array_equal(terminal(reward, make_batch("one", "two", prompts=[chat, "plain"])), [1, 2])


def test_a_column_that_is_not_there_is_named_with_the_nearest_one(make_batch):
    def reward(completions, anwser):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"`reward` asks for `anwser`, which is not a column of the prompts. Did you mean `answer`\?"):
        terminal(reward, make_batch("a", answer=[1]))


def test_positional_only_parameters_are_refused_at_once():
    def reward(completions, /):
        return [0.0]

    with pytest.raises(ValueError, match="`completions` is positional-only"):
        RewardSet.build(reward)


@pytest.mark.parametrize(
    "values",
    [
        [1, 2],
        (1.0, 2.0),
        [True, False],
        [np.float32(1), np.int64(2)],
        [np.bool_(True), None],
        np.array([1.0, 2.0]),
        torch.tensor([1.0, 2.0], requires_grad=True),
        [torch.tensor(1.0, requires_grad=True), np.array(2.0)],
    ],
)
def test_numbers_of_every_kind_are_taken(make_batch, values):
    rewards = RewardSet.build([lambda completions: values, lambda completions: [0.0, 0.0]])
    _, raw = rewards.terminal(make_batch("a", "b"))
    expected = [math.nan if value is None else value.item() if hasattr(value, "item") else float(value) for value in values]
    np.testing.assert_array_equal(raw["lambda_reward"], expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], r"returned 1 values for 2 completions, the first of which is row 0 \(prompt 'a prompt', completion 'first'\)"),
        ([], "returned 0 values for 2 completions"),
        ([1.0, math.nan], r"returned nan for row 1 \(prompt 'a prompt', completion 'second'\); each value must be finite: return None"),
        ([math.inf, 1.0], "returned inf for row 0"),
        ([10**400, 1.0], "returned inf for row 0"),
        ([1.0, "2"], "returned str '2' for row 1"),
        ([[1.0], [2.0]], r"returned list \[1.0\] for row 0"),
        ([1j, 1.0], "returned complex 1j for row 0"),
        (torch.ones(2, 1), r"returned list \[1.0\] for row 0"),
        (np.float64(3.0), r"returned float64 np.float64\(3.0\); it must return a list with one number \(or None\) per completion"),
        (None, "returned NoneType None; it must return a list"),
        ("ab", "returned str 'ab'; it must return a list"),
        ({0: 1.0, 1: 2.0}, "returned dict"),
        ((x for x in [1.0, 2.0]), "returned generator"),
    ],
)
def test_unusable_results_name_function_row_and_text(make_batch, values, message):
    def my_reward(completions):
        return values

    with pytest.raises(RewardError, match=f"reward `my_reward` {message}"):
        terminal(my_reward, make_batch("first", "second"))


def test_long_texts_are_cut_in_messages(make_batch):
    with pytest.raises(RewardError) as caught:
        terminal(lambda completions: [math.nan], make_batch("x" * 10_000))
    assert len(str(caught.value)) < 500


def test_an_exception_of_the_function_passes_with_a_note(make_batch):
    def broken(completions):
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        terminal(broken, make_batch("a", "b"))
    assert caught.value.__notes__ == ["(raised by reward `broken`, called with 2 completions)"]


class Judge:
    """A callable object and, through its method, a bound one."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, completions):
        return [self.value] * len(completions)

    def method(self, completions):
        return [self.value + 1] * len(completions)


def test_callables_of_every_kind(make_batch):
    def with_option(completions, bonus):
        return [bonus] * len(completions)

    rewards = RewardSet.build([Judge(1.0), Judge(1.0).method, functools.partial(with_option, bonus=5.0), lambda completions: [7.0]])
    assert rewards.names == ("Judge", "method", "with_option", "lambda_reward")
    totals, raw = rewards.terminal(make_batch("a"))
    assert {name: scores[0] for name, scores in raw.items()} == {"Judge": 1.0, "method": 2.0, "with_option": 5.0, "lambda_reward": 7.0}
    assert totals[0] == 15.0


def test_names_are_distinct():
    assert unique_names(["f", "g", "f", "f"]) == ["f", "g", "f_2", "f_3"]
    assert unique_names(["f", "f", "f_2"]) == ["f", "f_3", "f_2"]
    assert function_name(functools.partial(functools.partial(Judge(1.0)))) == "Judge"


def test_a_callable_without_a_signature_gets_everything(make_batch):
    class NoSignature:
        __signature__ = "unreadable"

        def __call__(self, **kwargs):
            assert {"prompts", "completions", "completion_ids"} <= set(kwargs)
            return [1.0]

    assert terminal(NoSignature(), make_batch("a"))[0] == 1.0
