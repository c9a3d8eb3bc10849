"""Infos of vector environments and of their rows."""

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from textgym.vector_infos import batched_infos, put, row_info, row_infos

ROWS: list[dict[str, Any]] = [
    {"number": 3, "score": 0.5, "text": "a", "parts": {"x": 1.0}, "ids": [1, 2]},
    {"score": 1.5, "parts": {"y": 2.0}, "grid": np.arange(3)},
    {},
]


def gymnasium_infos() -> dict[str, Any]:
    envs, infos = VectorEnv(), {}
    envs.num_envs = len(ROWS)
    for i, row in enumerate(ROWS):
        infos = envs._add_info(infos, row, i)
    return infos


def assert_row(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert row.keys() == expected.keys()
    for key in row:
        if isinstance(row[key], dict):
            assert_row(row[key], expected[key])
        else:
            assert type(row[key]) is type(expected[key])
            np.testing.assert_array_equal(row[key], expected[key])


def test_rows_come_back_out_of_gymnasiums_infos_and_ours() -> None:
    for infos in (gymnasium_infos(), batched_infos(ROWS)):
        for i, row in enumerate(ROWS):
            assert_row(row_info(infos, i), row)


def test_several_rows_at_once_are_those_rows() -> None:
    for infos in (
        gymnasium_infos(),
        batched_infos(ROWS),
        {"short": np.array([1, 2]), "listed": ["a", "b", "c"], "few": (7,), "note": "all"},
    ):
        for rows in ([0, 1, 2], [2, 0], [1], []):
            together = row_infos(infos, rows)
            assert len(together) == len(rows)
            for row, info in zip(rows, together, strict=True):
                assert_row(info, row_info(infos, row))
    assert row_infos({"short": np.array([1, 2]), "few": (7,)}, [2, 1]) == [{"few": (7,)}, {"short": 2, "few": (7,)}]


def test_rows_share_no_arrays_with_the_batch() -> None:
    grid = np.zeros((2, 3))
    first, second = row_infos({"grid": grid}, [0, 1])
    first["grid"][:] = 1.0
    assert not grid.any() and not second["grid"].any()


def test_batches_have_gymnasiums_types_and_masks() -> None:
    ours, theirs = batched_infos(ROWS), gymnasium_infos()
    assert ours.keys() == theirs.keys()
    for key in ("number", "score", "text", "ids"):
        assert ours[key].dtype == theirs[key].dtype
        np.testing.assert_array_equal(ours[f"_{key}"], theirs[f"_{key}"])


def test_keys_without_a_mask() -> None:
    """`RecordEpisodeStatistics` nests arrays without masks; other wrappers may add anything."""
    infos = {"episode": {"r": np.array([1.0, 2.0]), "l": np.array([3, 4])}, "_episode": np.array([False, True]), "note": "all"}
    assert row_info(infos, 0) == {"note": "all"}
    assert row_info(infos, 1) == {"episode": {"r": 2.0, "l": 4}, "note": "all"}


def test_put_marks_its_rows() -> None:
    infos: dict[str, Any] = {}
    rows = np.array([True, False])
    put(infos, "a", np.array([1.0, 2.0]), rows)
    put(infos, "b", np.array([1.0, 2.0]), np.array([False, False]))
    rows[:] = False
    assert infos.keys() == {"a", "_a"} and infos["a"].tolist() == [1.0, 0.0] and infos["_a"].tolist() == [True, False]
