"""What `textgym label` does: makes or reads pairs, leaves out those that have a label, asks, and appends each answer at once."""

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import track
from rich.text import Text as RichText

from textgym.cli.errors import EXIT_INTERRUPTED, UserError, one_line
from textgym.cli.run_folder import RunFolder
from textgym.cli.workplace import load_judge_option, load_policy, load_reward_option, quiet_transformers, read_prompt_rows
from textgym.errors import FeedbackError
from textgym.feedback import Comment, Comparison, SyntheticAnnotator, judge_pairs, read_feedback, write_feedback
from textgym.feedback.judging import comparison
from textgym.feedback.records import Text
from textgym.feedback.rows import parse_answers
from textgym.rows import iterate_file

AT_ONCE = 64  # pairs that a reward scores in one call, prompts that a model completes in one
_OWN_COLUMNS = {
    "prompt",
    "completion",
    "completions",
    "chosen",
    "rejected",
    "preference",
    "margin",
    "rank",
    "ranks",
    "comparisons",
    "comment",
}
_ANSWERS = {"a": "a", "b": "b", "t": "tie", "tie": "tie", "s": "skip", "skip": "skip", "c": "comment", "comment": "comment"}
_ANSWERS |= {"q": "quit", "quit": "quit"}
_PREFERENCES = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Sampling:
    """How texts are generated; see `textgym label --help`."""

    max_new_tokens: int
    temperature: float
    seed: int
    device: str


@dataclass(frozen=True)
class Pair:
    """Two texts to be compared.

    Attributes:
        prompt: x.
        first: a text.
        second: another.
        columns: what else stood in its row.
    """

    prompt: Text
    first: Text
    second: Text
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells it from other pairs, whatever the order of its texts."""
        return _key(self.prompt, self.first, self.second)


def _key(prompt: Text, *texts: Text) -> str:
    return json.dumps([prompt, *sorted(json.dumps(text, sort_keys=True) for text in texts)], sort_keys=True)


# -- where pairs come from ----------------------------------------------------------------------------------------------------------------


def read_pairs(path: Path) -> list[Pair]:
    """Reads a file of prompts with two or more answers: all pairs of each row, but those of equal texts, each pair once."""
    found: dict[str, Pair] = {}
    same = again = 0
    for line in iterate_file(path, "pairs"):
        where = f"{line.unit} {line.number} of {str(path)!r}"
        if line.problem is not None:
            raise UserError(line.problem)
        if not isinstance(line.row, dict):
            raise UserError(f"{where} must be an object with the columns prompt and completions.")
        prompt, answers = parse_answers(line.row, where)
        columns = {name: value for name, value in line.row.items() if name not in _OWN_COLUMNS | {"weight", "form", "generated"}}
        for first, second in combinations(answers, 2):
            pair = Pair(prompt, first, second, columns)
            same += first == second
            again += first != second and pair.key in found
            if first != second:
                found.setdefault(pair.key, pair)
    if not found:
        raise UserError(f"{str(path)!r} holds no two different texts that could be compared.")
    for count, reason in ((same, "pairs of equal texts"), (again, "pairs that are there already")):
        if count:
            Console(stderr=True).print(f"textgym: left out: {count:,} {reason}", highlight=False, markup=False, soft_wrap=True)
    return list(found.values())


def generated_pairs(out: Path, models: Sequence[str], prompts: Path | None, sampling: Sampling) -> list[Pair]:
    """Samples two texts of each prompt, of one model or one of each; they are kept beside `out`, for the next time.

    Raises:
        UserError: a model cannot be loaded, or what is kept there was generated otherwise.
    """
    kept = out.with_name(f"{out.stem}.pairs.jsonl")
    settings = {"models": list(models), "prompts": None if prompts is None else str(prompts), **sampling.__dict__}
    settings.pop("device")
    if kept.exists():
        made = json.loads(kept.read_text(encoding="utf-8").splitlines()[0]).get("generated")
        if made != settings:
            raise UserError(f"{str(kept)!r} holds pairs that were generated with other options: give them again, or another --out.")
        return read_pairs(kept)
    rows = _generate(models, prompts, sampling)
    rows[0]["generated"] = settings
    partial = kept.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(kept)
    return read_pairs(kept)


def _generate(models: Sequence[str], prompts: Path | None, sampling: Sampling) -> list[dict[str, Any]]:
    from textgym.bundled import bundled_model_path, bundled_prompts

    if sampling.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {sampling.max_new_tokens}.")
    if not 0 < sampling.temperature < math.inf:
        raise UserError(f"--temperature must be above 0, not {sampling.temperature}: two texts of a prompt would be the same.")
    if models and prompts is None:
        raise UserError("--prompts must be given with --model: the bundled ones were made for the bundled model.")
    quiet_transformers()
    rows: list[dict[str, Any]] = list(bundled_prompts("train")) if prompts is None else read_prompt_rows("--prompts", str(prompts))
    policies = [load_policy("--model", _model(path), sampling.device) for path in models or [str(bundled_model_path())]]
    texts: list[list[str]] = [[] for _ in rows]
    for number, policy in enumerate(policies):
        policy.seed(sampling.seed * 1000 + number)
        for start in _progress(range(0, len(rows), AT_ONCE), f"generating ({number + 1} of {len(policies)})"):
            part = rows[start : start + AT_ONCE]
            sampled = policy.generate(
                part, max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, num_generations=2 // len(policies)
            )
            for place, text in enumerate(sampled.texts):
                texts[start + place // (2 // len(policies))].append(text)
    pairs: list[dict[str, Any]] = []
    for row, answers in zip(rows, texts, strict=True):
        others = {name: value for name, value in row.items() if name not in _OWN_COLUMNS}
        pairs.append({"prompt": row["prompt"], "completions": answers, **others})
    return pairs


def _model(given: str) -> str:
    run = RunFolder.of_model(given)
    return given if run is None else str(run.model)


# -- what is left to do -------------------------------------------------------------------------------------------------------------------


def not_labelled(pairs: Sequence[Pair], out: Path) -> list[Pair]:
    """Returns the pairs that have no label in `out` yet; a comment alone is none."""
    if not out.exists() or not out.read_bytes().strip():
        return list(pairs)
    try:
        feedback = read_feedback(out, on_bad_row="keep_good")
    except FeedbackError as error:
        raise UserError(f"--out {out} holds something else than labels ({one_line(error.feedback.bad_rows[0].reason)}).") from error
    for bad in feedback.bad_rows:
        Console(stderr=True).print(f"textgym: passed over: {escape(bad.reason)}", highlight=False, soft_wrap=True)
    if not out.read_bytes().endswith(b"\n"):  # a line that was cut off; the next one must not be lost with it
        with out.open("ab") as file:
            file.write(b"\n")
    done = {_key(one.prompt, one.chosen, one.rejected) for one in feedback.records if isinstance(one, Comparison)}
    return [pair for pair in pairs if pair.key not in done]


# -- who labels ---------------------------------------------------------------------------------------------------------------------------


def finish(labels: Iterator[int], asked: int, out: Path) -> None:
    """Draws labels until there are no more, or somebody stops it, and says how many there are.

    Args:
        labels: yields how many pairs are labelled so far, which are written already.
        asked: how many pairs there are.
        out: where the labels go.

    Raises:
        typer.Exit: Ctrl-C was pressed.
    """
    done, interrupted = 0, False
    try:
        for done in labels:  # noqa: B007  (the last one is said below)
            pass
    except EOFError:
        Console().print()
    except KeyboardInterrupt:
        Console().print()
        interrupted = True
    left = f"; {asked - done} left: the same command goes on with them" if asked > done else ""
    what = f"{done} of {asked} pairs labelled" if asked else "Nothing is left to label"
    Console().print(f"{what}, in {out}{left}.", highlight=False, markup=False, soft_wrap=True)
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


def load_tokenizer_option(given: str | None, models: Sequence[str]) -> Any:
    """Returns the tokenizer of `--tokenizer`, else of the first `--model`, else of the bundled model."""
    from textgym.bundled import bundled_model_path
    from textgym.tokenizers import load_tokenizer

    path = given or (_model(models[0]) if models else str(bundled_model_path()))
    try:
        return load_tokenizer(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{'--tokenizer' if given else '--model'}: {one_line(error)}") from error


def label_by_reward(pairs: Sequence[Pair], out: Path, spec: str, tokenizer: Any, temperature: float, seed: int) -> Iterator[int]:
    """Labels pairs by a reward, many at once; `tokenizer` and `temperature` as of `SyntheticAnnotator`."""
    annotator = SyntheticAnnotator(load_reward_option("--by", spec), tokenizer=tokenizer, temperature=temperature)
    for start in _progress(range(0, len(pairs), AT_ONCE), "labelling"):
        part = pairs[start : start + AT_ONCE]
        prompts, first, second = ([getattr(pair, side) for pair in part] for side in ("prompt", "first", "second"))
        names = dict.fromkeys(name for pair in part for name in pair.columns)
        columns: dict[str, Any] = {name: [pair.columns.get(name) for pair in part] for name in names}
        chances = annotator.probabilities(prompts, first, second, **columns).tolist()
        found = [
            comparison(pair.prompt, pair.first, pair.second, _drawn(chance, f"{seed} {pair.key}"))
            for pair, chance in zip(part, chances, strict=True)
        ]
        _append(out, part, found, by=spec)
        yield start + len(part)


def _drawn(probability: float, key: str) -> float:
    """Returns 1 with a probability, else 0; a tie stays one. The draw is the pair's own, whichever pairs were labelled before."""
    return 0.5 if probability == 0.5 else float(random.Random(key).random() < probability)


def label_by_judge(pairs: Sequence[Pair], out: Path, spec: str) -> Iterator[int]:
    """Labels pairs by a function, one after the other."""
    judge = load_judge_option("--by-judge", spec)
    for number, pair in enumerate(_progress(pairs, "labelling"), start=1):
        try:
            found = judge_pairs(judge, [pair.prompt], [pair.first], [pair.second])
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise UserError(
                f"--by-judge {spec}, pair {number} of {len(pairs)}: {kind}{one_line(str(error))} (the labels before it are in {out}; the "
                "same command goes on)"
            ) from error
        _append(out, [pair], found, by=spec)
        yield number


def label_by_hand(pairs: Sequence[Pair], out: Path, seed: int) -> Iterator[int]:
    """Shows pairs and asks which text is better; which one stands first is drawn by `seed` for each pair."""
    console, done = Console(), 0
    for number, pair in enumerate(pairs, start=1):
        turned = random.Random(f"{seed} {pair.key}").random() < 0.5
        first, second = (pair.second, pair.first) if turned else (pair.first, pair.second)
        _show(console, f"{number} of {len(pairs)}", pair.prompt, first, second)
        answer = _ask(console, out, pair, first, second)
        if answer == "quit":
            return
        if answer != "skip":
            record = comparison(pair.prompt, first, second, _PREFERENCES[answer])
            _append(out, [pair], [record], by="person", shown_first="chosen" if record.chosen == first else "rejected")
            done += 1
            yield done


def _append(out: Path, pairs: Sequence[Pair], found: Sequence[Comparison], **how: str) -> None:
    records = [replace(record, columns={**pair.columns, **how}) for pair, record in zip(pairs, found, strict=True)]
    write_feedback(out, records, append=True)


def _ask(console: Console, out: Path, pair: Pair, first: Text, second: Text) -> str:
    """Returns "a", "b", "tie", "skip" or "quit"; comments are written down on the way."""
    while True:
        given = console.input("[bold]a[/], [bold]b[/], [bold]t[/]ie, [bold]s[/]kip, [bold]c[/]omment or [bold]q[/]uit: ").strip().lower()
        answer = _ANSWERS.get(given)
        if answer is None:
            console.print(f"{given!r} is none of these.", markup=False, highlight=False)
        elif answer != "comment":
            return answer
        else:
            words = console.input("comment: ").strip()
            if words:
                columns = {**pair.columns, "by": "person"}
                write_feedback(out, [Comment(pair.prompt, (first, second), words, columns=columns)], append=True)


def _show(console: Console, title: str, prompt: Text, first: Text, second: Text) -> None:
    console.print()
    console.print(Panel(RichText(_readable(prompt)), title=title, title_align="left"))
    for name, text in (("a", first), ("b", second)):
        console.print(Panel(RichText(_readable(text).strip("\n")), title=name, title_align="left"))


def _readable(text: Text) -> str:
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0]["role"] == "assistant":
        return str(text[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)


def _progress(items: Sequence[Any] | range, what: str) -> Iterable[Any]:
    return track(items, what, console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal)
