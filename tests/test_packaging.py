"""A checkout works without an installation, and the version is said once."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import textgym

ROOT = Path(__file__).parent.parent


def test_a_bare_checkout_works_from_its_root() -> None:
    script = (
        "import textgym, textgym.agents.common.masking, gymnasium as gym; "
        "gym.make('TextGen-v0', reward='film-review-true').reset(seed=0); print(textgym.envs.__file__, textgym.agents.__file__)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # -S -E would hide the dependencies too; running from the root puts the checkout before any installation.
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    places = [Path(place).resolve() for place in done.stdout.split()]
    assert [place.parent for place in places] == [ROOT / "envs", ROOT / "agents"]


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert textgym.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_extras_for_users_hold_only_what_the_package_imports() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    source = "\n".join(path.read_text(encoding="utf-8") for top in ("textgym", "agents", "envs") for path in (ROOT / top).rglob("*.py"))
    for extra in ("peft", "metrics"):
        for requirement in extras[extra]:
            module = re.split(r"[\[>=<]", requirement)[0].replace("-", "_")
            assert re.search(rf"^\s*(from|import) {module}\b", source, re.MULTILINE), f"{requirement} of {extra}"
