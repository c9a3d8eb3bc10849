"""What the measuring scripts share: options, the candidates taking turns, jobs, intervals over seeds, the file of results.

    import common

    options = common.parser(__doc__, device="auto", repeats=7).parse_args()
    rates = common.alternate({"ours": common.per_second(ours), "theirs": common.per_second(theirs)}, options.repeats)
    common.write(options.out, {"setting": common.setting("cpu"), "calls per second": rates})

The scripts import it as their neighbour: run them as `python benchmarks/NAME.py`.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from textgym.cli.timing import alternate, per_second

__all__ = [
    "again",
    "alternate",
    "each_in",
    "free_memory",
    "interval",
    "machine",
    "parser",
    "peak",
    "per_second",
    "processor",
    "reset_peak",
    "setting",
    "write",
]

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # the 97.5 % quantile for 1, 2, ... degrees of freedom

OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "device": (str, "where the models are"),
    "repeats": (int, "measured rounds"),
    "seeds": (int, "how many seeds"),
    "first_seed": (int, "the first of them"),
    "jobs": (int, "processes, of one thread each"),
    "work": (Path, "keep what the seeds prepare in this folder, and use what is there"),
    "plot": (Path, "draw the results to this PNG file"),
}


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Returns a parser with `--out`, and those of `OPTIONS` that a default is given for; None is the default of what may be left out.

    A description of several lines, such as a script's docstring, is printed as it stands.
    """
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        kind, told = OPTIONS[name]
        told = told if default is None else f"{told}; default: {default}"
        result.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=told)
    result.add_argument("--out", type=Path, default=None, help="write the numbers to this JSON file")
    return result


def write(out: Path | None, document: Mapping[str, Any] | list[Any]) -> None:
    """Writes the results as JSON; nothing where no file is asked for."""
    if out is not None:
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def setting(device: torch.device | str) -> dict[str, Any]:
    """Returns what a figure depends on besides the script: device, threads, versions, machine."""
    device = torch.device(device)
    about = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        about["device_name"] = torch.cuda.get_device_name(device)
    return about | {"transformers": importlib.metadata.version("transformers"), "machine": processor()}


def machine(jobs: int, *more: str) -> str:
    """Returns the same for a script of several jobs, in one line."""
    return ", ".join((processor(), f"{jobs} jobs", *more, f"torch {torch.__version__}"))


def processor() -> str:
    """Returns the processor's name, as far as the system tells."""
    return platform.processor() or platform.machine()


@contextmanager
def each_in(jobs: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Gives a `map` that works in `jobs` processes; one job runs here."""
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield pool.map


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean and half the width of its 95 % interval, by Student's t; nan for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    return mean, float(STUDENT_T[len(values) - 2] * np.std(values, ddof=1) / len(values) ** 0.5)


def again(*arguments: str) -> dict[str, Any] | None:
    """Runs this script once more with further arguments, in a process of its own; returns the JSON of its last line.

    Returns None if it was killed, as the system does with a process that asks for more memory than there is.
    """
    # `-P` is not handed down by itself.
    done = subprocess.run([sys.executable, *(["-P"] if sys.flags.safe_path else []), *sys.argv, *arguments], stdout=subprocess.PIPE)
    if done.returncode < 0:
        return None
    done.check_returncode()
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def reset_peak(device: torch.device | str) -> float:
    """Starts a new peak of memory; returns what is held now, in bytes.

    On the CPU that is the resident memory of this process, as Linux tells it; on an accelerator what torch has allocated there.
    """
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return float(torch.accelerator.memory_allocated(device))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _of_proc("self/status", "VmRSS")


def peak(device: torch.device | str) -> float:
    """Returns the most memory held since `reset_peak`, in bytes."""
    device = torch.device(device)
    return float(torch.accelerator.max_memory_allocated(device)) if device.type != "cpu" else _of_proc("self/status", "VmHWM")


def free_memory(device: torch.device | str) -> float:
    """Returns what is still to be had, in bytes."""
    device = torch.device(device)
    return float(torch.accelerator.get_memory_info(device)[0]) if device.type != "cpu" else _of_proc("meminfo", "MemAvailable")


def _of_proc(file: str, field: str) -> float:
    lines = Path("/proc", file).read_text(encoding="utf-8").splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
