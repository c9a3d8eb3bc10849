"""Results that somebody else may still be working on: what a reward service has not answered yet, and what is going to be made of it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")


class Pending(Generic[T]):
    """A value that is there, or that has to be waited for.

    What follows from a value that is there is worked out at once, so that without anybody to wait for nothing happens later than it would
    in plain calls.

    Args:
        wait: waits for the value and returns it; called once at most.
        cancel: tells whoever works on it to stop.
    """

    def __init__(self, wait: Callable[[], T], cancel: Callable[[], object]) -> None:
        self._wait: Callable[[], T] | None = wait
        self._cancel = cancel
        self._value: list[T] = []

    @classmethod
    def of(cls, value: T) -> "Pending[T]":
        """Returns a value that is there."""
        there = cls(lambda: value, lambda: None)
        there.result()
        return there

    @property
    def is_there(self) -> bool:
        """Whether nobody has to be waited for."""
        return bool(self._value)

    def result(self) -> T:
        """Waits for the value. An exception of whoever works on it comes out here."""
        if not self._value:
            if self._wait is None:
                raise RuntimeError("This result was waited for before, and failed or was cancelled; begin anew.")
            wait, self._wait = self._wait, None
            try:
                self._value.append(wait())
            except BaseException:  # Ctrl-C included: leave nothing running
                self._cancel()
                raise
        return self._value[0]

    def cancel(self) -> None:
        """Stops waiting for the value: nobody is going to ask for it."""
        if not self._value and self._wait is not None:
            self._wait = None
            self._cancel()

    def then(self, change: Callable[[T], U]) -> "Pending[U]":
        """Returns `change` of the value: now if it is there, else when it is asked for."""
        if self.is_there:
            return Pending.of(change(self.result()))
        return Pending(lambda: change(self.result()), self.cancel)

    def beside(self, other: "Pending[V]") -> "Pending[tuple[T, V]]":
        """Returns both values as one; what goes wrong with one cancels the other."""

        def cancel() -> None:
            self.cancel()
            other.cancel()

        both = Pending(lambda: (self.result(), other.result()), cancel)
        return Pending.of(both.result()) if self.is_there and other.is_there else both

    def __enter__(self) -> "Pending[T]":
        """Something else is done meanwhile; an exception there cancels this."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """See `__enter__`."""
        if error is not None:
            self.cancel()


def in_turn(started: Iterable[Pending[T]]) -> Iterator[T]:
    """Yields results in their order; while one is waited for the next has been started, so that two are under way at most.

    Args:
        started: starts a result whenever it is asked for one.
    """
    waiting: deque[Pending[T]] = deque()
    try:
        for pending in started:
            waiting.append(pending)
            while waiting and (len(waiting) == 2 or waiting[0].is_there):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for pending in waiting:
            pending.cancel()
