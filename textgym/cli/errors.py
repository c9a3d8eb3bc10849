"""Errors of the command line: one sentence on stderr and exit code 2, no traceback; warnings: one line on stderr."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

import typer

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended


class UserError(Exception):
    """Something that the user can put right; its text is the one sentence that says what and how."""


def fail(error: BaseException | str) -> NoReturn:
    """Prints one line about `error` to stderr and ends the command."""
    print(f"textgym: {one_line(error)}", file=sys.stderr)
    raise typer.Exit(EXIT_USER_ERROR)


def one_line(error: BaseException | str) -> str:
    """Returns what an error says, without line breaks; one that says nothing, or a key only, is named by its type."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError | ValueError | str) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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
    print(f"textgym: warning: {one_line(str(message))}", file=file or sys.stderr)
