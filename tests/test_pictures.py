"""Every picture of the documentation is drawn by one script, from the figures that lie beside it."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pictures

    yield pictures
    sys.modules.pop("pictures")


def test_every_picture_has_somebody_who_draws_it(pictures: Any) -> None:
    assert {path.stem for path in (ROOT / "docs" / "images").glob("*.png")} == set(pictures.PICTURES)


@pytest.mark.parametrize("name", ["fine_grained", "scaling", "win_rates"])
def test_a_picture_is_drawn_from_the_figures(name: str, pictures: Any, tmp_path: Path) -> None:
    pictures.main([name, "--out", str(tmp_path)])
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_there_is_not(pictures: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pictures.main(["win_rate"])
    assert "there is no picture 'win_rate'; the pictures are default_task" in capsys.readouterr().err
