"""What ends a run before it has begun, or while it saves: nothing measured or saved is lost, and one sentence says how to go on."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from textgym.cli.run_folder import RunFolder, read_json_lines, save_whole, write_json

exact = pytest.mark.skipif(os.environ.get("TEXTGYM_TEST_DEVICE", "cpu") != "cpu", reason="runs are bit-identical on the CPU only")
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
REWARD = """
import os
calls = 0
def reward(completions):
    global calls
    calls += 1
    if calls == {call} and not os.path.exists("mended"):
        {action}
    return [float(len(c)) for c in completions]
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of these tests are imported afresh."""
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name, module in sys.modules.items() if os.sep + "pytest-" in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def forget(name: str) -> None:
    import sys

    sys.modules.pop(name, None)


def write_reward(call: int, action: str) -> list[str]:
    Path("mine.py").write_text(REWARD.format(call=call, action=action))
    return ["--reward", "mine:reward", "--out", "run"]


def weights(folder: str) -> dict[str, np.ndarray]:
    return load_file(Path(folder) / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        ('raise KeyError("label")', "KeyError: 'label'"),
        ('return ["good"] * len(completions)', "reward `reward`"),
        ("return [float('nan')] * len(completions)", "reward `reward` returned nan"),
    ],
)
def test_a_reward_that_fails_in_the_first_measurement_leaves_its_traceback(textgym, small, capsys, action: str, sentence: str) -> None:
    options = write_reward(1, action)
    assert textgym("train", "ppo", *small, *options) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and sentence in said
    assert "(Nothing has been trained; the traceback is in run/error.txt. When this is mended, give the same command again.)" in said
    assert {path.name for path in Path("run").iterdir()} == {"config.json", "error.txt"}
    assert "Traceback" in Path("run/error.txt").read_text()
    Path("mended").touch()
    forget("mine")
    assert textgym("train", "ppo", *small, *options) == 0  # neither --force nor another folder
    assert not Path("run/error.txt").exists()


def test_a_run_that_would_be_replaced_is_given_back_where_the_new_one_fails(run, textgym, small, capsys) -> None:
    before = sorted(path.name for path in run.rglob("*"))
    kept = weights("run")
    assert textgym("train", "ppo", *small, *write_reward(1, "raise KeyError(1)"), "--force") == 2
    assert sorted(path.name for path in run.rglob("*") if path.name != "error.txt") == before
    assert all(np.array_equal(kept[name], value) for name, value in weights("run").items())
    assert not list(Path().glob(".run*"))


@exact
@pytest.mark.parametrize("call", [1, 2])
def test_ctrl_c_in_the_first_measurement_keeps_what_was_measured_and_the_run_goes_on(textgym, small, capsys, call: int) -> None:
    rows = [{"prompt": f"the {word}"} for word in ("plot", "film", "story", "cast")]
    Path("eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*small, "--eval-prompts", "eval.jsonl", "--eval-completions", "8"]  # two walks of four rows
    assert textgym("train", "ppo", *options, *write_reward(-1, "pass")[:2], "--out", "whole") == 0
    forget("mine")
    assert textgym("train", "ppo", *options, *write_reward(call, "raise KeyboardInterrupt")) == 130
    assert "--resume run" in capsys.readouterr().out
    measured = RunFolder(Path("run")).read_summary().get("before", {}).get("completions", 0)
    assert measured == 4 * (call - 1)
    assert not measured or len(read_json_lines(Path("run/samples-before.jsonl"))) == 4
    Path("mended").touch()
    assert textgym("train", "ppo", "--resume", "run") == 0
    summaries = [json.loads(Path(name, "summary.json").read_text()) for name in ("whole", "run")]
    assert summaries[0] == summaries[1] and summaries[1]["before"]["completions"] == 8
    assert all(np.array_equal(weights("whole")[name], value) for name, value in weights("run").items())


@exact
@pytest.mark.parametrize("what", ["checkpoint", "model"])
def test_a_full_disk_ends_in_one_sentence_and_the_older_checkpoint_is_whole(textgym, small, capsys, monkeypatch, what: str) -> None:
    from textgym.agents import PPO, CausalLMPolicy

    options = [*small, "--total-timesteps", "500", "--eval-interval", "1000"]
    target, name = (PPO, "save") if what == "checkpoint" else (CausalLMPolicy, "save_pretrained")
    right, calls = getattr(target, name), []

    def full(self: Any, folder: Path, *others: Any) -> None:
        calls.append(folder)
        if len(calls) > (2 if what == "checkpoint" else 5):  # of a checkpoint: model, reference, and the model to use
            Path(folder, ".saving").mkdir(parents=True, exist_ok=True)
            raise FULL
        right(self, folder, *others)

    monkeypatch.setattr(target, name, full)
    assert textgym("train", "ppo", *options, "--out", "run") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said and "Traceback" not in said, said
    assert "timesteps is whole: make room, and go on with: textgym train ppo --resume run" in said
    assert not Path("run/checkpoint/.saving").exists() and not list(Path("run").glob(".*"))
    monkeypatch.setattr(target, name, right)
    assert textgym("train", "ppo", "--resume", "run") == 0
    assert textgym("train", "ppo", *options, "--out", "whole") == 0
    assert all(np.array_equal(weights("whole")[name], value) for name, value in weights("run").items())


def test_what_is_there_is_replaced_only_by_a_whole_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}

    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise FULL

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").touch()
    with pytest.raises(SafetensorError):
        save_whole(save, tmp_path / "model")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a.json", "model", "weights"]


def test_a_folder_that_cannot_be_made_is_found_before_anything_is_measured(textgym, small, capsys, monkeypatch) -> None:
    monkeypatch.setattr("textgym.cli.train.load_policies", lambda settings: pytest.fail("a model was loaded"))
    Path("file").touch()
    assert textgym("train", "ppo", *small, "--out", "file/run") == 2
    assert "--out file/run cannot be made: Not a directory." in capsys.readouterr().err
