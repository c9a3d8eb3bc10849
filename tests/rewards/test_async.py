"""Async rewards: concurrent, inside a running loop, on one loop for good, and failing well."""

import asyncio
import functools
import multiprocessing
import threading

import numpy as np
import pytest

from textgym.errors import RewardError
from textgym.rewards import RewardSet, segment_level, token_level


async def plain(completions):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


class AsyncCall:
    async def __call__(self, completions):
        return [1.0] * len(completions)


def test_async_functions_of_every_kind(make_batch):
    totals, raw = RewardSet.build([plain, AsyncCall(), functools.partial(plain)], [1, 10, 100]).terminal(make_batch("abc"))
    assert totals[0] == 3 + 10 + 300
    assert set(raw) == {"plain", "AsyncCall", "plain_2"}


def test_several_run_at_the_same_time(make_batch):
    # Each waits for the other: run one after the other they would never end.
    events = {}

    def waiting_for(mine, other):
        async def reward(completions):
            events.setdefault(mine, asyncio.Event()).set()
            await asyncio.wait_for(events.setdefault(other, asyncio.Event()).wait(), timeout=10)
            return [1.0]

        return reward

    assert RewardSet.build([waiting_for("a", "b"), waiting_for("b", "a")]).terminal(make_batch("x"))[0] == 2.0


def test_they_run_beside_a_plain_function(make_batch):
    started, plain_ran = threading.Event(), threading.Event()

    async def slow(completions):
        started.set()
        while not plain_ran.is_set():
            await asyncio.sleep(0.001)
        return [1.0]

    def quick(completions):
        assert started.wait(timeout=10)
        plain_ran.set()
        return [2.0]

    assert RewardSet.build([slow, quick]).terminal(make_batch("x"))[0] == 3.0


def test_inside_a_running_loop_as_in_a_notebook(make_batch):
    async def cell():
        return RewardSet.build(plain).terminal(make_batch("four"))[0]

    assert asyncio.run(cell())[0] == 4.0


def test_every_call_runs_on_the_same_loop(make_batch):
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [1.0]

    rewards = RewardSet.build(reward)
    rewards.terminal(make_batch("a"))
    rewards.terminal(make_batch("b"))
    assert loops[0] is loops[1]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # a forked worker is what is tested
def test_a_forked_worker_has_a_loop_of_its_own(make_batch):
    rewards, batch = RewardSet.build(plain), make_batch("four")
    rewards.terminal(batch)  # the parent's loop runs
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    worker = fork.Process(target=lambda: queue.put(rewards.terminal(batch)[0].tolist()), daemon=True)
    worker.start()
    worker.join(timeout=30)
    assert worker.exitcode == 0
    assert queue.get() == [4.0]


def test_an_exception_passes_with_a_note_and_the_others_are_cancelled(make_batch):
    cancelled, started = threading.Event(), threading.Event()

    async def endless(completions):
        try:
            started.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def broken(completions):
        while not started.is_set():
            await asyncio.sleep(0.001)
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        RewardSet.build([broken, endless]).terminal(make_batch("a"))
    assert "raised by reward `broken`" in caught.value.__notes__[0]
    assert cancelled.wait(timeout=10)


def test_a_plain_function_that_fails_cancels_async_ones(make_batch):
    cancelled, started = threading.Event(), threading.Event()

    async def endless(completions):
        try:
            started.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def broken(completions):
        assert started.wait(timeout=10)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        RewardSet.build([endless, broken]).terminal(make_batch("a"))
    assert cancelled.wait(timeout=10)


def test_results_are_checked_like_those_of_plain_functions(make_batch):
    async def wrong(completions):
        return [float("nan")]

    with pytest.raises(RewardError, match="reward `wrong` returned nan for row 0"):
        RewardSet.build(wrong).terminal(make_batch("a"))


def test_dense_rewards_may_be_async(make_batch):
    @token_level
    async def tokens(completion_ids):
        return [[1.0] * len(ids) for ids in completion_ids]

    @segment_level("whole")
    async def segment(segments):
        return [10.0] * len(segments)

    totals, _ = RewardSet.build([tokens, segment]).dense_sequence(make_batch("ab"), np.array([True]))
    np.testing.assert_array_equal(totals[0], [1, 1, 11])


def test_what_calls_log_stays_in_their_order(make_batch):
    """Whoever answers first logs first; the columns are those of the calls all the same."""

    async def judge(completions, log_extra, log_metric):
        await asyncio.sleep(0.02 if completions[0] == "slow" else 0)
        log_extra("text", completions)
        log_metric("length", len(completions[0]))
        return [1.0]

    rewards = RewardSet.build(judge)
    under_way = [rewards.start_terminal(make_batch(text)) for text in ("slow", "fast", "given up")]
    under_way.pop().cancel()
    for pending in under_way:
        pending.result()
    metrics, extra = rewards.drain_logs()
    assert extra == {"text": ["slow", "fast"]} and metrics == {"length": 4.0}
