"""Warnings of the library as lines of the command line's own, in words that can be typed."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from textgym.cli.errors import told
from textgym.errors import TrainingWarning


@contextmanager
def said_warnings() -> Iterator[None]:
    """Prints every warning of this package's as one line on stderr, as it comes; those of other packages stay as they are."""
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.filterwarnings("always", category=UserWarning, module=r"textgym\b")

        def say(message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
            if category in (UserWarning, TrainingWarning):
                print(f"textgym: {told(str(message))}", file=sys.stderr)
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = say
        yield
