"""Whether the number, or other mathematical answer, in a completion is the right one: a verifiable reward."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

from textgym.rewards.references import ReferenceReward, require_package

_PLAIN = re.compile(r"[-+]?\$?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?")
_START_SECONDS = 120.0  # for starting the process and importing sympy on a busy machine


class NumericReward(ReferenceReward):
    r"""Rewards completions whose answer equals the one in a column of the prompt data: 1 where it does, 0 where not.

    The answer of a text is what follows its last `####` on that line (GSM8K's form); without one, math-verify looks for it in the whole
    text: the last `\boxed{}`, LaTeX between dollars, or number. Two plain numbers (`42`, `-1,234.50`, `$3`) are compared as exact
    fractions, everything else by math-verify (`1/2` and `0.5` and `\frac{1}{2}` are equal, so are sets, intervals, matrices).

    math-verify runs in a process of its own that is killed when a row takes too long; the row then gets 0. So it works in threads and in
    the workers of vector environments, where the timeouts of math-verify itself, alarm signals, do not.

    Args:
        column: the column with the answers, numbers or texts or lists of them; by default the first of `answer`, `reference` and
            `references` that there is. An answer in which no value is found, and None, give None.
        tolerance: how far apart two plain numbers may be and count as equal.
        timeout: seconds for one row, at least 1.

    Raises:
        ValueError: an argument breaks these rules.
        ImportError: math-verify is not installed.
    """

    default_columns = ("answer", "reference", "references")

    def __init__(self, column: str | None = None, *, tolerance: float = 0.0, timeout: int = 5) -> None:
        super().__init__("numeric", column)
        if not tolerance >= 0:
            raise ValueError(f"`tolerance` must be at least 0, got {tolerance}.")
        if timeout < 1:
            raise ValueError(f"`timeout` must be at least 1 second, got {timeout}.")
        require_package("math_verify", "math-verify", self.__name__)
        self.tolerance, self.timeout = Fraction(str(tolerance)), timeout  # 0.01 is a hundredth
        self._worker = _MathWorker(timeout)

    def read(self, value: Any, column: str) -> list[str]:
        """Returns the answers in one value of the column; numbers are answers too."""
        values = value if isinstance(value, list | tuple) else [value]
        return super().read([str(one) if isinstance(one, int | float) else one for one in values if one is not None], column)

    def scores(self, texts: list[str], references: list[list[str]]) -> list[float | None]:
        """Returns 1 or 0 for each text, None where no answer of the row has a value."""
        return [self._score(_answer(text), [_answer(one) for one in own]) for text, own in zip(texts, references, strict=True)]

    def _score(self, text: str, answers: list[str]) -> float | None:
        verdicts = [self._equal(answer, text) for answer in answers]
        known = [verdict for verdict in verdicts if verdict is not None]
        return float(any(known)) if known else None

    def _equal(self, answer: str, text: str) -> bool | None:
        """Returns whether `text` has the value of `answer`; None where `answer` has none."""
        wanted, found = _plain(answer), _plain(text)
        if wanted is not None and found is not None:
            return abs(wanted - found) <= self.tolerance
        return self._worker.equal(answer, text)


def _answer(text: str) -> str:
    """Returns the part of a text that is its answer in GSM8K's form, or the text."""
    _, mark, after = text.rpartition("####")
    return after.strip().partition("\n")[0].strip() if mark else text.strip()


def _plain(text: str) -> Fraction | None:
    """Returns the value of a text that is a plain number, with or without commas between thousands, a dollar sign or a full stop."""
    text = text.removesuffix(".")
    digits = text.replace(",", "").replace("$", "")
    return Fraction(digits) if _PLAIN.fullmatch(text) and any(c.isdigit() for c in digits) else None


class _MathWorker:
    """A process that runs math-verify, started when first needed; one per process that uses it.

    Args:
        timeout: seconds for one request, inside the process; it is killed after twice as many and a second.
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

    def equal(self, gold: str, text: str) -> bool | None:
        """Returns math-verify's verdict: None where it finds no value in `gold`, False where it takes too long."""
        with self._lock:
            if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
                self._start()  # a forked process inherits the pipes of its parent, which are not for it
            answer = self._ask({"gold": gold, "text": text, "timeout": self._timeout}, 2.0 * self._timeout + 1.0)
        if answer is None:
            return False
        return bool(answer["equal"]) if answer["has_gold"] else None

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
