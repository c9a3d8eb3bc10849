"""Long prompts in tables: their beginning and their end, in columns of the terminal."""

import pytest
from rich.cells import cell_len

from textgym.cli.report import samples_table
from textgym.cli.shortening import prompt_cells, shortened


@pytest.mark.parametrize("text", ["short", " the plot ", "a" * 30, "电" * 15])
def test_what_fits_stays_as_it_is(text: str) -> None:
    assert shortened(text, 30) == text


@pytest.mark.parametrize("cells", [12, 31, 40])
@pytest.mark.parametrize(
    "text", ["begin " + "x" * 100 + " ending", "开始" + "电" * 100 + "结束", "begin\n\nHuman: " + "y" * 99 + "\n\nending", "🙂" * 99]
)
def test_a_long_text_keeps_both_ends_and_fits(text: str, cells: int) -> None:
    found = shortened(text, cells)
    start, gap, end = found.partition(" … ")
    assert cell_len(found) <= cells and gap and "\n" not in found
    assert abs(cell_len(start) - cell_len(end)) <= 3
    assert text.startswith(start.partition(" / ")[0]) and text.endswith(end.rpartition(" / ")[2])


def test_lines_become_one() -> None:
    assert shortened("\n\nHuman: hi\n\nAssistant:", 80) == "Human: hi / Assistant:"


def test_a_dialogue_takes_a_few_lines_of_a_table() -> None:
    from rich.console import Console

    row = {"prompt": "\n\nHuman: why?\n\nAssistant: " * 200, "completion": " because.", "rewards": {}}
    console = Console(width=80, record=True, file=None, force_terminal=False)
    with console.capture() as written:
        console.print(samples_table([row], [row], 80))
    lines = written.get().splitlines()
    assert len(lines) < 12 and "because." in written.get()
    assert prompt_cells(80) == 108
