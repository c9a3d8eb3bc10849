"""math-verify, which decides whether two mathematical expressions are equal, in a process that a slow answer cannot hang."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

Side: TypeAlias = Mapping[str, str]

_START_SECONDS = 120.0  # for starting the process and importing sympy on a busy machine


class MathProcess:
    """A process that runs math-verify, started when first needed; one per process that uses it.

    Args:
        timeout: seconds for each of reading and comparing, inside the process; it is killed after thrice as many and a second.
    """

    def __init__(self, timeout: int) -> None:
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"timeout": self._timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["timeout"])  # type: ignore[misc]

    def equal(self, gold: Side, found: Side, tolerance: Fraction) -> bool:
        """Returns whether math-verify finds both sides equal, to within `tolerance`; False where it takes too long.

        Args:
            gold: `{"number": "1/2"}`, exactly, or `{"latex": "x^2"}`.
            found: the same.
            tolerance: how far apart numbers, and the numbers in points, sets, intervals and matrices, may be.
        """
        request = {"gold": gold, "found": found, "tolerance": str(tolerance), "timeout": self._timeout}
        with self._lock:
            if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
                self._start()  # a forked process inherits the pipes of its parent, which are not for it
            answer = self._ask(request, 3.0 * self._timeout + 1.0)
        return answer is not None and bool(answer["equal"])

    def _start(self) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        self._process, self._owner = process, os.getpid()
        weakref.finalize(self, _stop, process, self._owner)
        if self._ask(None, _START_SECONDS) is None:
            raise RuntimeError("reward `numeric`: the process that runs math-verify could not be started; its error message is above.")

    def _ask(self, request: dict[str, Any] | None, seconds: float) -> dict[str, Any] | None:
        """Sends a request, if any, and returns the next answer; None if there is none in time, and the process is gone then."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)  # ends the waiting below; needs no signal and no particular thread
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                print(json.dumps(request), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        _stop(process, self._owner)
        self._process = None
        return None


def _stop(process: "subprocess.Popen[str]", owner: int) -> None:
    """Ends the process and closes its pipes; a forked copy of the caller leaves alone what is not its own."""
    if owner != os.getpid():
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # a request may be left in the buffer
                pipe.close()
