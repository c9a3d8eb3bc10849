"""What `textgym reward` learns from, measures on and normalises on: read, split by prompt, and counted."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from textgym.agents.common.feedback_sets import FeedbackSet
from textgym.agents.reward_model_trainer import RewardModelTrainer
from textgym.bundled import bundled_model_path
from textgym.cli import default_data
from textgym.cli.errors import UserError, one_line
from textgym.cli.feedback_files import FeedbackReading, first_bad_row
from textgym.cli.reward import RewardSettings
from textgym.cli.workplace import load_policy
from textgym.evaluation.reward_model_report import left_out_in_words
from textgym.feedback import Comparison, Judgements, Label, Marking, Ranking, Record, SegmentPair
from textgym.prompts import PromptText
from textgym.rows import FILES, read_rows

MAX_HELD_OUT = 500  # records; every measurement reads them all
MAX_NORMALISED = 2000  # texts that the mean is taken over
MAX_NEW_TOKENS = 24  # of the bundled model's texts
FEWEST_PROMPTS = 10  # to hold out whole prompts
ENCODED_AT_ONCE = 256  # texts
Records = list[Record]
Texts = list[tuple[PromptText, PromptText]]


@dataclass(frozen=True)
class Parts:
    """The records to train on and those that are held out, as they were read.

    Attributes:
        train: to learn from.
        held_out: to measure on.
        bad_rows: rows of the files that are no feedback, with `--keep-good`.
        of_file: whether the held-out records come from a file of their own.
    """

    train: Records
    held_out: Records
    bad_rows: int = 0
    of_file: bool = False


@dataclass(frozen=True)
class NormalisationTexts:
    """The texts on which the mean reward is made 0.

    Attributes:
        texts: prompts and completions; none for no normalisation.
        source: what they are, in words.
        left_out: texts of the source that are too long to be read.
    """

    texts: Texts
    source: str = ""
    left_out: int = 0


def load_feedback(settings: RewardSettings) -> Parts:
    """Returns the feedback to train on and what is held out."""
    if settings.feedback is None:
        policy = load_policy("--model", str(bundled_model_path()), settings.device)
        return Parts(*split(list(default_data.comparisons(policy, settings.seed, MAX_NEW_TOKENS)), settings.seed))
    reading = FeedbackReading(settings.form, settings.rename, settings.positive, settings.keep_good)
    found = reading.read("--feedback", settings.feedback)
    bad_rows = _say_bad_rows("--feedback", found)
    if settings.held_out is None:
        return Parts(*split(found.records, settings.seed), bad_rows)
    held_out = reading.read("--held-out", settings.held_out)
    return Parts(found.records, held_out.records, bad_rows + _say_bad_rows("--held-out", held_out), of_file=True)


def _say_bad_rows(name: str, feedback: Any) -> int:
    if feedback.bad_rows:
        print(f"textgym: {name}: {first_bad_row(feedback)}")
    return len(feedback.bad_rows)


def split(records: Records, seed: int) -> tuple[Records, Records]:
    """Returns the records to train on and those that are held out: all of a tenth of the prompts, at most `MAX_HELD_OUT` records.

    Where there are hardly any prompts, as of labelled texts, single records are held out.
    """
    groups: dict[str, Records] = {}
    for number, record in enumerate(records):
        groups.setdefault(prompt_of(record) or f"record {number}", []).append(record)
    if len(groups) < FEWEST_PROMPTS:
        groups = {f"record {number}": [record] for number, record in enumerate(records)}
    names = list(groups)
    random.Random(seed).shuffle(names)
    held_out: Records = []
    chosen = set()
    for name in names[: max(1, len(names) // 10)]:
        if held_out and len(held_out) + len(groups[name]) > MAX_HELD_OUT:
            break
        held_out += groups[name]
        chosen.add(name)
    train = [record for name in groups if name not in chosen for record in groups[name]]
    if not train:
        raise UserError("--feedback holds one record, so none can be held out: give --held-out too.")
    return train, held_out


def prompt_of(record: Record) -> str:
    """Returns what tells the prompt of a record from others; "" where it has none."""
    if isinstance(record, SegmentPair):
        return repr(record.first.prompt_ids)
    return repr(record.prompt) if record.prompt else ""


def texts_of(record: Record) -> Sequence[tuple[PromptText, PromptText]]:
    """Returns the texts of a record, each with its prompt; segments are none."""
    if isinstance(record, Comparison):
        return [(record.prompt, record.chosen), (record.prompt, record.rejected)]
    if isinstance(record, Ranking | Judgements):
        return [(record.prompt, completion) for completion in record.completions]
    if isinstance(record, Label | Marking):
        return [(record.prompt, record.completion)]
    return []


# -- as the model reads it -------------------------------------------------------------------------------------------------------------


def read_held_out(trainer: RewardModelTrainer, parts: Parts) -> FeedbackSet:
    """Tokenises the held-out records; where nothing of them can be read it is said of which part that is true."""
    try:
        return trainer.read(parts.held_out)
    except ValueError as error:
        which = "--held-out" if parts.of_file else f"the held-out part of --feedback, {len(parts.held_out):,} records"
        cure = "" if parts.of_file else " Or give --held-out, feedback to measure on, or another --seed, which holds out others."
        raise UserError(f"{which}: {one_line(error)}{cure}") from error


def counts(parts: Parts, train: FeedbackSet, held_out: FeedbackSet) -> dict[str, Any]:
    """Returns how many records there are on each side, and how many were left out and why, for `config.json` and `report.json`."""
    sides = {
        name: {"records": len(data), "prompts": len({entry.prompt for entry in data.entries}), "left_out": data.left_out._asdict()}
        for name, data in (("training", train), ("held_out", held_out))
    }
    return {**sides, "bad_rows": parts.bad_rows}


def counts_in_words(found: dict[str, Any], max_tokens: int | None) -> str:
    """Says `counts` in a line for each side."""
    lines = []
    for name, words in (("training", "Training on"), ("held_out", "Held out:")):
        side = found[name]
        left_out = left_out_in_words(side["left_out"]).replace("`max_tokens`", f"max_tokens={max_tokens}")
        more = f"; left out: {left_out}" if left_out else ""
        lines.append(f"{words} {_count(side['records'], 'record')} of {_count(side['prompts'], 'prompt')}{more}")
    return "\n".join(lines)


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


# -- normalisation ---------------------------------------------------------------------------------------------------------------------


def normalisation_texts(settings: RewardSettings, train: Records, trainer: RewardModelTrainer) -> NormalisationTexts:
    """Returns the texts of `--reference-texts`, else those of the feedback, at most `MAX_NORMALISED`; none with `--no-normalise`.

    Texts longer than what the model is trained on, `max_tokens`, or can read are left out.
    """
    if not settings.normalise:
        return NormalisationTexts([])
    if settings.reference_texts is None:
        source, texts = "the feedback's own texts", [text for record in train for text in texts_of(record)]
    else:
        source, texts = f"the texts of {settings.reference_texts}", _reference_texts(settings.reference_texts)
    if not texts:
        raise UserError("the feedback has no texts to normalise on, only segments: give --reference-texts, or --no-normalise.")
    limit = min((one for one in (trainer.max_tokens, trainer.reward_model.limit) if one is not None), default=None)
    drawn = random.Random(settings.seed).sample(texts, len(texts))
    found: Texts = []
    read = 0
    while len(found) < MAX_NORMALISED and read < len(drawn):
        part = drawn[read : read + ENCODED_AT_ONCE]
        pieces = trainer.reward_model.encode([prompt for prompt, _ in part], [completion for _, completion in part])
        found += [text for text, piece in zip(part, pieces, strict=True) if limit is None or len(piece.ids) <= limit]
        read += len(part)
    if not found:
        raise UserError(
            f"none of {source} is within the {limit} tokens that the reward is normalised on: give --reference-texts with shorter ones, or "
            "--no-normalise."
        )
    return NormalisationTexts(found[:MAX_NORMALISED], source, read - len(found))


def _reference_texts(path: str) -> Texts:
    try:
        rows = read_rows(path, "reference_texts", forms=f"the path of {FILES}")
    except (ValueError, OSError) as error:
        raise UserError(f"--reference-texts: {one_line(error)}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not {"prompt", "completion"} <= row.keys():
            raise UserError(f"--reference-texts: row {number} must have the columns prompt and completion.")
    return [(row["prompt"], row["completion"]) for row in rows]
