"""Feedback from the files that options name: read, renamed, and what is wrong with it in a few short lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from textgym.cli.errors import LinesError, UserError, one_line
from textgym.errors import FeedbackError
from textgym.feedback import Feedback, read_feedback


@dataclass(frozen=True)
class FeedbackReading:
    """How files of feedback are read.

    Attributes:
        form: of all rows; None recognises it row by row.
        rename: columns that are called otherwise, `{their name: our name}`.
        positive: of labels that are names of classes, the one that means good.
        keep_good: leave out bad rows, and count them, instead of stopping.
    """

    form: str | None = None
    rename: dict[str, str] | None = None
    positive: str | None = None
    keep_good: bool = False

    def read(self, name: str, files: str | Sequence[str]) -> Feedback:
        """Reads the files that the option or argument `name` gives.

        Raises:
            UserError: one cannot be read, or rows of them cannot.
        """
        source: Any = files if isinstance(files, str) else list(files)
        bad_rows = "keep_good" if self.keep_good else "raise"
        try:
            return read_feedback(source, self.form, on_bad_row=bad_rows, rename=self.rename, positive=self.positive)  # type: ignore[arg-type]
        except FeedbackError as error:
            said = str(error).removeprefix("`feedback` ").replace("  `feedback`: ", "  ")  # each line would name the option again
            raise LinesError(f"{name} {said}") from error
        except (ValueError, OSError) as error:
            raise UserError(f"{name}: {one_line(error)}") from error


def parse_renames(given: Sequence[str]) -> dict[str, str]:
    """Reads `OLD=NEW` pairs.

    Raises:
        UserError: there is no equals sign, or a name is missing or comes twice.
    """
    names: dict[str, str] = {}
    for pair in given:
        old, equals, new = pair.partition("=")
        if not (old and equals and new):
            raise UserError(f"--rename takes OLD=NEW, for example --rename errors=spans, not {pair!r}.")
        if old in names or new in names.values():
            raise UserError(f"--rename {pair}: {old if old in names else new} is renamed twice.")
        names[old] = new
    return names


def first_bad_row(feedback: Feedback) -> str:
    """Returns in words how many rows were left out, and why the first; "" for none."""
    count = len(feedback.bad_rows)
    if not count:
        return ""
    return f"left out {count:,} row{'s' if count > 1 else ''}; the first: {one_line(feedback.bad_rows[0].reason)}"
