"""Decode steps as recorded launches: on a GPU a step of a small model takes longer to ask for than to compute."""

import warnings
from collections.abc import Callable

import torch

Step = Callable[[], None]


def capture_on_cuda(step: Step) -> Step:
    """Records what `step` launches, and returns a function that launches all of it at once.

    Args:
        step: reads and writes tensors that stay where they are, and asks the device for nothing. It has run before, so that libraries have
            allocated what they need.

    Returns:
        The replay; `step` itself, with a warning, where something in it cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        warnings.warn(f"Decode steps are launched one kernel at a time, since they could not be captured: {error}", stacklevel=2)
        return step
    return graph.replay


CAPTURES: dict[str, Callable[[Step], Step]] = {"cuda": capture_on_cuda}
"""How steps are captured, by the type of device; on others every step is run anew."""


class RepeatedStep:
    """A step that is run as it is the first time, captured the second time, and replayed from then on.

    Args:
        step: see `capture_on_cuda`.
        device: where it runs; of a type that `CAPTURES` has.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._capture = step, CAPTURES[device.type]
        self._replay: Step | None = None
        self._warm = False

    def __call__(self) -> None:
        """Takes the step."""
        if not self._warm:
            self._warm = True
            self._step()
            return
        if self._replay is None:
            self._replay = self._capture(self._step)
        self._replay()
