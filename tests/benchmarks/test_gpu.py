"""The check of everything on a GPU: it runs whole on the CPU, and goes on after whatever a part does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

PARTS = """
import os, sys, time
sys.path.insert(0, {folder!r})
import gpu, gpu_parts
from gpu_parts import Figure

def raises(task):
    raise ValueError("of this part")

def parts(device, sizes):
    return {{
        "right": (lambda task: {{"distance": Figure(0.5, 1.0), "rate": Figure(3.0)}}, 60),
        "raises": (raises, 60),
        "wrong": (lambda task: {{"distance": Figure(2.0, 1.0)}}, 60),
        "no number": (lambda task: {{"distance": Figure(float("nan"), 1.0)}}, 60),
        "hangs": (lambda task: time.sleep(1000), 0.2),
        "dies": (lambda task: os._exit(3), 60),
        "measured": (lambda task: {{"rate": Figure(5.0)}}, 60),
    }}

gpu_parts.parts = parts
if __name__ == "__main__":
    sys.exit(gpu.main())
"""


def run(script: Path, out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    command = [sys.executable, str(script), "--device", "cpu", "--small", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    return done, json.loads(out.read_text())["parts"]


@pytest.mark.slow
def test_it_runs_whole_on_the_cpu(tmp_path):
    done, parts = run(BENCHMARKS / "gpu.py", tmp_path / "out.json", "--minutes", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {part["verdict"] for part in parts.values()} == {"passed", "measured"}
    assert len(parts) == 9
    assert "6 passed; 3 measured; 0 failed; 0 skipped" in done.stdout


@pytest.mark.slow
def test_it_goes_on_after_a_part_that_fails(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PARTS.format(folder=str(BENCHMARKS)))
    done, parts = run(script, tmp_path / "out.json")
    assert done.returncode == 1
    verdicts = {name: part["verdict"] for name, part in parts.items()}
    failed = dict.fromkeys(("raises", "wrong", "no number", "hangs", "dies"), "failed")
    assert verdicts == {"right": "passed", **failed, "measured": "measured"}
    assert parts["raises"]["error"] == "ValueError: of this part"
    assert "stopped" in parts["hangs"]["error"]
    assert "exit code 3" in parts["dies"]["error"]
    assert parts["no number"]["figures"]["distance"]["value"] is None
    for name in failed:
        assert f"failed: {name}\n" in done.stdout
