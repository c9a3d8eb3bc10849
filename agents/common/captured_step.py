"""Decode steps as recorded launches: on a GPU a step of a small model takes longer to ask for than to compute."""

import warnings
from collections.abc import Callable

import torch

Step = Callable[[], None]


def capture_on_cuda(step: Step) -> Step | None:
    """Records what `step` launches, and returns a function that launches all of it at once.

    Args:
        step: reads and writes tensors that stay where they are, and asks the device for nothing. It has run before, so that libraries have
            allocated what they need.

    Returns:
        The replay, which needs these tensors and not `step`; None, with a warning, where something in it cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # What other threads ask of the device, a reward's for one, is no part of it.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        warnings.warn(f"Decode steps are launched one kernel at a time, since they could not be captured: {error}", stacklevel=2)
        return None
    return graph.replay


CAPTURES: dict[str, Callable[[Step], Step | None]] = {"cuda": capture_on_cuda}
"""How steps are captured, by the type of device; on others every step is run anew."""


class RepeatedStep:
    """A step that is run as it is the first time, captured the second time, and replayed from then on.

    Args:
        device: where it runs; of a type that `CAPTURES` has.

    Attributes:
        failed: it could not be captured, and is run as it is for ever.
    """

    def __init__(self, device: torch.device) -> None:
        self._capture = CAPTURES[device.type]
        self._replay: Step | None = None
        self._warm = False
        self.failed = False

    def __call__(self, step: Step) -> None:
        """Takes the step; after its capture `step`, which must be the same each time, is not called."""
        if self._replay is None and self._warm and not self.failed:
            self._replay = self._capture(step)
            self.failed = self._replay is None
        self._warm = True
        (self._replay or step)()
