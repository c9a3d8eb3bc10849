"""Every snippet of docs/environment.md runs and prints what it says, and its table has the info keys that there are."""

import re
from typing import Any

import gymnasium as gym

import textgym.rewards


def test_the_table_has_every_key(docs_page: Any) -> None:
    dense = textgym.rewards.token_level(lambda completion_ids, **columns: [[0.0] * len(ids) for ids in completion_ids])
    env = gym.make("TextGen-v0", reward=dense)
    keys = {*env.reset()[1], *env.step(env.unwrapped.eos_token_ids[0])[4]}
    assert keys == set(re.findall(r"^\| `(\w+)` \|", docs_page("environment.md").text, re.MULTILINE))
