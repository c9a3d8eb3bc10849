"""Every snippet of docs/kl_shaping.md runs and prints what it says, and its table has the keys that there are."""

import re
from typing import Any

from textgym.wrappers.shaping import EPISODE_KEYS, STEP_KEYS


def test_the_table_has_every_key(docs_page: Any) -> None:
    keys = re.findall(r"^\| `(\w+)` \|", docs_page("kl_shaping.md").text, re.MULTILINE)
    assert sorted(keys) == sorted([*STEP_KEYS, *EPISODE_KEYS, "kl_full_per_sequence"])
