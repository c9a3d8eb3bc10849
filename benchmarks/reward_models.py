"""Reward models on real feedback of every form: held-out accuracy beside bags of words and the lengths alone.

    python benchmarks/reward_models.py --data FOLDER [--model stories260k] [--sets hh_helpful ...] [--epochs 3] [--from-scratch]
        [--out result.json]

FOLDER holds hh_helpful, hh_harmless (train.jsonl.gz: prompt, chosen, rejected), finegrained_qa (pairs, rankings, spans), rt_polarity and
hate_speech. A fifth of the prompts is held out by this script, a tenth of the rest chooses the epoch. Each reward model starts from
`--model` (a small pretrained language model), with `--from-scratch` from the same architecture with random weights. Bags of words:
logistic regression on the word counts of a (whole) text, or on those of the one minus those of the other; its L2 penalty is chosen on the
same tenth.
"""

import argparse
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import torch
from stable_baselines3.common.utils import LinearSchedule
from transformers import AutoConfig, AutoModelForCausalLM

from textgym.agents import CausalLMPolicy, HeldOut, RewardModel, RewardModelTrainer
from textgym.evaluation import Estimate, bootstrap_cluster_mean
from textgym.feedback import Comparison, Label, Marking, Ranking, Record, Span, to_comparisons
from textgym.rows import read_rows

PROMPT_CHARACTERS, ANSWER_CHARACTERS = 40, 250  # what reward models read: the end of the prompt, the beginning of the answer
WORDS, LEAST_COUNT = 5000, 3
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
LEARNING_RATE, BATCH_SIZE = 1e-3, 32
MEASUREMENTS, PATIENCE = 6, 3


def rows(path: Path) -> list[dict[str, Any]]:
    return read_rows(str(path), "rows", forms="a file")


def pairs(path: Path, prompt: str = "prompt") -> list[Record]:
    found = [Comparison(row[prompt], row["chosen"], row["rejected"]) for row in rows(path)]
    return [one for one in found if one.chosen[:ANSWER_CHARACTERS] != one.rejected[:ANSWER_CHARACTERS]]


def rankings(path: Path) -> list[Record]:
    found = [
        Ranking(row["question"], tuple(" " + text for text in row["completions"]), tuple(row["rank"]))
        for row in rows(path)
        if row["rank"] is not None
    ]
    return [one for one in found if len(set(one.ranks)) > 1]


def spans(path: Path) -> list[Record]:
    return [
        Marking(row["question"] + " ", row["completion"], tuple(Span(one["type"], one["start"], one["end"]) for one in row["errors"]))
        for row in rows(path)
    ]


def labels(path: Path, good: Callable[[Any], bool]) -> list[Record]:
    return [Label("", row["text"], good(row["label"])) for row in rows(path)]


def shortened(record: Record) -> Record:
    """What a reward model reads of a record: all of it would take hours on a processor."""
    prompt = str(record.prompt)[-PROMPT_CHARACTERS:]  # type: ignore[union-attr]
    if isinstance(record, Comparison):
        return Comparison(prompt, record.chosen[:ANSWER_CHARACTERS], record.rejected[:ANSWER_CHARACTERS])
    if isinstance(record, Ranking):
        return Ranking(prompt, tuple(text[:ANSWER_CHARACTERS] for text in record.completions), record.ranks)
    if isinstance(record, Marking):
        text = record.completion[:ANSWER_CHARACTERS]
        inside = [span for span in record.spans if span.start < len(text)]
        return Marking(prompt, text, tuple(Span(span.category, span.start, min(span.end, len(text))) for span in inside))
    assert isinstance(record, Label)
    return Label("", record.completion[:ANSWER_CHARACTERS], record.good)


SETS: dict[str, Callable[[Path], list[Record]]] = {
    "hh_helpful": lambda data: pairs(data / "hh_helpful/train.jsonl.gz"),
    "hh_harmless": lambda data: pairs(data / "hh_harmless/train.jsonl.gz"),
    "finegrained_qa pairs": lambda data: pairs(data / "finegrained_qa/pairs.jsonl.gz", "question"),
    "finegrained_qa rankings": lambda data: rankings(data / "finegrained_qa/rankings.jsonl.gz"),
    "finegrained_qa spans": lambda data: spans(data / "finegrained_qa/spans.jsonl.gz"),
    "rt_polarity": lambda data: labels(data / "rt_polarity/train.jsonl.gz", lambda label: label == 1),
    "hate_speech forum": lambda data: labels(data / "hate_speech/forum_train.jsonl", lambda label: label == "noHate"),
    "hate_speech tweets": lambda data: labels(data / "hate_speech/tweets_train.jsonl", lambda label: label == "neither"),
}


def split(records: list[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Returns the records of most prompts, and those of a share of them; a text without a prompt is one of its own."""
    groups: dict[Any, list[Record]] = {}
    for number, record in enumerate(records):
        groups.setdefault(record.prompt or number, []).append(record)  # type: ignore[union-attr]
    names = list(groups)
    random.Random(seed).shuffle(names)
    count = max(1, round(share * len(names)))
    rest, held_out = ([record for name in part for record in groups[name]] for part in (names[count:], names[:count]))
    return rest, held_out


# -- bags of words -------------------------------------------------------------------------------------------------------


class Decisions(NamedTuple):
    """Word counts (of one text, or the difference of two), outcomes, prompts."""

    counts: list[Counter[str]]
    outcomes: np.ndarray
    prompts: list[str]


def bag(text: str) -> Counter[str]:
    return Counter(re.findall(r"[a-z']+|[!?]", text.lower()))


def decisions(records: list[Record]) -> Decisions:
    counts, outcomes, prompts = [], [], []
    for record in records:
        if isinstance(record, Label):
            counts.append(bag(record.completion))
            outcomes.append(float(record.good))
            prompts.append(record.completion)
        else:
            for number, pair in enumerate(to_comparisons([record])):
                # In turns, so that half of the outcomes are 1: a constant is no help.
                first, second = (pair.chosen, pair.rejected) if number % 2 else (pair.rejected, pair.chosen)
                difference = bag(first)
                difference.subtract(bag(second))
                counts.append(difference)
                outcomes.append(float(number % 2))
                prompts.append(str(pair.prompt))
    return Decisions(counts, np.array(outcomes), prompts)


def table(data: Decisions, words: dict[str, int], constant: bool) -> torch.Tensor:
    """The counts as a sparse table, (N, W + 1), with a column of ones (or zeros) at its end."""
    places, values = [], []
    for row, counts in enumerate(data.counts):
        found = {words[word]: max(-3, min(3, count)) for word, count in counts.items() if word in words}
        for column, count in {**found, len(words): int(constant)}.items():
            places.append((row, column))
            values.append(float(count))
    return torch.sparse_coo_tensor(torch.tensor(places).T, values, (len(data.counts), len(words) + 1), check_invariants=False).coalesce()


def logistic(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    weights = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (
            torch.nn.functional.binary_cross_entropy_with_logits(torch.sparse.mm(x, weights[:, None])[:, 0], y, reduction="sum")
            + penalty / 2 * weights.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def bag_of_words(train: list[Record], valid: list[Record], test: list[Record]) -> Estimate:
    """Returns the accuracy on `test` of the penalty that is best on `valid`."""
    fitted, chosen, held_out = (decisions(part) for part in (train, valid, test))
    common = Counter(word for counts in fitted.counts for word in counts)
    words = {word: place for place, (word, count) in enumerate(common.most_common(WORDS)) if count >= LEAST_COUNT}
    constant = isinstance(train[0], Label)
    x, x_valid, x_test = (table(part, words, constant) for part in (fitted, chosen, held_out))
    y = torch.tensor(fitted.outcomes, dtype=torch.float32)

    def right(weights: torch.Tensor, x: torch.Tensor, part: Decisions) -> np.ndarray:
        logits = torch.sparse.mm(x, weights[:, None])[:, 0].numpy()
        return np.where(logits == 0, 0.5, (logits > 0) == part.outcomes)

    models = [logistic(x, y, penalty) for penalty in PENALTIES]
    best = max(models, key=lambda weights: right(weights, x_valid, chosen).mean())
    return bootstrap_cluster_mean(right(best, x_test, held_out), held_out.prompts)


def majority(test: list[Record]) -> float | None:
    """Returns what always saying the same is worth, where that means something."""
    if isinstance(test[0], Label):
        share = float(np.mean([record.good for record in test]))  # type: ignore[union-attr]
        return max(share, 1 - share)
    return None


# -- reward models -------------------------------------------------------------------------------------------------------


def start(model: str, pretrained: bool, records: Sequence[Record], seed: int) -> RewardModel:
    policy = CausalLMPolicy.from_pretrained(model, device="cpu")
    if not pretrained:
        torch.manual_seed(seed)
        policy = CausalLMPolicy(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)), policy.tokenizer, device="cpu")
    categories = sorted({span.category for record in records if isinstance(record, Marking) for span in record.spans})
    return RewardModel.from_policy(policy, output_names=categories or None, seed=seed)


def trained(options: argparse.Namespace, train: list[Record], valid: list[Record], test: list[Record]) -> dict[str, Any]:
    began = time.perf_counter()
    model = start(options.model, not options.from_scratch, [*train, *valid, *test], options.seed)
    steps = options.epochs * -(-len(train) // BATCH_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        evaluation = HeldOut(valid, interval=max(1, steps // MEASUREMENTS), patience=PATIENCE, best_model_path=folder)
        settings = {"n_epochs": options.epochs, "batch_size": BATCH_SIZE, "seed": options.seed, "max_tokens": 400}
        trainer = RewardModelTrainer(model, train, LinearSchedule(LEARNING_RATE, 0.0, 1.0), evaluation=evaluation, **settings)
        trainer.learn()
        best = RewardModel.from_pretrained(folder, device="cpu")
    report = RewardModelTrainer(best, train, max_tokens=400).evaluate(test)
    said = report.to_dict()
    said.update(seconds=round(time.perf_counter() - began), epochs_run=trainer.num_timesteps / int(trainer.examples.num_tokens.sum()))
    if isinstance(test[0], Marking):
        said["majority"] = clean_share(best, test)
    return said


def clean_share(model: RewardModel, test: list[Record]) -> float:
    """Returns the share of segments and categories that nothing was marked in."""
    entries = RewardModelTrainer(model, None, max_tokens=400).read(test).entries
    return float(np.concatenate([entry.clean.ravel() for entry in entries]).mean())


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    records = SETS[name](Path(options.data))
    rest, test = split(records, 0.2, options.seed)
    train, valid = split(rest, 0.1, options.seed + 1)
    result: dict[str, Any] = {"records": len(records), "held_out": len(test), "majority": majority(test)}
    if not isinstance(test[0], Marking):
        result["bag_of_words"] = bag_of_words(train, valid, test).to_dict()
    result["reward_model"] = trained(options, *([shortened(one) for one in part] for part in (train, valid, test)))
    result["majority"] = result["reward_model"].pop("majority", result["majority"])
    result["length"] = result["reward_model"]["length_accuracy"]
    return result


def line(name: str, result: dict[str, Any]) -> str:
    def cell(estimate: dict[str, Any] | None) -> str:
        return "" if estimate is None else f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"

    model = result["reward_model"]
    always = "" if result["majority"] is None else f"{result['majority']:.3f}"
    cells = [
        name,
        f"{result['held_out']} of {result['records']}",
        always,
        cell(result["length"]),
        cell(result.get("bag_of_words")),
        cell(model["accuracy"]),
        f"{model['log_loss']:.3f}",
        f"{model['expected_calibration_error']:.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--model", default="stories260k", help="folder or id of a small language model")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS), help="which data sets")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the feedback, at most")
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the heads and the orders")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| feedback | held-out records | always the same | length | bag of words | reward model | log loss | ECE |")
    print("|---|---|---|---|---|---|---|---|")
    results = {}
    for name in options.sets:
        results[name] = measure(name, options)
        print(line(name, results[name]), flush=True)
        common.write(options.out, results)


if __name__ == "__main__":
    main()
