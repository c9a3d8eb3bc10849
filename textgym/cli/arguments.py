"""What `--set` can name: the arguments of an algorithm that have no option of their own, with their defaults and what they are."""

import difflib
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

from textgym.agents.common.options import AgentOptions, CommonOptions, arguments_of, default_arguments
from textgym.cli.algorithms import ALGORITHMS, SFT, agent_class
from textgym.cli.errors import UserError

RESERVED = (
    *("policy", "env", "examples", "preferences", "reference", "learning_rate", "beta"),
    *("evaluation", "seed", "device", "tensorboard_log", "optimizer", "verbose"),
)
_SFT_OPTIONS = ("n_epochs", "batch_size", "packing")  # they have options of their own, which `--set` goes before


def check_options(options: Mapping[str, Any], agent_class: type, reserved: Collection[str], given_by: str = "--set") -> None:
    """Raises if `--set` names something that is no argument of the class, or that the command sets itself."""
    possible = [name for name in arguments_of(agent_class) if name not in reserved]
    for name in options:
        if name in reserved:
            raise UserError(f"{given_by} {name}=... is not possible: it has an option of its own, or the command sets it.")
        if name not in possible:
            close = difflib.get_close_matches(name, possible, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UserError(f"{given_by} {name}=...: {agent_class.__name__} has no such argument.{hint} It has: {', '.join(possible)}.")


def described_arguments(kind: type) -> dict[str, str]:
    """Returns what the docstrings of a class, its bases and the tables of options say of each argument, by name."""
    found: dict[str, str] = {}
    for source in (CommonOptions, AgentOptions, *reversed(kind.__mro__)):
        text = inspect.cleandoc(source.__doc__ or "")
        section = re.search(r"^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)*)", text, flags=re.MULTILINE)
        for name, words in re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section.group(1) if section else "", flags=re.MULTILINE):
            found[name] = " ".join(words.split())
    return found


def print_arguments(algorithm: str) -> None:
    """Prints the arguments of an algorithm that `--set` can name."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    kind = agent_class(algorithm)
    words, defaults = described_arguments(kind), default_arguments(kind)
    own = _SFT_OPTIONS if algorithm == SFT else ()
    table = Table(title=f"{ALGORITHMS[algorithm].class_name}: --set NAME=VALUE", show_lines=False, pad_edge=False)
    table.add_column("NAME=default", overflow="fold", ratio=2)
    table.add_column("", overflow="fold", ratio=3)
    for name in arguments_of(kind):
        if name not in RESERVED and name not in own:
            table.add_row(Text(f"{name}={_as_typed(defaults.get(name))}"), Text(words.get(name, "")))
    Console().print(table)


def _as_typed(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
