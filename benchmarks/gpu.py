"""Everything that has to hold and everything that counts on one GPU, in one command of at most eight minutes.

    python benchmarks/gpu.py [--device cuda] [--minutes 8] [--small] [--only TEXT ...] [--out gpu.json]

Checked: what is generated, what is scored and what transformers says are one distribution, in float32 and bfloat16; captured decode steps
do what the steps do; PPO's ratio is 1 and the KL 0 before the first step; a resumed run ends where an uninterrupted one does; every learner
learns for three iterations. Measured: sampled tokens per second beside transformers' `generate` (growing, static and compiled caches),
iterations beside TRL (if installed), memory; models of 1.1 million parameters and in the shapes of SmolLM2-135M and Qwen2-0.5B, with random
weights, up to 512 rows.

Each part runs in a worker process with a time limit of its own. A part that raises, hangs or takes the process down is named, the worker
is replaced, and the next part begins; after each part the file is written anew, so that nothing that was found is lost. The exit status is
1 if any part failed.

`--small` takes sizes that a CPU does in about a minute; `--device cpu --small` is run by the tests.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import common
import gpu_parts
import torch

START_SECONDS = 120  # of a worker, which imports torch and finds the device
ON_A_CPU = 10  # times the limit of a part, which is meant for a GPU: a busy CPU is slow, and there only a part that hangs is to be stopped


def work(connection: Connection, device: str, small: bool) -> None:
    """The worker: runs the parts that it is told to, and sends what came out of each."""
    task = gpu_parts.Task(torch.device(device), gpu_parts.SMALL if small else gpu_parts.FULL)
    known = gpu_parts.parts(*task)
    connection.send("ready")
    while True:
        try:
            run, _ = known[connection.recv()]
        except EOFError:  # nothing more to do
            return
        try:
            figures = run(task)
            if task.device.type != "cpu":
                torch.accelerator.synchronize(task.device)  # what has gone wrong there belongs to this part
            connection.send({"figures": {name: figure._asdict() for name, figure in figures.items()}})
        except Exception as error:
            where = traceback.format_exc().splitlines()[-12:]
            connection.send({"figures": {}, "error": f"{type(error).__name__}: {error}"[:2000], "traceback": where})


class Worker:
    """A process that runs parts, replaced whenever one has left it in doubt.

    Args:
        device: where the parts run.
        small: of small sizes.
    """

    def __init__(self, device: str, small: bool) -> None:
        self._arguments = device, small
        self._process: Any = None
        self._connection: Connection

    def run(self, name: str, seconds: float) -> dict[str, Any]:
        """Runs a part and returns its figures, and what went wrong if anything did."""
        if self._process is None:
            self._start()
        self._connection.send(name)
        try:
            if not self._connection.poll(seconds):
                self.stop()
                return {"figures": {}, "error": f"took longer than {seconds:.0f} seconds and was stopped"}
            found: dict[str, Any] = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            self.stop()
            return {"figures": {}, "error": f"the process died with exit code {code}"}
        if "error" in found:
            self.stop()  # an accelerator may be of no use to it after an error
        return found

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=work, args=(other, *self._arguments), daemon=True)
        self._process.start()
        other.close()
        if not self._connection.poll(START_SECONDS) or self._connection.recv() != "ready":
            self.stop()
            raise RuntimeError(f"a worker process was not ready within {START_SECONDS} seconds")

    def finish(self) -> None:
        """Lets the process end by itself."""
        if self._process is not None:
            self._connection.close()
            self._process.join(10)
        self.stop()

    def stop(self) -> None:
        """Ends the process, whatever it does; the next part gets a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def verdict(result: dict[str, Any]) -> str:
    """Says how a part ended: "skipped", "failed", "passed" (checks) or "measured"."""
    if "skipped" in result:
        return "skipped"
    figures = [gpu_parts.Figure(**figure) for figure in result["figures"].values()]
    if "error" in result or not all(figure.is_right for figure in figures):
        return "failed"
    return "passed" if any(figure.limit is not None for figure in figures) else "measured"


def show(name: str, result: dict[str, Any]) -> None:
    """Prints a part: of checks the worst figures only, unless one is wrong."""
    print(f"{verdict(result):<9} {name}  ({result.get('seconds', 0):.0f} s)", flush=True)
    for line in (result.get("error"), *result.get("traceback", ())):
        if line:
            print(f"    {line}")
    for what, values in result["figures"].items():
        figure = gpu_parts.Figure(**values)
        if figure.limit is None:
            print(f"    {what:<60}{number(figure.value):>14}")
        elif not figure.is_right:
            print(f"    WRONG {what:<54}{number(figure.value):>14}    at most {figure.limit:g}")
    checked = [figure for figure in map(lambda values: gpu_parts.Figure(**values), result["figures"].values()) if figure.limit is not None]
    if checked:
        print(f"    {sum(figure.is_right for figure in checked)} of {len(checked)} figures within their limits")


def number(value: float) -> str:
    """Returns a figure as a table shows it."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def parser() -> argparse.ArgumentParser:
    result = common.parser(__doc__, device="cuda")
    result.add_argument("--minutes", type=float, default=8.0, help="for all parts; what does not fit is named as skipped; default: 8")
    result.add_argument("--small", action="store_true", help="small sizes, for a CPU")
    result.add_argument("--only", nargs="+", default=None, metavar="TEXT", help="parts whose names contain one of these")
    return result


def main() -> int:
    """Runs the parts, prints the table and writes the file."""
    options = parser().parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that torch can use; `--device cpu --small` runs the same parts on the CPU.", file=sys.stderr)
        return 2
    until = time.monotonic() + 60 * options.minutes
    wanted = gpu_parts.parts(device, gpu_parts.SMALL if options.small else gpu_parts.FULL)
    if options.only is not None:
        wanted = {name: part for name, part in wanted.items() if any(text in name for text in options.only)}
    patience = ON_A_CPU if device.type == "cpu" else 1
    document: dict[str, Any] = {"setting": common.setting(device), "small": options.small, "parts": {}}
    worker = Worker(options.device, options.small)
    for name, (_, seconds) in wanted.items():
        left = until - time.monotonic()
        if left < 5:
            result: dict[str, Any] = {"figures": {}, "skipped": "no time was left"}
        else:
            start = time.monotonic()
            try:
                result = worker.run(name, min(patience * seconds, left))
            except RuntimeError as error:
                result = {"figures": {}, "error": str(error)}
            result["seconds"] = time.monotonic() - start
        document["parts"][name] = result | {"verdict": verdict(result)}
        common.write(options.out, json_numbers(document))
        show(name, result)
    worker.finish()
    return summary(document)


def summary(document: dict[str, Any]) -> int:
    """Prints how many parts ended how, and returns the exit status."""
    verdicts = [result["verdict"] for result in document["parts"].values()]
    print("; ".join(f"{verdicts.count(kind)} {kind}" for kind in ("passed", "measured", "failed", "skipped")))
    for name, result in document["parts"].items():
        if result["verdict"] in ("failed", "skipped"):
            print(f"{result['verdict']}: {name}")
    return int("failed" in verdicts)


def json_numbers(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the document with null in the place of what is no number, which JSON does not have."""
    found: dict[str, Any] = json.loads(json.dumps(document), parse_constant=lambda _: None)
    return found


if __name__ == "__main__":
    sys.exit(main())
