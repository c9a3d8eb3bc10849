"""The folder of a training run: what lies where, and how to go on with it."""

import csv
import json
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from textgym.cli.algorithms import REWARD, command
from textgym.cli.errors import UserError
from textgym.cli.settings import TrainSettings

if TYPE_CHECKING:
    from stable_baselines3.common.logger import Logger

_PACKAGES = ("textgym", "torch", "transformers", "gymnasium", "stable-baselines3", "numpy")


class Settings(Protocol):
    """What a command was told, as it is stored in `config.json`; one of its entries is `algorithm`."""

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as JSON types."""

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Reads what `to_json` wrote."""


SettingsT = TypeVar("SettingsT", bound=Settings)


class RunFolder:
    """Where a run writes.

    ========================  =====================================================================================
    config.json               the settings, versions, date of the start, and how many rows there are
    progress.csv              one row per iteration; `progress-2.csv`, ... after each resume
    tensorboard/              the same as TensorBoard events
    checkpoint/               the agent: continues exactly
    model/                    the trained policy, as transformers (and `textgym generate --model RUN`) reads it
    best-model/               the policy with the best held-out reward (at most at `--max-kl`)
    samples-before.jsonl      held-out samples of the policy before training, with their rewards; `samples-after.jsonl` after it
    samples.txt               the first six of both, side by side
    summary.json              rewards and KL before and after
    curves.png                reward, true reward and KL over timesteps
    warnings.txt              what the run was warned of, one sentence a line, where there was anything
    error.txt                 the traceback, where a reward or callback failed
    ========================  =====================================================================================
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.checkpoint = path / "checkpoint"
        self.model = path / "model"
        self.best_model = path / "best-model"
        self.tensorboard = path / "tensorboard"
        self.summary = path / "summary.json"
        self.curves = path / "curves.png"
        self.samples_text = path / "samples.txt"
        self.error = path / "error.txt"

    @classmethod
    def choose(cls, algorithm: str, out: Path | None, force: bool) -> "RunFolder":
        """Returns the folder of a new run; nothing is written or removed yet.

        Args:
            algorithm: part of a chosen name.
            out: the folder; None takes a new one, `runs/<algorithm>-<date>-<time>`.
            force: the run that is in `out` may be replaced.

        Raises:
            UserError: `out` is there already and holds something (with `force`: something that is no run).
        """
        folder = cls(out or new_path(Path("runs"), algorithm))
        if folder._is_free():
            return folder
        if not force:
            resume = f", or go on with it: {folder.resume_command()}" if folder.checkpoint.exists() else ""
            raise UserError(f"--out {out} exists and is not empty: choose another folder, or replace it with --force{resume}")
        if not folder.config.is_file():
            raise UserError(f"--out {out} holds no run (there is no config.json in it), so --force does not replace it.")
        return folder

    def _is_free(self) -> bool:
        return not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())) or self._holds_nothing_but_an_error()

    def _holds_nothing_but_an_error(self) -> bool:
        """Whether its run failed before anything was measured."""
        return self.path.is_dir() and {item.name for item in self.path.iterdir()} == {self.config.name, self.error.name}

    def create(self, settings: Settings, **further: Any) -> None:
        """Makes the folder, in the place of the run that is there, and writes `config.json`, with `further` entries."""
        if self.path.is_dir() and any(self.path.iterdir()):
            shutil.rmtree(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.path} cannot be made: {error.strerror or error}.") from error
        document = {"settings": settings.to_json(), "started": time.strftime("%Y-%m-%d %H:%M:%S"), "versions": versions(), **further}
        write_json(self.config, document)

    def set_aside(self) -> None:
        """Moves the run that is in the folder out of the way, until `settle` or `give_back` says what becomes of it."""
        if self.path.is_dir():
            shutil.rmtree(self._aside, ignore_errors=True)
            try:
                self.path.rename(self._aside)
            except OSError as error:
                raise UserError(f"--out {self.path} cannot be replaced: {error.strerror or error}.") from error

    def settle(self) -> None:
        """Removes the run that was set aside, if there was one."""
        shutil.rmtree(self._aside, ignore_errors=True)

    def give_back(self) -> None:
        """Puts the run that was set aside back in the place of the new one, if there was one."""
        if self._aside.is_dir() and any(self._aside.iterdir()):
            shutil.rmtree(self.path, ignore_errors=True)
            self._aside.rename(self.path)

    @property
    def _aside(self) -> Path:
        return self.path.with_name(f".{self.path.name}.replaced")

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Opens the folder of an earlier run, to go on.

        Raises:
            UserError: there is none, or it has no checkpoint.
        """
        folder = cls(path)
        if not folder.config.is_file():
            raise UserError(f"--resume {path}: there is no run (no config.json in that folder).")
        if not (folder.checkpoint / "agent.json").is_file():
            raise UserError(f"--resume {path}: this run has no checkpoint yet; start it again.")
        return folder

    @classmethod
    def of_model(cls, given: str | None) -> "RunFolder | None":
        """Returns the run whose folder was given in the place of a model; None if `given` is a model itself, or an id."""
        folder = cls(Path(given or ""))
        is_run = given is not None and folder.config.is_file() and folder.model.is_dir()
        return folder if is_run and not (folder.path / "model.safetensors").exists() else None

    def curve_rows(self) -> list[dict[str, float]]:
        """Returns what was logged with, before it, what was measured on held-out prompts before training."""
        before = self.read_summary().get("before", {})
        names = {"reward": "eval/reward_mean", "true_reward": "eval/true_reward_mean", "kl_per_sequence": "eval/kl_per_sequence"}
        start = {TIMESTEPS: 0.0, **{metric: before[name] for name, metric in names.items() if before.get(name) is not None}}
        return [start, *self.read_metrics()]

    def settings(self) -> TrainSettings:
        """Reads the settings of a run of `textgym train` or `textgym sft`."""
        if self.algorithm == REWARD:
            raise UserError(f"{self.path} is a run of textgym reward, which trains no policy.")
        return self.read_settings(TrainSettings)

    def read_settings(self, kind: type[SettingsT]) -> SettingsT:
        """Reads the settings of the run, which are of the class `kind`."""
        try:
            return kind.from_json(json.loads(self.config.read_text(encoding="utf-8"))["settings"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{self.config} is not the config of a run that this version can read ({error!r}).") from error

    @property
    def algorithm(self) -> str:
        """What the run trains with."""
        try:
            return str(json.loads(self.config.read_text(encoding="utf-8"))["settings"]["algorithm"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{self.config} is not the config of a run that this version can read ({error!r}).") from error

    def change_settings(self, settings: Settings) -> None:
        """Replaces the settings in `config.json`; the rest of it stays."""
        document = json.loads(self.config.read_text(encoding="utf-8"))
        write_json(self.config, {**document, "settings": settings.to_json()})

    def resume_command(self) -> str:
        """Returns the command that goes on with the run."""
        return f"{command(self.algorithm)} --resume {shlex.quote(str(self.path))}"

    def logger(self) -> "Logger":
        """Returns a logger that writes the next `progress.csv` and TensorBoard events; close it in the end."""
        from stable_baselines3.common.logger import Logger, make_output_format

        from textgym.cli.warnings_file import WarningsFile

        csv_format = make_output_format("csv", str(self.path), self.metrics_suffix())
        tensorboard = make_output_format("tensorboard", str(self.tensorboard))
        return Logger(str(self.path), [csv_format, tensorboard, WarningsFile(self.path / "warnings.txt")])  # type: ignore[list-item]

    def metrics_suffix(self) -> str:
        """Returns what to append to the name of the next `progress.csv`, so that none is overwritten."""
        count = len(self.metrics_files())
        return f"-{count + 1}" if count else ""

    def metrics_files(self) -> list[Path]:
        """Returns the metrics files in the order they were written."""
        return sorted(self.path.glob("progress*.csv"), key=lambda path: (len(path.name), path.name))

    def read_metrics(self) -> list[dict[str, float]]:
        """Returns one dict per logged iteration with the numbers that it has.

        Where a run was resumed from a checkpoint older than its last row, the rows after the checkpoint were trained again: the later
        file holds.
        """
        rows: list[dict[str, float]] = []
        for path in self.metrics_files():
            with path.open(encoding="utf-8", newline="") as file:
                fresh = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
            first = fresh[0][TIMESTEPS] if fresh else float("inf")
            rows = [row for row in rows if row[TIMESTEPS] < first] + fresh
        return rows

    def read_summary(self) -> dict[str, Any]:
        """Returns what has been measured so far."""
        summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8")) if self.summary.exists() else {}
        return summary

    def samples(self, when: str) -> Path:
        """Returns the file of the samples `"before"` or `"after"` training."""
        return self.path / f"samples-{when}.jsonl"


TIMESTEPS = "time/total_timesteps"


def is_run_config(path: Path) -> bool:
    """Whether a `config.json` is that of a run, and not of a model."""
    try:
        return path.is_file() and "settings" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def new_path(parent: Path, algorithm: str) -> Path:
    """Returns a path that does not exist: two runs may start in the same second."""
    path = parent / f"{algorithm}-{time.strftime('%Y%m%d-%H%M%S')}"
    count = 1
    while path.exists():
        count += 1
        path = path.with_name(f"{path.name.partition('_')[0]}_{count}")
    return path


def versions() -> dict[str, str]:
    """Returns the versions of Python and of what decides about numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a bare checkout
            found[package] = "unknown"
    return found


def write_json(path: Path, document: Any) -> None:
    """Writes a JSON document; what is there is replaced only when all of the new one is on the disk."""
    fresh = path.with_name(f".{path.name}.saving")
    try:
        fresh.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def save_whole(save: Callable[[Path], object], folder: Path) -> None:
    """Has a folder written by `save`; what is there is replaced only when all of the new one is on the disk."""
    fresh = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        save(fresh)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.replace(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_json_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
