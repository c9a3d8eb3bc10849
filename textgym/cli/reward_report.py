"""What `textgym reward` shows at its end: the numbers before and after, by category where there are some, and what to do next."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

from rich.table import Table

from textgym.agents.reward_model import RewardModel
from textgym.cli.reward import RewardSettings
from textgym.evaluation.reward_model_report import left_out_in_words
from textgym.prompts import read_prompts

PER_TOKEN_FILE = "per_token_reward.py"
NONE = "-"
_PLAIN_NAME = re.compile(r"(?!(?:true|false|null)$)[A-Za-z][\w .-]*", flags=re.IGNORECASE)  # what an option of a reward reads as a text
_NUMBERS = (
    ("log_loss", "log loss (coin: 0.693)"),
    ("expected_calibration_error", "calibration error"),
    ("loss", "loss"),
    ("reward_mean", "reward mean, not normalised"),
    ("reward_std", "reward std"),
)


def numbers_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Returns a report before and after training, beside what the lengths alone say; it fits 80 columns."""
    rule = {True: "longer wins", False: "shorter wins", None: "length alone"}[after["longer_wins"]]
    table = Table(title=_title(after), caption=_caption(after))
    for column in ("", "before", "after", rule):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    table.add_row("accuracy", _interval(before["accuracy"]), _interval(after["accuracy"]), _interval(after["length_accuracy"]))
    for name, label in _NUMBERS:
        table.add_row(label, _number(before[name]), _number(after[name]), "")
    return table


def _title(after: dict[str, Any]) -> str:
    left_out = left_out_in_words(after.get("left_out", {})).replace("`max_tokens`", "max_tokens")
    more = f" (left out: {left_out})" if left_out else ""
    return f"On {after['num_decisions']:,} decisions of {after['num_records']:,} held-out records{more}"


def _caption(after: dict[str, Any]) -> str | None:
    """Says why there is no number, where there is none."""
    if after["accuracy"]["mean"] is None:
        return "- : this held-out feedback decides nothing: all of it is ties"
    if after["longer_wins"] is None:
        return "- : the feedback that was trained on decides nothing, so that no length can be the better one"
    return None


def category_table(before: dict[str, Any], after: dict[str, Any]) -> Table | None:
    """Returns the numbers of each category of markings; None where there are none."""
    categories = after.get("by_category") or {}
    if not categories:
        return None
    table = Table(title="Segments by category", caption="clean: the accuracy of calling every segment clean; AUC: 0.5 knows nothing")
    for column in ("category", "segments", "clean", "accuracy before", "after", "AUC before", "after"):
        table.add_column(column, justify="left" if column == "category" else "right", overflow="fold")
    for name, one in categories.items():
        old = (before.get("by_category") or {}).get(name, {})
        accuracies = (_number((numbers.get("accuracy") or {}).get("mean"), 3) for numbers in (old, one))
        areas = (_number(numbers.get("area_under_roc"), 3) for numbers in (old, one))
        table.add_row(name, f"{one['num_decisions']:,}", _number(one["clean"], 3), *accuracies, *areas)
    return table


def _interval(estimate: dict[str, Any]) -> str:
    """Returns a mean with its interval below it: beside it four columns would not fit."""
    if estimate["mean"] is None:
        return NONE
    return f"{estimate['mean']:.3f}\n[{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _number(value: float | None, digits: int = 4) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.{digits}f}"


# -- what to do next -----------------------------------------------------------------------------------------------------------------


def next_commands(model: RewardModel, folder: Path, settings: RewardSettings) -> list[str]:
    """Returns the commands that train a policy by the reward that was learned: of several outputs one for each of them."""
    start = "textgym train rloo"
    if settings.model is not None:
        start += f" --model {shlex.quote(settings.model)} --prompts {shlex.quote(_prompts(settings))}"
    if model.per_token:
        files = [f"{folder.parent / PER_TOKEN_FILE}:{output_name(place)}" for place in range(model.num_outputs)]
        return [f"{start} --reward {shlex.quote(one)}" for one in files]
    if model.num_outputs == 1:
        return [f"{start} --reward {shlex.quote(str(folder))}"]
    path = str(folder).replace("&", "%26")
    labels = [name if _PLAIN_NAME.fullmatch(name) else str(place) for place, name in enumerate(model.output_names)]
    return [f"{start} --reward {shlex.quote(f'classifier?model={path}&label={label}')}" for label in labels]


def _prompts(settings: RewardSettings) -> str:
    """Returns the feedback's own file where its rows have prompts, else a name to be replaced."""
    try:
        path = (settings.feedback or ("",))[0]
        read_prompts(path)
    except (ValueError, OSError):
        return "PROMPTS.jsonl"
    return path


def output_name(place: int) -> str:
    """Returns what the output `place` of a per-token model is called in the file that gives it."""
    return "reward" if place == 0 else f"reward_{place}"


def write_per_token_rewards(model: RewardModel, path: Path) -> None:
    """Writes the file by which `--reward` finds a per-token model: `FILE:reward`, of several outputs `FILE:reward_1`, ... too.

    A sequence classifier of transformers, which the folder of the model is, has one score per text.
    """
    lines = [
        '"""The reward of every token, for `textgym train ... --reward`, from the model beside this file."""',
        "",
        "from pathlib import Path",
        "",
        "from textgym.agents import RewardModel",
        "",
        'model = RewardModel.from_pretrained(Path(__file__).parent / "model")',
        *(f"{output_name(place)} = model.output({place})  # {name}" for place, name in enumerate(model.output_names)),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
