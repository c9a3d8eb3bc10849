"""A comparison of two sides as tables on the terminal, and as files."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from textgym.agents.comparison import ComparisonReport
from textgym.cli.measuring import text_of
from textgym.cli.run_folder import write_json, write_json_lines
from textgym.cli.shortening import prompt_cells, shortened

SHOWN_SAMPLES = 4
FILES = ("report.json", "report.md", "samples.jsonl")


def print_comparison(console: Console, report: ComparisonReport) -> None:
    """Prints the numbers, the win rates, the reward-hacking report and the first samples."""
    table = Table(title=f"{report.settings['prompts']} held-out prompts")
    table.add_column("")
    for side in report.sides:
        table.add_column(side.name, justify="right")
    for row in report.table():
        table.add_row(*row)
    console.print(table)
    for line in report.win_rate_lines():
        console.print(line, style="bold", highlight=False, soft_wrap=True)
    if report.over_optimisation is not None:
        console.print(Markdown(report.over_optimisation.to_markdown()))
    _print_samples(console, report)


def _print_samples(console: Console, report: ComparisonReport) -> None:
    samples = Table(title="The first samples", show_lines=True)
    for side in report.sides:
        samples.add_column(side.name, ratio=1)
    for sample in report.samples[:: report.settings["num_generations"]][:SHOWN_SAMPLES]:
        cells = [sample[side.name] for side in report.sides]
        scores = [", ".join(f"{name} {value:.2f}" for name, value in cell.items() if name != "completion") for cell in cells]
        prompt = escape(shortened(text_of(sample["prompt"]), prompt_cells(console.width)))
        samples.add_row(
            *(f"[dim]{prompt}[/dim]{escape(cell['completion'])}\n[cyan]{score}[/cyan]" for cell, score in zip(cells, scores, strict=True))
        )
    console.print(samples)


def write_comparison(folder: Path, report: ComparisonReport, further: dict[str, Any]) -> None:
    """Writes report.json, which also holds `further`, report.md and samples.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILES[0], {**report.to_dict(), **further})
    (folder / FILES[1]).write_text(report.to_markdown(), encoding="utf-8")
    write_json_lines(folder / FILES[2], report.samples)
