"""Runs the metric rewards on texts whose scores are known, and prints how many agree and the largest deviation.

    python benchmarks/metric_vectors.py FOLDER

FOLDER holds any of the files of `READERS` (their source is in the folder's SOURCE.md): published test cases of sacrebleu and of
rouge-score, and scores of ordinary texts. A score agrees if it is the given one to the digits to which that was rounded.

A reward scores one completion. Published scores of several sentences together come from the corpus score of the metric object inside the
reward, in rows of their own: they show that the options reach it. All figures go from 0 to 100.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from textgym.rewards import BleuReward, ChrfReward, RougeReward

Row: TypeAlias = dict[str, Any]
Check: TypeAlias = tuple[str, float, float, float]  # what, the score here, the given one, how far they may be apart

BLEU_OPTIONS = {"smooth_method": "smoothing"}  # sacrebleu's name, and the reward's where it is another


def one_or_all(reward: Any, hypotheses: list[str], streams: list[list[str]]) -> tuple[str, float]:
    """The score of one text by the reward, of several by its metric object."""
    if len(hypotheses) == 1:
        return "reward", 100 * reward(completions=hypotheses, references=[[stream[0] for stream in streams]])[0]
    return "corpus score", reward._metric.corpus_score(hypotheses, streams).score


def bleu_published(rows: list[Row]) -> Iterator[Check]:
    for row in rows:
        options = {BLEU_OPTIONS.get(name, name): value for name, value in row["options"].items()}
        options.setdefault("effective_order", row["metric"] == "sentence_bleu")
        what, score = one_or_all(BleuReward(**options), row["hypotheses"], row["reference_streams"])
        yield what, score, row["score"], 10.0 ** -row.get("decimals", 6)  # as close as sacrebleu's tests want it


def chrf_published(rows: list[Row]) -> Iterator[Check]:
    for row in rows:
        what, score = one_or_all(ChrfReward(**row["options"]), row["hypotheses"], [row["references"]])
        yield what, score, row["score"], 0.5e-4


def rouge_published(rows: list[Row]) -> Iterator[Check]:
    for row in rows:
        for figure in ("precision", "recall", "fmeasure"):
            reward = RougeReward(row["type"], score=figure, stemmer=row["stemmer"])
            (score,) = reward(completions=[row["prediction"]], reference=[row["reference"]])
            yield row["type"], 100 * score, 100 * row[figure], 100 * 0.6e-5


def rouge_texts(rows: list[Row]) -> Iterator[Check]:
    texts = {"completions": [row["prediction"] for row in rows], "reference": [row["reference"] for row in rows]}
    for key in (key for key in rows[0] if key.startswith("rouge")):
        kind, _, stemmed = key.partition("_")
        for place, figure in enumerate(("precision", "recall", "fmeasure")):
            scores = RougeReward(kind, score=figure, stemmer=bool(stemmed))(**texts)
            yield from ((key, 100 * score, 100 * row[key][place], 100 * 0.6e-6) for score, row in zip(scores, rows, strict=True))


def sentence_bleu(rows: list[Row]) -> Iterator[Check]:
    texts = {"completions": [row["hypothesis"] for row in rows], "references": [row.get("references") or row["reference"] for row in rows]}
    for key, reward in (("sentence_bleu_13a_exp", BleuReward()), ("chrf2", ChrfReward())):
        if key in rows[0]:
            yield from ((key, 100 * score, row[key], 0.6e-6) for score, row in zip(reward(**texts), rows, strict=True))


def corpus_bleu(data: Row) -> Iterator[Check]:
    metrics = {
        "bleu_tokenize_none": BleuReward(tokenize="none", effective_order=False),
        "bleu_13a": BleuReward(effective_order=False),
        "chrf2": ChrfReward(),
    }
    for given in data["scores"]:
        for key, reward in metrics.items():
            _, score = one_or_all(reward, data["systems"][given["system"]], [data["references"]])
            yield f"corpus score {key}", score, given[key], 0.6e-6


READERS: dict[str, Callable[[Any], Iterator[Check]]] = {
    "bleu_published.jsonl": bleu_published,
    "chrf_published.jsonl": chrf_published,
    "rouge_published.jsonl": rouge_published,
    "sentence_bleu_de.jsonl": sentence_bleu,
    "sentence_bleu_en.jsonl": sentence_bleu,
    "rouge_en.jsonl": rouge_texts,
    "corpus_bleu_de.json": corpus_bleu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the files of scores")
    folder = parser.parse_args().folder
    found = [name for name in READERS if (folder / name).is_file()]
    if not found:
        raise SystemExit(f"{folder} holds none of {', '.join(READERS)}.")
    print(f"{'file':24} {'score':28} {'agree':>11}  largest deviation (of 100)")
    wrong = 0
    for name in found:
        text = (folder / name).read_text(encoding="utf-8")
        data = [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)
        checks: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for what, score, given, allowed in READERS[name](data):
            checks[what].append((abs(score - given), allowed))
        for what, pairs in checks.items():
            agreeing = sum(deviation <= allowed for deviation, allowed in pairs)
            wrong += len(pairs) - agreeing
            print(f"{name:24} {what:28} {f'{agreeing}/{len(pairs)}':>11}  {max(deviation for deviation, _ in pairs):.2g}")
    raise SystemExit(f"{wrong} scores do not agree." if wrong else 0)


if __name__ == "__main__":
    main()
