"""`textgym train`, in process: what a run writes, options, resuming, interruption, failing rewards."""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from textgym.cli.run_folder import RunFolder, read_json_lines
from textgym.cli.settings import TrainSettings
from textgym.prompts import read_prompts

exact = pytest.mark.skipif(os.environ.get("TEXTGYM_TEST_DEVICE", "cpu") != "cpu", reason="runs are bit-identical on the CPU only")


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model" / "model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def write_reward(name: str, code: str) -> None:
    Path(f"{name}.py").write_text(code)


def test_a_run_writes_everything_it_names(finished) -> None:
    written = {path.name for path in finished.iterdir()}
    assert written == {
        "config.json",
        "progress.csv",
        "tensorboard",
        "checkpoint",
        "model",
        "best-model",
        "samples-before.jsonl",
        "samples-after.jsonl",
        "samples.txt",
        "summary.json",
        "curves.png",
    }
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    rows = list(csv.DictReader((finished / "progress.csv").read_text().splitlines()))
    assert {"rollout/reward_mean", "rollout/kl_per_sequence", "eval/reward_mean", "eval/true_reward_mean", "time/fps"} <= set(rows[0])
    assert int(rows[-1]["time/total_timesteps"]) >= 300


def test_summary_and_samples_agree(finished) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["before"]["kl_per_sequence"] == pytest.approx(0, abs=1e-4)
    assert summary["after"]["kl_per_sequence"] > 0.01
    before, after = (read_json_lines(finished / f"samples-{when}.jsonl") for when in ("before", "after"))
    assert len(after) == 50
    assert np.mean([row["rewards"]["film-review-true"] for row in after]) == pytest.approx(summary["after"]["true_reward"])
    assert np.mean([row["rewards"]["film-review"] for row in after]) == pytest.approx(summary["after"]["reward"], abs=1e-4)
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    text = (finished / "samples.txt").read_text()
    assert text.count("-+-") == 6
    assert all(" ".join(row["prompt"].split()[:2]) in text for row in before[:6])


def test_the_trained_model_is_readable_by_transformers_and_by_generate(run, textgym, capsys) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained("run/model"), AutoTokenizer.from_pretrained("run/model")
    assert model.config.vocab_size == len(tokenizer)
    capsys.readouterr()
    assert textgym("generate", "the plot was", "--model", "run", "--device", "cpu") == 0
    assert capsys.readouterr().out.startswith("the plot was ")


@exact
def test_the_same_seed_gives_the_same_run_and_another_does_not(finished, textgym, small, capsys) -> None:
    for seed in ("3", "4"):
        assert textgym("train", "ppo", *small, "--out", seed, "--seed", seed) == 0
    assert same_weights(finished, Path("3"))
    assert not same_weights(finished, Path("4"))
    output = capsys.readouterr().out
    for shown in ("true reward", "KL", "before", "after", "Run folder: 4", "curves.png", "tensorboard --logdir 4"):
        assert shown in output


def test_a_new_folder_is_chosen_for_each_run(textgym, small) -> None:
    for _ in range(2):
        assert textgym("train", "reinforce", *small) == 0
    assert len(list(Path("runs").glob("reinforce-*"))) == 2


def test_an_existing_run_is_replaced_only_with_force(run, textgym, small, capsys) -> None:
    marker = run / "marker"
    marker.touch()
    assert textgym("train", "ppo", *small, "--out", "run") == 2
    assert "--force" in capsys.readouterr().err
    assert marker.exists()
    assert textgym("train", "ppo", *small, "--out", "run", "--force") == 0
    assert not marker.exists()


def test_force_does_not_remove_a_folder_that_is_no_run(textgym, small, capsys) -> None:
    Path("precious").mkdir()
    Path("precious/thesis.txt").write_text("years")
    assert textgym("train", "ppo", *small, "--out", "precious", "--force") == 2
    assert "no run" in capsys.readouterr().err
    assert Path("precious/thesis.txt").read_text() == "years"


def test_own_model_prompts_reference_and_weighted_rewards(textgym, small, save_model) -> None:
    save_model("mine", 0)
    save_model("other", 1)
    rows = [{"prompt": f"tale {i} ", "answer": str(i)} for i in range(30)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_reward("mine_rewards", "def digits(completions, answer, **k): return [float(c.count(a)) for c, a in zip(completions, answer)]\n")
    write_reward("short_rewards", "def short(completion_ids): return [-float(len(ids)) for ids in completion_ids]\n")
    code = textgym(
        *("train", "ppo", *small, "--out", "run", "--model", "mine", "--reference", "other", "--prompts", "prompts.jsonl"),
        *("--reward", "mine_rewards:digits", "--reward", "short_rewards.py:short", "--reward-weight", "1", "--reward-weight", "0.5"),
        *("--true-reward", "mine_rewards:digits", "--learning-rate", "1e-3"),
    )
    assert code == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["before"]["kl_per_sequence"] > 0.1  # the reference is another model
    samples = read_json_lines(Path("run/samples-before.jsonl"))
    rewards = np.array([[row["rewards"][name] for name in ("digits", "short")] for row in samples])
    assert summary["before"]["reward"] == pytest.approx((rewards @ [1.0, 0.5]).mean(), abs=1e-4)
    assert {row["prompt"] for row in samples} <= {row["prompt"] for row in rows}
    assert len({row["prompt"] for row in samples}) == 3  # a tenth is held out


def test_held_out_prompts_are_not_trained_on() -> None:
    from textgym.cli.workplace import load_prompts

    rows = [{"prompt": f"p {i}", "answer": i} for i in range(100)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        sides = load_prompts(TrainSettings("ppo", prompts="p.jsonl"))
        train, held_out = sides.train, sides.held_out
        texts = read_prompts("p.jsonl")[0]
    finally:
        Path("p.jsonl").unlink()
    assert len(held_out) == 10
    assert sorted(row["prompt"] for row in train + held_out) == sorted(texts)
    assert all(row["prompt"] == f"p {row['answer']}" for row in train + held_out)


# --- stopping and going on

INTERRUPT = """
import os, signal
from textgym.bundled import true_reward
calls = 0
def reward(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == int(os.environ.get("INTERRUPT_AT", -1)):
        os.kill(os.getpid(), getattr(signal, os.environ.get("INTERRUPT_WITH", "SIGINT")))
    return true_reward(prompts, completions)
"""


@exact
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_saves_and_the_resumed_run_equals_an_uninterrupted_one(textgym, small, capsys, monkeypatch, name: str) -> None:
    write_reward("interrupting", INTERRUPT)
    options = [*small, "--reward", "interrupting:reward", "--total-timesteps", "500"]
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a shell
    assert textgym("train", "ppo", *options, "--out", "whole") == 0
    monkeypatch.setenv("INTERRUPT_WITH", name)
    _forget("interrupting")
    monkeypatch.setenv("INTERRUPT_AT", "4")  # one walk measures before training: this is in the third rollout
    assert textgym("train", "ppo", *options, "--out", "stopped") == 130
    output = capsys.readouterr()
    assert "stopping after this iteration" in output.err
    assert "textgym train ppo --resume stopped" in output.out
    assert signal.getsignal(signal.SIGINT) is before
    assert not Path("stopped/samples-after.jsonl").exists()
    assert Path("stopped/curves.png").exists()
    done = json.loads(Path("stopped/checkpoint/agent.json").read_text())["state"]["num_timesteps"]
    assert 0 < done < 500
    monkeypatch.delenv("INTERRUPT_AT")
    assert textgym("train", "ppo", "--resume", "stopped") == 0
    assert same_weights(Path("whole"), Path("stopped"))
    steps = [row["time/total_timesteps"] for row in RunFolder(Path("stopped")).read_metrics()]
    assert steps == [row["time/total_timesteps"] for row in RunFolder(Path("whole")).read_metrics()]
    after = [json.loads(Path(f"{name}/summary.json").read_text())["after"] for name in ("whole", "stopped")]
    assert after[0] == after[1]


def test_a_second_ctrl_c_stops_at_once_and_saves_too(textgym, small, capsys) -> None:
    write_reward(
        "impatient",
        "import os, signal\ncalls = 0\ndef reward(completions):\n    global calls\n    calls += 1\n    if calls == 3:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [float(len(text)) for text in completions]\n",
    )
    assert textgym("train", "reinforce", *small, "--reward", "impatient:reward", "--out", "run") == 130
    assert "--resume run" in capsys.readouterr().out
    assert textgym("train", "reinforce", "--resume", "run") == 0


FAILING = """
import os
calls = 0
def reward(completions):
    global calls
    calls += 1
    if calls == 4 and not os.path.exists("mended"):
        {action}
    return [float(len(c)) for c in completions]
"""


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        ('raise KeyError("label")', "KeyError: 'label'"),
        ("return [float('nan')] * len(completions)", "reward `reward` returned nan"),
        ("return [1.0]", "reward `reward`"),
    ],
)
def test_a_reward_that_fails_in_training_loses_nothing(textgym, small, capsys, action: str, sentence: str) -> None:
    write_reward("failing", FAILING.format(action=action))
    assert textgym("train", "ppo", *small, "--reward", "failing:reward", "--out", "run") == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("textgym: ") and sentence in last and "textgym train ppo --resume run" in last
    assert "Traceback" not in error
    assert "Traceback" in Path("run/error.txt").read_text()
    Path("mended").touch()
    assert textgym("train", "ppo", "--resume", "run") == 0
    assert Path("run/samples-after.jsonl").exists()


def test_a_finished_run_goes_on_with_more_timesteps(run, textgym, capsys) -> None:
    assert textgym("train", "ppo", "--resume", "run") == 2
    assert "larger --total-timesteps" in capsys.readouterr().err
    assert textgym("train", "ppo", "--resume", "run", "--total-timesteps", "600") == 0
    folder = RunFolder(run)
    assert folder.settings().total_timesteps == 600
    assert len(folder.metrics_files()) == 2
    steps = [row["time/total_timesteps"] for row in folder.read_metrics()]
    assert steps == sorted(steps) and steps[-1] >= 600


def _forget(module: str) -> None:
    import sys

    sys.modules.pop(module, None)


@pytest.fixture(autouse=True)
def own_modules_are_forgotten():
    import sys

    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and os.sep + "pytest-" in str(sys.modules[name].__file__):
            del sys.modules[name]
    sys.path[:] = path
