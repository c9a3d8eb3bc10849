"""The warnings of a run as a text file in its folder."""

from pathlib import Path

from stable_baselines3.common.logger import SeqWriter

from textgym.cli.errors import one_line


class WarningsFile(SeqWriter):
    """What is told through the logger of a run, one sentence a line, in a file that is made with the first.

    Args:
        path: the file; a resumed run appends to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_sequence(self, sequence: list[str]) -> None:
        """Appends a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(" ".join(map(one_line, sequence)) + "\n")

    def close(self) -> None:
        """There is nothing that stays open."""
