"""The README's Python runs as it stands, and its tree names every file of the package."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_snippets_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(snippet, names)
    assert "->" in capsys.readouterr().out
    assert (tmp_path / "runs/mine/agent.json").exists()
    dpo: Any = names["dpo"]
    for pair in names["pairs"]:  # type: ignore[attr-defined]
        for text in pair.values():
            assert dpo.policy.tokenizer.unk_token_id not in dpo.policy.tokenizer(text)["input_ids"]
        assert dpo.evaluate([pair])["rewards/margins"] > 0.01  # what stands there is learned


def test_the_tree_names_every_file_and_nothing_else() -> None:
    block = re.search(r"```text\n(.*?)```", README, flags=re.DOTALL)
    assert block, "README.md shows no tree"
    told, folder = set(), ""
    for line in block.group(1).splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        told.add(name if not line.startswith(" ") else folder + name)
    there = {
        str(path.relative_to(ROOT))
        for top in ("textgym", "envs", "agents", "examples", "benchmarks")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py"
    }
    files = {name for name in told if name.endswith(".py")}
    assert files == there, f"missing in the tree: {sorted(there - files)}; gone: {sorted(files - there)}"


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
