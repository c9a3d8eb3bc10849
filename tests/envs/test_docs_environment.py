"""Every snippet of docs/environment.md runs and prints what it says, and its table has the info keys that there are."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import gymnasium as gym

import textgym.rewards

PAGE = Path(__file__).parents[2] / "docs" / "environment.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$|^<!-- setup:\n(.*?)^-->$", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)


def test_snippets_print_what_they_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"FRAME": page.split("```\n")[-2].rstrip("\n")}  # the last block of the page
    for shown, hidden in BLOCK.findall(page):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(shown or hidden, str(PAGE), "exec"), namespace)
        assert output.getvalue().splitlines() == PRINTED.findall(shown or hidden)


def test_the_table_has_every_key() -> None:
    dense = textgym.rewards.token_level(lambda completion_ids, **columns: [[0.0] * len(ids) for ids in completion_ids])
    env = gym.make("TextGen-v0", reward=dense)
    keys = {*env.reset()[1], *env.step(env.unwrapped.eos_token_ids[0])[4]}
    assert keys == set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
