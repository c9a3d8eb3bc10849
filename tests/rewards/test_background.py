"""A plain function in a thread: the same numbers, one call at a time, beside everything else."""

import asyncio
import copy
import functools
import threading
import time

import cloudpickle
import pytest

from textgym.rewards import EpisodeBatch, InBackground, RewardSet, token_level


def lengths(completions, factor=1.0, **columns):
    return [factor * len(completion) for completion in completions]


class Score:
    def score(self, completions, **columns):
        return [-1.0 for _ in completions]


@token_level
def each(completion_ids, **columns):
    return [[0.5] * len(ids) for ids in completion_ids]


@pytest.fixture
def batch(tokenizer):
    return EpisodeBatch.from_texts(["p", "q"], ["one", "four"], tokenizer)


@pytest.mark.parametrize("reward", [lengths, functools.partial(lengths, factor=2.0), Score(), "length?unit=words"])
def test_it_is_the_reward(reward, batch):
    plain, threaded = RewardSet.build(reward), RewardSet.build(InBackground(reward))
    assert plain.names == threaded.names
    assert plain.terminal(batch)[0].tolist() == threaded.terminal(batch)[0].tolist()


def test_a_dense_reward_stays_dense(batch):
    rewards = RewardSet.build(InBackground(each))
    assert rewards.has_dense and not rewards.has_terminal
    assert [row.tolist() for row in rewards.dense_sequence(batch, [True, True])[0]] == [[0.5] * len(ids) for ids in batch.completion_ids]


def test_marks_are_found_wherever_a_plain_function_may_have_them(batch):
    class Each:
        @token_level
        def __call__(self, completion_ids, **columns):
            return [[0.5] * len(ids) for ids in completion_ids]

    for reward in (functools.partial(each), Each()):
        plain, threaded = RewardSet.build(reward), RewardSet.build(InBackground(reward))
        assert plain.has_dense and threaded.has_dense and not threaded.has_terminal
        found, expected = (rewards.dense_sequence(batch, [True, True])[0] for rewards in (threaded, plain))
        assert [row.tolist() for row in found] == [row.tolist() for row in expected]


def test_only_what_the_function_asks_for_is_handed_over(batch):
    def narrow(completions):
        return [1.0 for _ in completions]

    assert RewardSet.build(InBackground(narrow)).terminal(batch)[0].tolist() == [1.0, 1.0]


def test_two_functions_run_beside_each_other_and_one_never_twice(batch):
    meeting = threading.Barrier(2, timeout=20)
    inside, most = [0], [0]

    def waits(completions, **columns):
        meeting.wait()
        return [0.0 for _ in completions]

    def counted(completions, **columns):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1
        return [0.0 for _ in completions]

    def also_waits(completions, **columns):
        return waits(completions)

    RewardSet.build([InBackground(waits), InBackground(also_waits)]).terminal(batch)
    rewards = RewardSet.build(InBackground(counted))
    for pending in [rewards.start_terminal(batch) for _ in range(3)]:
        pending.result()
    assert most == [1]


def test_a_call_that_was_given_up_is_over_before_the_next(batch):
    inside, most, begun, may_end = [0], [0], threading.Event(), threading.Event()

    def counted(completions, **columns):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        begun.set()
        assert may_end.wait(20)
        inside[0] -= 1
        return [0.0 for _ in completions]

    rewards = RewardSet.build(InBackground(counted))
    given_up = rewards.start_terminal(batch)
    assert begun.wait(20)
    given_up.cancel()
    again = rewards.start_terminal(batch)
    threading.Timer(0.05, may_end.set).start()
    assert again.result()[0].tolist() == [0.0, 0.0]
    assert most == [1]


def test_used_ones_are_copied_and_sent_to_workers(batch):
    reward = InBackground(lengths)
    rewards = RewardSet.build(reward)
    for pending in [rewards.start_terminal(batch) for _ in range(2)]:
        pending.result()
    for other in (copy.deepcopy(reward), cloudpickle.loads(cloudpickle.dumps(reward))):
        assert RewardSet.build(other).terminal(batch)[0].tolist() == rewards.terminal(batch)[0].tolist()


@pytest.mark.parametrize("error", [StopIteration, SystemExit, KeyboardInterrupt])
def test_what_asyncio_cannot_hand_on_is_an_error(batch, error):
    def broken(completions, **columns):
        raise error

    with pytest.raises(RuntimeError, match=f"the reward raised {error.__name__}"):
        RewardSet.build(InBackground(broken)).terminal(batch)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_async_reward_that_wants_to_leave_leaves_the_others_a_loop(batch, error, gathered):
    async def leaves():
        raise error

    async def broken(completions, **columns):
        await (asyncio.gather(leaves(), leaves()) if gathered else leaves())

    async def judge(completions, **columns):
        return [1.0 for _ in completions]

    with pytest.raises(RuntimeError, match=f"the reward raised {error.__name__}"):
        RewardSet.build(broken).terminal(batch)
    assert RewardSet.build(judge).terminal(batch)[0].tolist() == [1.0, 1.0]


def test_an_exception_says_whose_it_is(batch):
    def broken(completions, **columns):
        raise OSError("no answer")

    with pytest.raises(OSError, match="no answer") as caught:
        RewardSet.build(InBackground(broken)).terminal(batch)
    assert "reward `broken`" in "".join(caught.value.__notes__)


def test_async_functions_are_refused():
    async def judge(completions, **columns):
        return [0.0 for _ in completions]

    class Judge:
        async def __call__(self, completions, **columns):
            return [0.0 for _ in completions]

    for one in (judge, Judge(), InBackground(lengths)):
        with pytest.raises(ValueError, match="`reward` must be a plain function, got the async function"):
            InBackground(one)
    with pytest.raises(ValueError, match="`reward` must be a function"):
        InBackground(3)
