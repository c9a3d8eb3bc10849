"""Every example runs from start to end, offline, without a warning. Each is a process of its own, as for a reader."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
# Short runs where the example itself takes a minute: `main` has the argument that its reader would change.
SHORT = {
    name: "main(timesteps=3000)"
    for name in (
        "train_from_python.py",
        "own_model.py",
        "fine_grained_reward.py",
        "slow_judge.py",
        "stock_ppo_with_a_language_model.py",
        "rlhf_in_rounds.py",
    )
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    script = f"import sys; sys.argv = [{str(path)!r}]\n"
    if path.name in SHORT:
        source = source.replace('if __name__ == "__main__":\n    main()', SHORT[path.name])
        assert SHORT[path.name] in source
    script += source
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example prints what it shows"
