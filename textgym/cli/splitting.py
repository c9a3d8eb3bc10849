"""Holding out: whole prompts, never a prompt that is trained on, and how many rows there are on each side."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from textgym.cli.errors import UserError

Row = dict[str, Any]
MAX_HELD_OUT = 64  # rows that are taken from a file where no file of held-out ones is given


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to measure on.

    Attributes:
        train: what is trained on.
        held_out: what is measured on.
        train_prompts: different prompts of `train`.
        held_out_prompts: different prompts of `held_out`.
        left_out: rows that are in neither, such as those longer than `max_tokens`.
    """

    train: list[Row]
    held_out: list[Row]
    train_prompts: int
    held_out_prompts: int
    left_out: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many there are, as it stands in `config.json` and `summary.json`."""
        return {
            "rows": len(self.train),
            "prompts": self.train_prompts,
            "held_out_rows": len(self.held_out),
            "held_out_prompts": self.held_out_prompts,
            "left_out_rows": self.left_out,
        }

    def told(self, what: str) -> str:
        """Returns the numbers in words; `what` a row is: "row", or "prompt" where each should be another one."""

        def count(number: int, name: str) -> str:
            return f"{number:,} {name}{'' if number == 1 else 's'}"

        def side(rows: list[Row], prompts: int) -> str:
            if what == "prompt" and len(rows) == prompts:
                return count(prompts, what)
            return f"{count(len(rows), 'row')} of {count(prompts, 'prompt')}"

        left_out = f"; {self.left_out:,} left out, too long" if self.left_out else ""
        return f"{side(self.train, self.train_prompts)}, held out {side(self.held_out, self.held_out_prompts)}{left_out}"


def prompt_key(prompt: Any) -> str:
    """Returns what tells a prompt (text, messages or ids) from others: white space between words does not."""
    if isinstance(prompt, str):
        return json.dumps(" ".join(prompt.split()))
    return json.dumps([[one.get("role"), prompt_key(one.get("content"))] if isinstance(one, dict) else one for one in prompt or ()])


def split_rows(rows: Sequence[Row], key: Callable[[Row], str], seed: int, cure: str, left_out: int = 0) -> Split:
    """Holds out a random tenth of the prompts with all their rows, at most `MAX_HELD_OUT` rows.

    Args:
        rows: all of them.
        key: of a row, what tells its prompt from others.
        seed: the same seed holds out the same prompts.
        cure: what to do where there is only one prompt, for the error message.
        left_out: see `Split`.

    Raises:
        UserError: all rows have the same prompt.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    if len(groups) < 2:
        has = "one row" if len(rows) == 1 else f"{len(rows):,} rows of one prompt"
        has += f" (others, {left_out:,}, are left out)" if left_out else ""
        raise UserError(f"{cure.partition(':')[0]} holds {has}, so no prompt can be held out:{cure.partition(':')[2]}")
    names = list(groups)
    rng = random.Random(seed)
    rng.shuffle(names)
    wanted, count = max(1, len(names) // 10), 0
    chosen: set[str] = set()
    for name in names:
        if len(chosen) < wanted and count + len(groups[name]) <= MAX_HELD_OUT:
            chosen.add(name)
            count += len(groups[name])
    if not chosen:  # every prompt has more rows than that
        chosen.add(min(names, key=lambda name: len(groups[name])))
    sides: tuple[list[Row], list[Row]] = ([], [])
    for name in names:
        sides[name in chosen].extend(groups[name])
    rng.shuffle(sides[0])
    return Split(sides[0], sides[1], len(groups) - len(chosen), len(chosen), left_out)


def given_sides(train: Sequence[Row], held_out: Sequence[Row], key: Callable[[Row], str], left_out: int = 0) -> Split:
    """Returns two sides that were given as they are."""
    return Split(list(train), list(held_out), len({key(row) for row in train}), len({key(row) for row in held_out}), left_out)


def shared_prompts(split: Split, key: Callable[[Row], str]) -> int:
    """Returns how many of the held-out prompts are trained on as well, which only sides that were given can have."""
    return len({key(row) for row in split.held_out} & {key(row) for row in split.train})
