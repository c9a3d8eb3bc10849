"""What the rewards that compare a completion with reference texts have in common: finding the references of each row."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, final

from textgym.rewards.episodes import Prompt, completion_text, excerpt


class ReferenceReward(ABC):
    """Scores completions against the reference texts in a column of the prompt data.

    A value of the column is one reference, a string or a list of messages, or a list of several. A row whose value is None or an empty
    list is not scored (None).

    Args:
        name: the name of the reward in `info` and logs.
        column: the column with the references; by default the first of `default_columns` that there is.
    """

    default_columns: ClassVar[tuple[str, ...]] = ("reference", "references", "answer")

    def __init__(self, name: str, column: str | None = None) -> None:
        self.__name__ = name
        self.column = column

    @final
    def __call__(self, completions: Sequence[Prompt], **columns: Any) -> list[float | None]:
        """Returns one score per completion, None where the row has no reference."""
        column = self.column or next((name for name in self.default_columns if name in columns), None)
        if column is None or column not in columns:
            wanted = f"no column {column!r}" if column else f"none of the columns {', '.join(self.default_columns)}"
            raise ValueError(f"reward `{self.__name__}`: the prompts have {wanted}; name the one with the references: `column=`.")
        references = [self.read(value, f"column {column!r}, row {row}") for row, value in enumerate(columns[column])]
        rows = [row for row, texts in enumerate(references) if texts]
        scores: list[float | None] = [None] * len(references)
        texts = [completion_text(completions[row]) for row in rows]
        for row, score in zip(rows, self.scores(texts, [references[row] for row in rows]) if rows else [], strict=True):
            scores[row] = score
        return scores

    @abstractmethod
    def scores(self, texts: list[str], references: list[list[str]]) -> Sequence[float | None]:
        """Returns the score of each of `texts` against its references, of which each has at least one; None where there is none."""

    def read(self, value: Any, where: str) -> list[str]:
        """Returns the references in one value of the column; `where` says which, for error messages."""
        if value is None:
            return []
        values = [value] if isinstance(value, str) or is_message_list(value) else value
        if not isinstance(values, list | tuple) or not all(isinstance(one, str) or is_message_list(one) for one in values):
            raise ValueError(f"reward `{self.__name__}`: {where}: the column must hold texts or lists of texts, got {excerpt(value)}.")
        return [completion_text(one) for one in values]


def is_message_list(value: Any) -> bool:
    """Returns whether a value is one text in the form of messages, `[{"role": ..., "content": ...}]`."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, Mapping) and "role" in part for part in value)


def require_package(module: str, package: str, reward: str, extra: str | None = "metrics") -> None:
    """Raises an `ImportError` that says how to install what a reward needs, unless it is there; imports nothing."""
    if find_spec(module) is None:
        command = f"pip install 'textgym[{extra}]'" if extra else f"pip install {package}"
        raise ImportError(f"reward `{reward}` needs the package {package}, which is not installed: {command}.")
