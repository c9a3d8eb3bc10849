"""Settings, run folders, plots, the command in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from textgym.cli.algorithms import ALGORITHMS, SFT, Algorithm, agent_class, learning_rates
from textgym.cli.errors import UserError, one_line
from textgym.cli.plots import plot_curves, series
from textgym.cli.run_folder import RunFolder
from textgym.cli.settings import TrainSettings, parse_options

COMMAND = [sys.executable, "-P", "-c", "from textgym.cli.main import main; main()"]


def test_learning_rate_suits_the_bundled_model_or_others() -> None:
    assert TrainSettings("ppo").step_size == 5e-4
    assert TrainSettings("ppo", model="mine").step_size == 1e-5
    assert TrainSettings("ppo", model="mine", learning_rate=3e-4).step_size == 3e-4


def test_true_reward_is_known_for_the_bundled_one_only() -> None:
    assert TrainSettings("ppo").measured_reward == "film-review-true"
    assert TrainSettings("ppo", reward=("mine:f",)).measured_reward is None
    assert TrainSettings("ppo", reward=("mine:f",), true_reward="mine:g").measured_reward == "mine:g"


def test_settings_survive_json() -> None:
    settings = TrainSettings("ppo", reward=("a", "b"), reward_weights=(1.0, 2.0), options={"clip_range": 0.1})
    assert TrainSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_options_are_json_or_text() -> None:
    pairs = ["clip_range=0.1", "critic=separate", "normalize_advantage=true", "max_grad_norm=null"]
    assert parse_options(pairs) == {"clip_range": 0.1, "critic": "separate", "normalize_advantage": True, "max_grad_norm": None}
    with pytest.raises(UserError):
        parse_options(["=3"])


def test_paths_become_absolute_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    settings = TrainSettings("ppo", model="mine", reference="owner/name", reward=("film-review",)).with_absolute_paths()
    assert (settings.model, settings.reference, settings.reward) == (str(tmp_path / "mine"), "owner/name", ("film-review",))


def test_rows_after_the_checkpoint_are_replaced_when_a_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text("time/total_timesteps,x\n100,1\n200,2\n300,3\n")
    (tmp_path / "progress-2.csv").write_text("time/total_timesteps,x,y\n210,4,\n320,5,6\n")
    folder = RunFolder(tmp_path)
    assert folder.metrics_suffix() == "-3"
    assert folder.read_metrics() == [
        {"time/total_timesteps": 100.0, "x": 1.0},
        {"time/total_timesteps": 200.0, "x": 2.0},
        {"time/total_timesteps": 210.0, "x": 4.0},
        {"time/total_timesteps": 320.0, "x": 5.0, "y": 6.0},
    ]


def test_curves_draw_only_what_was_logged(tmp_path: Path) -> None:
    rows = [{"time/total_timesteps": 0.0, "eval/reward_mean": 1.0}, {"time/total_timesteps": 5.0, "rollout/reward_mean": 2.0}]
    assert series(rows, "eval/reward_mean") == ([0.0], [1.0])
    plot_curves(rows, tmp_path / "one.png", "one panel")
    plot_curves([{**row, "eval/true_reward_mean": 0.0} for row in rows], tmp_path / "two.png", "two panels")
    widths = [int.from_bytes((tmp_path / name).read_bytes()[16:20], "big") for name in ("one.png", "two.png")]
    assert widths[1] == 2 * widths[0]
    plot_curves([], tmp_path / "none.png", "nothing")
    assert not (tmp_path / "none.png").exists()


def test_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(KeyError("label")) == "KeyError: 'label'"
    assert one_line(RuntimeError()) == "RuntimeError"


def test_help_says_units_and_defaults_and_loads_no_torch() -> None:
    code = "import sys\nfrom textgym.cli.main import main\ntry: main(['train', '--help'])\nfinally: assert 'torch' not in sys.modules"
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    result = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, env=environment)
    text = " ".join(result.stdout.split())
    for said in ("reward per nat", "in generated tokens", "nats per completion", "[default: 60000]", "[default: film-review]", "(bundled)"):
        assert said in text


def test_end_to_end_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text("def short(completions): return [-float(len(c.split())) for c in completions]\n")
    options = ["--total-timesteps", "400", "--num-envs", "16", "--device", "cpu", "--reward", "my_rewards:short"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True, "env": environment, "timeout": 120}
    result = subprocess.run([*COMMAND, "train", "reinforce", *options], **arguments)
    assert result.stderr == ""
    (run,) = (tmp_path / "runs").iterdir()
    assert f"Run folder: {run.relative_to(tmp_path)}" in result.stdout
    generated = subprocess.run([*COMMAND, "generate", "the plot was", "--model", str(run), "--device", "cpu"], **arguments)
    assert generated.stdout.startswith("the plot was")
    assert generated.stderr.startswith("textgym: reinforce-") and generated.stderr.count("\n") == 1
    assert "(0.2 M parameters, float32, on cpu); 1 prompt; 32 new tokens at most" in generated.stderr


def test_every_algorithm_has_its_class_and_its_step_size() -> None:
    assert set(ALGORITHMS) == {*Algorithm, SFT}
    for algorithm in Algorithm:
        assert agent_class(algorithm).__name__ == ALGORITHMS[algorithm].class_name
        assert f"{algorithm.value} {ALGORITHMS[algorithm].learning_rate:g}" in learning_rates()
