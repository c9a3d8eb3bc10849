"""β and learning rates that change: as they are typed, in `config.json`, in the agent, and after `--resume`."""

import csv
import json
from pathlib import Path

import pytest
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule

from textgym.cli.errors import UserError
from textgym.cli.schedules import kl_coefficient, read_number, schedule, with_schedules
from textgym.kl import AdaptiveKLController


def test_numbers_and_schedules() -> None:
    assert read_number("--beta", None) is None and read_number("--beta", "2e-1") == 0.2
    assert schedule(0.2) == 0.2
    falling, still = schedule("linear:0.2:0.1"), schedule("constant:3e-4")
    assert isinstance(falling, LinearSchedule) and [falling(one) for one in (1.0, 0.5, 0.0)] == pytest.approx([0.2, 0.15, 0.1])
    assert isinstance(still, ConstantSchedule) and still(0.3) == 3e-4


@pytest.mark.parametrize(
    ("text", "expected"),
    [("adaptive:6", (0.3, 6, 640)), ("adaptive:6:0.1", (0.1, 6, 640)), ("adaptive:6:0.1:5000", (0.1, 6, 5000))],
)
def test_an_adaptive_beta(text: str, expected: tuple[float, float, float]) -> None:
    value = read_number("--beta", text, adaptive=True)
    assert value == text
    controller = kl_coefficient(text, 0.3, 64)
    assert isinstance(controller, AdaptiveKLController)
    assert (controller.value, controller.target, controller.horizon) == expected


@pytest.mark.parametrize(
    "text", ["much", "linear", "linear:1", "linear:1:2:3", "linear:a:0", "constant:", "cosine:1:0", "adaptive:6", "linear:nan:0", ""]
)
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--learning-rate"):
        read_number("--learning-rate", text)


def test_set_takes_schedules_where_the_argument_does() -> None:
    from textgym.agents import PPO
    from textgym.agents.common.options import arguments_of

    types = arguments_of(PPO)
    found = with_schedules({"clip_range": "linear:0.2:0", "critic_learning_rate": "constant:1e-3", "critic": "head", "n_epochs": 2}, types)
    assert isinstance(found["clip_range"], LinearSchedule) and isinstance(found["critic_learning_rate"], ConstantSchedule)
    assert found["critic"] == "head" and found["n_epochs"] == 2
    with pytest.raises(UserError, match="gamma=linear:1:0: this argument does not change"):
        with_schedules({"gamma": "linear:1:0"}, types)


@pytest.mark.parametrize("beta", ["linear:0.4:0", "adaptive:1000:0.4"])
def test_a_run_follows_its_schedules_and_a_resumed_one_goes_on_with_them(textgym, small, beta: str) -> None:
    options = [*small, "--beta", beta, "--learning-rate", "linear:1e-3:1e-4", "--set", "clip_range=linear:0.3:0.1"]
    assert textgym("train", "ppo", *options, "--total-timesteps", "300", "--out", "run") == 0
    settings = json.loads(Path("run/config.json").read_text())["settings"]
    assert (settings["beta"], settings["learning_rate"]) == (beta, "linear:1e-3:1e-4")
    assert settings["options"]["clip_range"] == "linear:0.3:0.1"
    rows = list(csv.DictReader(Path("run/progress.csv").read_text().splitlines()))
    betas = [float(row["rollout/beta"]) for row in rows]
    assert betas[0] == pytest.approx(0.4) and len(set(betas)) == len(rows) > 1
    assert sorted(betas, reverse=True) == betas  # the KL is below so large a target
    assert float(rows[-1]["train/learning_rate"]) == pytest.approx(1e-4, rel=0.01)
    assert float(rows[-1]["train/clip_range"]) == pytest.approx(0.1, rel=0.01)
    assert textgym("train", "ppo", "--resume", "run", "--total-timesteps", "600") == 0
    rows = list(csv.DictReader(Path("run/progress-2.csv").read_text().splitlines()))
    if beta.startswith("adaptive"):
        assert float(rows[0]["rollout/beta"]) == pytest.approx(betas[-1] * (1 - 0.2 * 16 / 160))
    else:
        assert float(rows[-1]["train/learning_rate"]) == pytest.approx(1e-4, rel=0.01)


@pytest.mark.parametrize("rate", ["constant:2e-3", "linear:2e-3:1e-3", "2e-3"])
def test_an_offline_learning_rate_falls_to_0_unless_a_schedule_says_otherwise(textgym, rate: str) -> None:
    rows = [{"prompt": f"the {word}", "completion": " was good."} for word in ("plot", "film", "story", "cast", "music", "ending")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--batch-size", "1", "--set", "micro_batch_size=1", "--max-new-tokens", "4", "--device", "cpu", "--out", "run"]
    assert textgym("sft", "--examples", "rows.jsonl", *options, "--learning-rate", rate) == 0
    last = float(list(csv.DictReader(Path("run/progress.csv").read_text().splitlines()))[-1]["train/learning_rate"])
    expected = {"constant:2e-3": (2e-3, 2e-3), "linear:2e-3:1e-3": (1e-3, 1.2e-3), "2e-3": (0.0, 0.3e-3)}[rate]
    assert expected[0] <= last <= expected[1]
