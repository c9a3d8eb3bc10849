"""What a run shows at its end: the numbers before and after, and samples side by side."""

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from textgym.cli.errors import told
from textgym.cli.measuring import Measurement, text_of
from textgym.cli.run_folder import RunFolder
from textgym.cli.shortening import prompt_cells, shortened
from textgym.evaluation.reward_model_report import left_out_in_words

if TYPE_CHECKING:
    from textgym.agents.rlhf import Round

SHOWN_SAMPLES = 6
_TEXT_WIDTH = 60  # of each of the two columns in samples.txt

_ROWS = (
    ("reward", "reward", "{:.3f}"),
    ("true_reward", "true reward (only measured)", "{:.3f}"),
    ("kl_per_sequence", "KL to the reference, nats per completion", "{:.2f}"),
    ("length", "tokens per completion", "{:.1f}"),
    ("ended", "completions that end by themselves", "{:.0%}"),
    ("loss", "loss on held-out examples", "{:.4f}"),
    ("accuracy", "held-out preferences in the right order", "{:.1%}"),
)


def _cell(measurement: Measurement, name: str, form: str) -> str:
    value = getattr(measurement, name)
    shown = "" if value is None else form.format(value)
    return shown.lstrip("-") if shown and not shown.strip("-0.%") else shown  # a KL of rounding errors is 0, not -0


def numbers_table(before: Measurement, after: Measurement) -> Table:
    """Returns the means before and after training."""
    table = Table(title="On held-out prompts")
    table.add_column("", overflow="fold")
    table.add_column("before", justify="right", overflow="fold")
    table.add_column("after", justify="right", overflow="fold")
    for name, label, form in _ROWS:
        if getattr(before, name) is not None:
            table.add_row(label, _cell(before, name, form), _cell(after, name, form))
    return table


def samples_table(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], width: int = 80) -> Table:
    """Returns the first samples side by side, for a terminal `width` columns wide: prompts dimmed and shortened, rewards below."""
    table = Table(title="The same prompts before and after", show_lines=True)
    table.add_column("before", ratio=1, overflow="fold")
    table.add_column("after", ratio=1, overflow="fold")
    for pair in zip(before[:SHOWN_SAMPLES], after[:SHOWN_SAMPLES], strict=True):
        prompts = [escape(shortened(text_of(row["prompt"]), prompt_cells(width))) for row in pair]
        table.add_row(*(f"[dim]{prompt}[/dim]{escape(row['completion'])}{_scores(row)}" for prompt, row in zip(prompts, pair, strict=True)))
    return table


def _scores(row: dict[str, Any]) -> str:
    scores = ", ".join(f"{escape(name)} {value:.2f}" for name, value in row["rewards"].items())
    return f"\n[cyan]{scores}[/cyan]" if scores else ""


def samples_text(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> str:
    """Returns the first samples side by side as plain text."""
    lines = [f"{'BEFORE':<{_TEXT_WIDTH}} | AFTER"]
    for first, second in zip(before[:SHOWN_SAMPLES], after[:SHOWN_SAMPLES], strict=True):
        columns = [_text_lines(first), _text_lines(second)]
        height = max(map(len, columns))
        lines.append("-" * _TEXT_WIDTH + "-+-" + "-" * _TEXT_WIDTH)
        padded = [column + [""] * (height - len(column)) for column in columns]
        lines += [f"{left:<{_TEXT_WIDTH}} | {right}" for left, right in zip(*padded, strict=True)]
    return "\n".join(lines) + "\n"


def _text_lines(row: dict[str, Any]) -> list[str]:
    scores = ", ".join(f"{name} {value:.2f}" for name, value in row["rewards"].items())
    return [*wrap(text_of(row["prompt"]) + row["completion"], _TEXT_WIDTH), *([f"({scores})"] if scores else [])]


def print_report(console: Console, folder: RunFolder, numbers: Table, samples: Table) -> None:
    """Prints both tables and where everything lies."""
    console.print(numbers)
    console.print(samples)
    contents = (
        (folder.curves, "learning curves"),
        (folder.model, f"the trained model: textgym generate --model {folder.path}"),
        (folder.best_model, "the model with the best held-out reward"),
        (folder.checkpoint, f"to train on: {folder.resume_command()} --total-timesteps N"),
        (folder.tensorboard, f"tensorboard --logdir {folder.path}"),
    )
    console.print(f"Run folder: {folder.path}", style="bold", highlight=False, soft_wrap=True)
    for path, note in contents:
        if path.exists():
            console.print(f"  {path.name:<14} {note}", highlight=False, markup=False, soft_wrap=True)


def print_rounds(rounds: "Sequence[Round]", console: Console) -> None:
    """Prints what each round came to, and what of the comparisons was left out."""
    table = Table(title="Rounds")
    for name in ("round", "comparisons", "reward model's accuracy", "length alone", "timesteps"):
        table.add_column(name, justify="right", overflow="fold")
    notes = []
    for one in rounds:
        report = one.reward_model
        shown = [_share(report.get(name)) for name in ("accuracy", "length_accuracy")]
        table.add_row(str(one.number), f"{one.comparisons:,}", *shown, f"{one.timesteps:,}")
        sides = (("trained on", report.get("training", {})), ("held out", report))
        notes += [
            f"round {one.number}: of the comparisons {side} left out: {words.replace('`', '')}"
            for side, numbers in sides
            if (words := left_out_in_words(numbers.get("left_out", {})))
        ]
        if report.get("not_measured"):
            notes.append(f"round {one.number}: the reward model was not measured: {told(report['not_measured'])}")
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _share(estimate: dict[str, Any] | None) -> str:
    """Returns a share in per cent; "-" where nothing was decided or measured."""
    return "-" if estimate is None or estimate["mean"] is None else f"{estimate['mean']:.1%}"
