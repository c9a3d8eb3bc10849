"""The progress line: what it says, that it fits, and that a rate is one of whole iterations."""

import pytest

from textgym.agents.common.progress import ProgressCallback, progress_line

STATUS = "loss 0.693  accuracy 0.500"


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 200])
def test_a_line_fits_and_no_part_of_it_is_cut(width: int) -> None:
    line = progress_line("RewardModelTrainer", 0.37, STATUS, 5_333_907.0, 3723.4, width)
    assert len(line) <= max(width, len("RewardModelTrainer  37%  1:02:03 left"))
    parts = {"RewardModelTrainer", "37%", "1:02:03 left", "loss 0.693", "accuracy 0.500", "5,333,907 tokens/s"}
    assert {part for part in line.split("  ") if not set(part) <= set("━╌")} <= parts
    assert {"RewardModelTrainer", "37%", "1:02:03 left"} <= set(line.split("  "))
    assert width < 90 or "5,333,907 tokens/s" in line
    assert width < 80 or "5,334 tokens/s" in progress_line("RewardModelTrainer", 0.37, STATUS, 5_334.0, 723.4, width)


def test_before_the_first_iteration_is_over_there_is_neither_rate_nor_time_left() -> None:
    line = progress_line("RLOO", 0.03, "reward 1.000  KL 0.00", None, None, 80)
    assert "tokens/s" not in line and "left" not in line and "reward 1.000" in line


class Model:
    num_timesteps = 0

    def progress_text(self, shown: object) -> str:
        return "loss 1.000"


def test_the_rate_is_that_of_whole_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("textgym.agents.common.progress.time.monotonic", lambda: clock[0])
    bar, model = ProgressCallback(), Model()
    bar.model = model  # type: ignore[assignment]
    bar.on_training_start({"total_timesteps": 1000}, {})
    for _ in range(2):
        bar.on_rollout_start()
        assert model.num_timesteps or bar._rate is None
        model.num_timesteps += 100
        clock[0] += 1.0  # sampling
        bar.on_rollout_end()
        clock[0] += 9.0  # the update
    assert bar._rate == 10.0  # after one iteration: 100 tokens in 10 s, not 100 in 1 s
    assert "1:20 left" in bar.line(80)  # 800 tokens
    bar.on_rollout_start()
    assert bar._rate == 10.0
    bar.on_training_end()
