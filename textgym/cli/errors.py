"""Errors of the command line: one sentence on stderr and exit code 2, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended


class UserError(Exception):
    """Something that the user can put right; its text is the one sentence that says what and how."""


class LinesError(UserError):
    """The same in several short lines, such as one for each kind of bad row."""


def fail(error: BaseException | str) -> NoReturn:
    """Prints one line about `error` (of a `LinesError` each of its lines) to stderr and ends the command."""
    print(f"textgym: {error if isinstance(error, LinesError) else one_line(error)}", file=sys.stderr)
    raise typer.Exit(EXIT_USER_ERROR)


def one_line(error: BaseException | str) -> str:
    """Returns what an error says, without line breaks; one that says nothing, or a key only, is named by its type."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError | ValueError | str) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Ends the command through `fail` on the errors that users cause; a mistake in textgym itself keeps its traceback."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read our output has left: nobody to tell
    except (UserError, ValueError, OSError) as error:
        fail(error)
