"""Every page of docs/ runs as it is printed, from its first snippet to its last, in a folder of its own; and pages hide nothing."""

import inspect
import re
import typing
from pathlib import Path
from typing import Any

import pytest

import textgym.agents
from textgym.agents.common.options import COMMON_DEFAULTS, DEFAULTS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
SLOW = ("evaluation.md", "reward_models.md", "rlhf.md")
AGENTS = ("PPO", "REINFORCE", "RLOO", "GRPO", "REBEL", "NLPO", "DQN", "SFT", "DPO", "KTO")
CELL = r"`([^`]*)`"


# What a page leaves behind, beyond what its `print`s say.
LEFT = {
    "environment.md": lambda names, text: names["frame"] == text.split("```\n")[-2].rstrip("\n"),  # the last block of the page
    "rlhf.md": lambda names, text: Path("runs/mine/round-2/round.json").exists(),
}


def has_python(page: str) -> bool:
    return "```python" in (DOCS / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow if p in SLOW else ()) for p in PAGES if has_python(p)])
def test_a_page_runs_as_it_is_printed(page: str, docs_page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = docs_page(page).run()
    assert LEFT.get(page, lambda names, text: True)(names, docs_page(page).text)


@pytest.mark.parametrize("page", PAGES)
def test_no_page_hides_what_its_snippets_need(page: str) -> None:
    assert "<!-- setup" not in (DOCS / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", AGENTS)
def test_each_agent_has_a_page_with_a_snippet(name: str) -> None:
    assert has_python(f"agents/{name.lower()}.md")


# -- arguments ------------------------------------------------------------------------------------------------------


def table(page: str, heading: str, columns: int) -> dict[str, tuple[str, ...]]:
    """The rows of the first table under a heading: by argument, the cells after it."""
    text = (DOCS / page).read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\\\) \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| `")]
    assert {len(row) for row in rows} == {columns}, "a cell more or less"
    assert all(all(cell.strip() for cell in row) for row in rows), "an empty cell"
    return {row[0].strip("`"): tuple(row[1:]) for row in rows}


def written(default: Any) -> str:
    """A default as the tables write it."""
    if default is inspect.Parameter.empty:
        return "required"
    return f"`{default.__name__}`" if callable(default) else f"`{default!r}`".replace("'", '"')


def arguments(cls: type[Any]) -> dict[str, str]:
    """What the constructor takes besides the common options: its own arguments, and those that its `**options` pass on to a base."""
    found: dict[str, str] = {}
    passed_on: set[str] | None = None
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        for name, parameter in inspect.signature(base.__init__).parameters.items():
            own = name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
            if own and (passed_on is None or name in passed_on):
                found.setdefault(name, written(parameter.default))
        options = typing.get_type_hints(base.__init__).get("options")
        passed_on = set(typing.get_type_hints(typing.get_args(options)[0])) - set(DEFAULTS) if options else set()
        if passed_on <= found.keys():
            return found
    raise AssertionError(f"nobody takes {passed_on} of {cls.__name__}")


@pytest.mark.parametrize("name", AGENTS)
def test_the_page_of_an_agent_has_its_arguments_with_their_defaults(name: str) -> None:
    shown = {argument: cells[0] for argument, cells in table(f"agents/{name.lower()}.md", "Arguments", 3).items()}
    shown.pop("num_generations", None)  # an option of all, whose other default has a test of its own
    assert shown == arguments(getattr(textgym.agents, name))


def test_the_options_of_all_agents_stand_with_their_defaults() -> None:
    shown = table("agents.md", "Options of all agents", 4)
    assert {name: cells[0] for name, cells in shown.items()} == {name: written(default) for name, default in DEFAULTS.items()}
    assert {name for name, cells in shown.items() if cells[1] == "all"} == set(COMMON_DEFAULTS)


@pytest.mark.parametrize("name", ["GRPO", "RLOO", "REBEL"])
def test_other_defaults_of_num_generations_are_on_the_page(name: str, bundled_policy: Any) -> None:
    agent = getattr(textgym.agents, name)(bundled_policy, None)
    assert table(f"agents/{name.lower()}.md", "Arguments", 3)["num_generations"][0] == f"`{agent.num_generations}`"


@pytest.fixture(scope="module")
def bundled_policy() -> Any:
    from textgym.bundled import bundled_model_path

    return textgym.agents.CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu")
