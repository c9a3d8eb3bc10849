"""Errors of the command line: one sentence on stderr and exit code 2, no traceback; warnings: one line on stderr."""

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, TextIO

import typer

from textgym.cli.translating import translated, vocabulary_of

EXIT_USER_ERROR = 2
EXIT_WAITING = 75  # somebody else has to do something first, then the command goes on: EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended


class UserError(Exception):
    """Something that the user can put right; its text is the one sentence that says what and how."""


class LinesError(UserError):
    """The same in several short lines, such as one for each kind of bad row."""


def fail(error: BaseException | str, further: str = "") -> NoReturn:
    """Prints one line about `error` (of a `LinesError` each of its lines) to stderr, with `further` behind it, and ends the command."""
    print(f"textgym: {told(error)}{further}", file=sys.stderr)
    raise typer.Exit(EXIT_USER_ERROR)


def told(error: BaseException | str) -> str:
    """Returns what an error says in its line or lines, in words that can be typed; what code of the user's says stays as it is."""
    lines = str(error).splitlines() if isinstance(error, LinesError) else [one_line(error)]
    return "\n".join(lines if _is_others(error) else map(translated_line, lines))


def translated_line(line: str) -> str:
    """Returns a message of the library in words that can be typed for the command that runs."""
    return translated(line, vocabulary_of(_context()))


def one_line(error: BaseException | str) -> str:
    """Returns what an error says, without line breaks; one that says nothing, or a key only, is named by its type."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError | ValueError | str) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_others(error: BaseException | str) -> bool:
    """Whether an error, or what a `UserError` was made of, was raised by code that is not this package's."""
    if isinstance(error, UserError) and error.__cause__ is not None:
        error = error.__cause__
    trace: TracebackType | None = None if isinstance(error, str) else error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and not str(trace.tb_frame.f_globals.get("__name__", "")).startswith("textgym")


def _context() -> Any:
    """Returns the context of the command that runs, None where none does."""
    try:
        click = importlib.import_module("typer._click.globals")  # newer versions of typer have a click of their own
    except ImportError:
        click = importlib.import_module("click.globals")
    return click.get_current_context(silent=True)


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Ends the command through `fail` on the errors that users cause; a mistake in textgym itself keeps its traceback.

    A warning on the way is one line, `textgym: warning: ...`, without the place in the program, and above the progress bar if there is one.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except BrokenPipeError:
        raise  # whoever read our output has left: nobody to tell
    except (UserError, ValueError, OSError) as error:
        fail(error)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    # `sys.stderr` is looked up here: a live progress bar stands in its place, and prints above itself.
    print(f"textgym: warning: {told(str(message))}", file=file or sys.stderr)
