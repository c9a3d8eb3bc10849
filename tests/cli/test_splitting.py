"""Holding out whole prompts: nothing that is measured on is trained on, and what is left out is counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from textgym.cli.errors import UserError
from textgym.cli.settings import TrainSettings
from textgym.cli.splitting import MAX_HELD_OUT, Split, prompt_key, split_rows
from textgym.cli.workplace import load_prompts

DPO = {"chosen": " was good.", "rejected": " was bad."}


def rows_of(counts: dict[str, int]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "number": number} for prompt, count in counts.items() for number in range(count)]


def key(row: dict[str, Any]) -> str:
    return prompt_key(row["prompt"])


@pytest.mark.parametrize("counts", [{f"p {i}": 5 for i in range(40)}, {"a": 100, "b": 90, "c": 80}, {"a": 1, "b": 1}])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(counts: dict[str, int], seed: int) -> None:
    rows = rows_of(counts)
    split = split_rows(rows, key, seed, "FILE: mend it.")
    sides = [{row["prompt"] for row in side} for side in (split.train, split.held_out)]
    assert not sides[0] & sides[1] and all(sides)
    assert Counter(map(str, [*split.train, *split.held_out])) == Counter(map(str, rows))
    assert (split.train_prompts, split.held_out_prompts) == (len(sides[0]), len(sides[1]))
    assert split.held_out_prompts == max(1, len(counts) // 10)
    assert split == split_rows(rows, key, seed, "FILE: mend it.")


def test_few_rows_are_held_out_of_a_large_file_and_the_fewest_where_every_prompt_has_many() -> None:
    assert len(split_rows(rows_of({f"p {i}": 3 for i in range(900)}), key, 0, "").held_out) == MAX_HELD_OUT // 3 * 3
    assert {row["prompt"] for row in split_rows(rows_of({"a": 100, "b": 70, "c": 90}), key, 0, "").held_out} == {"b"}


@pytest.mark.parametrize("rows", [rows_of({"a": 1}), rows_of({"a": 7}), [{"prompt": "a b"}, {"prompt": " a  b\n"}]])
def test_one_prompt_cannot_be_split(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"^FILE holds .* can be held out: mend it\.$"):
        split_rows(rows, key, 0, "FILE: mend it.")


def test_conversations_and_ids_are_told_apart() -> None:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    assert prompt_key(said("a b")) == prompt_key(said("a  b")) != prompt_key(said("b"))
    assert prompt_key([1, 2]) != prompt_key([1, 3])
    assert prompt_key(said("a")) != prompt_key([{"role": "system", "content": "a"}])


def test_prompts_that_occur_twice_are_held_out_together(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p {i // 4}", "reference": str(i)}) + "\n" for i in range(80)))
    split = load_prompts(TrainSettings("rloo", prompts=str(file)))
    assert not {row["prompt"] for row in split.train} & {row["prompt"] for row in split.held_out}
    assert split.counts == {"rows": 72, "prompts": 18, "held_out_rows": 8, "held_out_prompts": 2, "left_out_rows": 0}


def test_the_numbers_in_words() -> None:
    split = Split([{}] * 1200, [{}] * 64, 300, 16, 7)
    assert split.told("row") == "1,200 rows of 300 prompts, held out 64 rows of 16 prompts; 7 left out, too long"
    assert Split([{}] * 9, [{}], 9, 1).told("prompt") == "9 prompts, held out 1 prompt"


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_rows_that_are_too_long_are_counted_and_on_neither_side(textgym, kind: str, capsys) -> None:
    more = {"sft": {"completion": " was good."}, "dpo": DPO, "kto": {"completion": " was good.", "label": True}}[kind]
    words = ["plot", "film", "story", "music", "acting", "ending"]
    short = [{"prompt": f"the {word}", **more} for word in words for _ in range(2)]
    long = [{"prompt": f"the {word} and " + "the plot " * 20, **more} for word in words[:5]]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*long, *short]))
    command = ["sft", "--examples"] if kind == "sft" else ["train", kind, "--preferences"]
    sizes = ["--set", "max_tokens=12", "--max-new-tokens", "4", "--total-timesteps", "60", "--device", "cpu", "--out", "run"]
    assert textgym(*command, "rows.jsonl", *sizes) == 0
    counts = {"rows": 10, "prompts": 5, "held_out_rows": 2, "held_out_prompts": 1, "left_out_rows": 5}
    for file in ("config.json", "summary.json"):
        assert json.loads(Path("run", file).read_text())["data"] == counts
    said = "10 rows of 5 prompts, held out 2 rows of 1 prompt; 5 left out, too long"
    assert said in " ".join(capsys.readouterr().out.split())
    samples = [json.loads(line)["prompt"] for line in Path("run/samples-before.jsonl").read_text().splitlines()]
    assert len(set(samples)) == 1 and len(samples[0]) < 20
    assert textgym(*command[:-1], "--resume", "run", "--total-timesteps", "90") == 0


def test_a_run_does_not_go_on_with_other_rows(textgym, capsys) -> None:
    rows = [{"prompt": f"the {word}", "completion": " was good."} for word in ("plot", "film", "story")]
    file = Path("rows.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ["--max-new-tokens", "4", "--total-timesteps", "20", "--device", "cpu", "--out", "run"]
    assert textgym("sft", "--examples", "rows.jsonl", *sizes) == 0
    file.write_text("".join(json.dumps({**row, "completion": " was bad."}) + "\n" for row in rows))
    assert textgym("sft", "--resume", "run", "--total-timesteps", "40") == 2
    assert "holds other rows than when the run began; start a new run." in capsys.readouterr().err
