import math
import shutil
from pathlib import Path

import pytest

from textgym.cli.plots import over_root_kl, plot_runs
from textgym.cli.run_folder import RunFolder


def size(path: str) -> tuple[int, int]:
    """Width and height of a PNG."""
    header = Path(path).read_bytes()[16:24]
    return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")


def test_rewards_over_the_root_of_the_kl() -> None:
    rows = [
        {"eval/kl_per_sequence": 4.0, "eval/reward_mean": 1.0},
        {"eval/kl_per_sequence": -0.1, "eval/reward_mean": 2.0},  # an estimate may be below 0
        {"eval/reward_mean": 3.0},
        {"eval/kl_per_sequence": 2.0},
    ]
    assert over_root_kl(rows, "eval/reward_mean") == ([2.0, 0.0], [1.0, 2.0])


def test_several_runs_in_one_picture(textgym, run, capsys) -> None:
    shutil.copytree(run, "other/run")
    shutil.copytree(run, "third")
    assert textgym("plot", "run", "other/run", "third") == 0
    assert capsys.readouterr().out.strip() == "curves.png"
    # Reward, true reward, KL, loss is not held out, both rewards over √KL: three columns, two lines.
    assert size("curves.png") == (1650, 792)
    assert textgym("plot", "run", "--label", "PPO", "--out", "mine.png") == 0
    assert size("mine.png") == (1650, 792)


def test_the_legend_names_each_run(monkeypatch, tmp_path) -> None:
    import matplotlib.figure

    seen = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: seen.append(figure))
    row = {"time/total_timesteps": 5.0, "eval/reward_mean": 1.0, "eval/kl_per_sequence": 9.0}
    plot_runs([("first", [row]), ("without data", []), ("third", [row, {**row, "eval/reward_mean": 2.0}])], tmp_path / "x.png")
    (figure,) = seen
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "without data", "third"]
    panels = {(axes.get_title(), axes.get_xlabel()): axes for axes in figure.axes}
    over_kl = panels["reward", "√KL to the reference"]
    assert over_kl.get_lines()[2].get_xydata().tolist() == [[3.0, 1.0], [3.0, 2.0]]
    assert len({line.get_color() for line in over_kl.get_lines()}) == 3
    assert math.isclose(panels["reward", "tokens"].get_lines()[0].get_xydata()[0, 0], 5.0)


def test_runs_without_measurements_are_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="none of the runs"):
        plot_runs([("a", [{"time/total_timesteps": 1.0}])], tmp_path / "x.png")


def test_curves_begin_with_what_was_measured_before_training(run) -> None:
    folder = RunFolder(run)
    rows = folder.curve_rows()
    before = folder.read_summary()["before"]
    assert rows[0]["time/total_timesteps"] == 0.0 and rows[0]["eval/reward_mean"] == before["reward"]
    assert rows[1:] == folder.read_metrics()


def test_runs_of_reward_models_have_their_own_panels(textgym, run, monkeypatch, capsys) -> None:
    import matplotlib.figure

    from textgym.feedback import Comparison, write_feedback

    titles: list[str] = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, path, **_: titles.extend(axes.get_title() for axes in figure.axes)
    )
    write_feedback("feedback.jsonl", [Comparison(f"the film was {i}", " good.", " bad.") for i in range(20)])
    command = ["reward", "--feedback", "feedback.jsonl", "--batch-size", "4", "--no-normalise", "--device", "cpu", "--out"]
    assert textgym(*command, "first") == 0
    shutil.copytree("first", "second")
    titles.clear()
    assert textgym("plot", "first", "second") == 0
    assert [title.partition(":")[0] for title in titles] == ["loss", "accuracy", "margin"]
    assert not any("implicit" in title for title in titles)
    assert textgym("plot", "first", "run") == 2
    assert "first is a run of textgym reward" in capsys.readouterr().err
