"""Results that are waited for: in order, two at a time, and none left running when something goes wrong."""

import pytest

from textgym.pending import Pending, in_turn


class Work:
    """Something that is under way, and notes what becomes of it."""

    def __init__(self, log, name, error=None):
        self.log, self.name, self.error = log, name, error

    def start(self):
        self.log.append(f"start {self.name}")
        return Pending(self.wait, lambda: self.log.append(f"cancel {self.name}"))

    def wait(self):
        self.log.append(f"wait {self.name}")
        if self.error is not None:
            raise self.error
        return self.name


def test_what_is_there_is_worked_on_at_once():
    log = []
    Pending.of(1).then(lambda value: log.append(value + 1))
    assert log == [2]
    assert Pending.of(1).beside(Pending.of("a")).is_there
    assert Pending.of(1).beside(Pending.of("a")).result() == (1, "a")


def test_what_is_waited_for_is_worked_on_later_and_once():
    log = []
    twice = Work(log, "a").start().then(lambda value: log.append("change") or value * 2)
    assert not twice.is_there and log == ["start a"]
    assert (twice.result(), twice.result()) == ("aa", "aa")
    assert twice.is_there and log == ["start a", "wait a", "change"]


@pytest.mark.parametrize("failing", ["first", "second"])
def test_an_error_of_one_cancels_the_other(failing):
    log = []
    first, second = (Work(log, name, ValueError(name) if name == failing else None) for name in ("first", "second"))
    with pytest.raises(ValueError, match=failing):
        first.start().beside(second.start()).result()
    assert ("cancel second" in log) == (failing == "first") or "wait second" in log
    assert f"cancel {failing}" in log


def test_an_error_of_what_is_done_meanwhile_cancels():
    log = []
    with pytest.raises(KeyboardInterrupt), Work(log, "a").start() as pending:
        raise KeyboardInterrupt
    assert log == ["start a", "cancel a"]
    with pytest.raises(RuntimeError, match="cancelled"):
        pending.result()
    with Work(log, "b").start() as pending:
        pass
    assert pending.result() == "b" and "cancel b" not in log


def test_a_result_that_is_there_is_not_cancelled():
    log = []
    pending = Work(log, "a").start()
    pending.result()
    pending.cancel()
    assert pending.result() == "a" and "cancel a" not in log


def test_in_turn_has_two_under_way_at_most():
    log = []
    results = in_turn(Work(log, name).start() for name in "abc")
    found = []
    for result in results:
        found.append(result)
        log.append(f"have {result}")
    assert found == ["a", "b", "c"]
    assert log == ["start a", "start b", "wait a", "have a", "start c", "wait b", "have b", "wait c", "have c"]


def test_in_turn_gives_what_is_there_before_it_asks_for_more():
    log = []

    def starts():
        for name in "ab":
            log.append(f"start {name}")
            yield Pending.of(name)

    for result in in_turn(starts()):
        log.append(f"have {result}")
    assert log == ["start a", "have a", "start b", "have b"]


@pytest.mark.parametrize("failing", ["a", "b", "start of c", "whoever reads"])
def test_in_turn_leaves_nothing_running(failing):
    log = []

    def starts():
        for name in "abc":
            if failing == f"start of {name}":
                raise ValueError(failing)
            yield Work(log, name, ValueError(failing) if name == failing else None).start()

    with pytest.raises(ValueError, match=failing):
        for _ in in_turn(starts()):
            if failing == "whoever reads":
                raise ValueError(failing)
    started, over = ({entry[-1] for entry in log if entry.startswith(word)} for word in ("start", ("wait", "cancel")))
    assert started == over, log
