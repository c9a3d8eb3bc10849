"""`textgym label`: which of two texts is better? A person says it, or a reward, or a judge."""

from pathlib import Path
from typing import Annotated

import typer

from textgym.cli.errors import UserError, one_sentence_errors
from textgym.cli.options import Device


def label(
    pairs: Annotated[
        Path | None,
        typer.Argument(
            help="What to label: .jsonl or .jsonl.gz with prompt and two or more completions (all pairs of them), or chosen and rejected.",
            show_default="pairs that --model generates",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Where labels go, a line at once: .jsonl. What is labelled there already is not asked again.")
    ] = Path("labels.jsonl"),
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or id of the model that generates pairs, or a run folder; given twice, one text of each pair comes from either.",
            show_default="bundled",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="What the models complete: .jsonl or .jsonl.gz with a column prompt.", show_default="bundled")
    ] = None,
    num_pairs: Annotated[int | None, typer.Option(help="Label at most this many pairs, the first ones.", show_default="all")] = None,
    by: Annotated[
        str | None,
        typer.Option(help="A reward labels instead of a person, in any form of textgym train --reward."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or id of a model whose tokens --by is given, where it reads tokens, as length does.",
            show_default="the first --model, else the bundled model",
        ),
    ] = None,
    annotator_temperature: Annotated[
        float, typer.Option(help="Of --by, in reward: the better text wins with probability σ(difference / this); 0: always.")
    ] = 0.0,
    by_judge: Annotated[
        str | None,
        typer.Option(
            help="A function labels instead of a person, as module:function or file.py:function: judge(prompt, first, second) returns "
            "'first', 'second', 'tie' or the probability of 'first'. It is asked in both orders."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated text, in tokens.")] = 24,
    temperature: Annotated[float, typer.Option(help="Of sampling the texts.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the generated texts, of which text stands first, and of --by.")] = 0,
    device: Device = "auto",
) -> None:
    """Say which of two texts is better, and make feedback of it that reward models and DPO learn from.

    Shows a prompt and two texts and asks: a, b, tie, skip, comment, or quit. Every answer is appended to --out at once, so nothing is lost
    by quitting; the same command goes on with what is not labelled yet. A comment is kept as a line of its own, which whatever learns from
    the file passes over and counts. Without options it shows pairs of the bundled model.
    """
    with one_sentence_errors():
        if tokenizer is not None and by is None:
            raise UserError("--tokenizer belongs to --by: give a reward that labels.")
        _check(pairs, out, model, prompts, num_pairs, by, by_judge, annotator_temperature)
        from textgym.cli import labelling

        if pairs is not None:
            found = labelling.read_pairs(pairs)
        else:
            sampling = labelling.Sampling(max_new_tokens, temperature, seed, device)
            found = labelling.generated_pairs(out, model or [], prompts, sampling)
        left = labelling.not_labelled(found[:num_pairs], out)
        if by is not None:
            tokens_of = labelling.load_tokenizer_option(tokenizer, model or [])
            labels = labelling.label_by_reward(left, out, by, tokens_of, annotator_temperature, seed)
        elif by_judge is not None:
            labels = labelling.label_by_judge(left, out, by_judge)
        else:
            labels = labelling.label_by_hand(left, out, seed)
        labelling.finish(labels, len(left), out)


def _check(
    pairs: Path | None,
    out: Path,
    model: list[str] | None,
    prompts: Path | None,
    num_pairs: int | None,
    by: str | None,
    by_judge: str | None,
    annotator_temperature: float,
) -> None:
    rules = (
        (out.suffix == ".jsonl", f"--out must end in .jsonl, not {out.name!r}."),
        (by is None or by_judge is None, "--by and --by-judge cannot be given together: one of them labels."),
        (by is not None or annotator_temperature == 0, "--annotator-temperature belongs to --by: give a reward that labels."),
        (0 <= annotator_temperature < float("inf"), f"--annotator-temperature must be 0 or above, not {annotator_temperature}."),
        (pairs is None or not (model or prompts), "a file of pairs cannot be given with --model or --prompts: these generate pairs."),
        (len(model or []) <= 2, f"--model can be given once or twice, not {len(model or [])} times: a pair has two texts."),
        (num_pairs is None or num_pairs >= 1, f"--num-pairs must be at least 1, not {num_pairs}."),
        (pairs is None or pairs.resolve() != out.resolve(), f"--out must be another file than what is labelled, {str(out)!r}."),
    )
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)
