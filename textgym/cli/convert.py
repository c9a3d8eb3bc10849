"""`textgym convert`: feedback of one form as feedback of another, with an account of what was kept and what was not."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from textgym.cli.errors import UserError, one_sentence_errors
from textgym.cli.feedback_files import FeedbackReading, first_bad_row, parse_renames

if TYPE_CHECKING:
    from textgym.feedback import Converted, Feedback

EXAMPLES = """Examples:

- `textgym convert rankings.jsonl --to pairs --out pairs.jsonl` for textgym train dpo
- `textgym convert pairs.jsonl --to labels --out labels.jsonl` for textgym train kto
- `textgym convert reviews.csv --positive pos --to labels --out labels.jsonl` names of classes
- `textgym convert marked.jsonl --rename errors=spans --to labels --category wrong --out labels.jsonl`
- `textgym convert labels.parquet --to same --out labels.jsonl.gz` another format"""


def convert(
    files: Annotated[
        list[str], typer.Argument(help="Feedback of any forms (docs/feedback.md): .jsonl, .json, .csv, .parquet; several are read as one.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="pairs (prompt, chosen, rejected), labels (prompt, completion, label), segment-labels (a label per segment of marked "
            "texts), judgements, rankings, demonstrations (the best answers, for textgym sft), or same: the form that each row has."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write: .jsonl or .jsonl.gz.")],
    form: Annotated[
        str | None,
        typer.Option(help="The form that all rows have, where their columns fit several: comparison, ranking, judgements, label, ..."),
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="A column that is called otherwise; repeatable.", show_default=False)
    ] = None,
    positive: Annotated[str | None, typer.Option(help="Of labels that are names of classes, the one that means good.")] = None,
    keep_ties: Annotated[
        bool, typer.Option("--keep-ties", help="With --to pairs: a tie is a pair with preference 0.5, which DPO and reward models read.")
    ] = False,
    category: Annotated[
        list[str] | None, typer.Option(help="Spans of this category are faults; repeatable.", show_default="all spans are")
    ] = None,
    segmenter: Annotated[
        str | None,
        typer.Option(help="With --to segment-labels, what a segment is: sub_sentence, sentence, whole.", show_default="sub_sentence"),
    ] = None,
    keep_good: Annotated[bool, typer.Option("--keep-good", help="Leave out rows that are no feedback, instead of stopping.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is in --out.")] = False,
) -> None:
    """Turn feedback into another form, another format, or other columns, and say what was left out and why."""
    with one_sentence_errors():
        from textgym.feedback.conversion import TARGETS
        from textgym.feedback.conversion import convert as convert_records

        rules = (
            (to in TARGETS, f"--to must be one of {', '.join(TARGETS)}, not {to}."),
            (out.name.endswith((".jsonl", ".jsonl.gz")), f"--out must end in .jsonl or .jsonl.gz, not {out.name!r}."),
            (to == "pairs" or not keep_ties, "--keep-ties belongs to --to pairs."),
            (to == "segment-labels" or segmenter is None, "--segmenter belongs to --to segment-labels."),
            (
                to not in ("same", "judgements", "rankings") or not category,
                f"--category cannot be given with --to {to}: it reads no spans.",
            ),
            (all(Path(one).resolve() != out.resolve() for one in files), f"--out must be another file than what is read, {str(out)!r}."),
            (force or not out.exists(), f"--out {out} exists: choose another file, or replace it with --force."),
        )
        for holds, sentence in rules:
            if not holds:
                raise UserError(sentence)
        feedback = FeedbackReading(form, parse_renames(rename or []), positive, keep_good).read("FILES", files)
        found = convert_records(feedback, to, keep_ties=keep_ties, categories=category or None, segmenter=segmenter or "sub_sentence")
        _check_categories(feedback, category or [])
        if not found.rows:
            raise UserError(f"nothing is left to write: {_in_words(found.left_out) or 'there are no records'}.")
        _write(found, out)
        print(account(feedback, found, to, out))


def account(feedback: "Feedback", found: "Converted", to: str, out: Path) -> str:
    """Returns in words what was read, written and left out."""
    from textgym.feedback.conversion import count_forms

    read = ", ".join(f"{count:,} {form}" for form, count in count_forms(feedback.records).items())
    lines = [f"Read {len(feedback) + len(feedback.bad_rows):,} rows: {read}", f"Wrote {len(found.rows):,} {_named(to)} to {out}"]
    lines += [f"Left out: {count:,} {reason}" for reason, count in found.left_out.items()]
    if feedback.bad_rows:
        lines.append(f"Bad rows: {first_bad_row(feedback)}")
    return "\n".join([*lines, *(f"Note: {note}" for note in found.notes)])


def _named(to: str) -> str:
    return {"same": "records", "segment-labels": "labels of segments"}.get(to, to)


def _in_words(left_out: dict[str, int]) -> str:
    return "; ".join(f"{count:,} {reason}" for reason, count in left_out.items())


def _check_categories(feedback: "Feedback", wanted: list[str]) -> None:
    from textgym.feedback import Marking

    there = sorted({span.category for record in feedback if isinstance(record, Marking) for span in record.spans})
    for name in wanted:
        if name not in there:
            raise UserError(f"--category must be one of those in the spans, {', '.join(there) or 'which are none'}, not {name}.")


def _write(found: "Converted", out: Path) -> None:
    """Writes the rows, whole or not at all."""
    import gzip
    import json

    lines = []
    for number, row in enumerate(found.rows):
        try:
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise UserError(
                f"record {number} of what would be written holds what JSON cannot say ({error}): mend it in the source."
            ) from error
    text = "".join(lines).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(gzip.compress(text) if out.suffix == ".gz" else text)
    partial.replace(out)
