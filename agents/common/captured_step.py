"""Decode steps as recorded launches: on a GPU a step of a small model takes longer to ask for than to compute."""

import warnings
from collections.abc import Callable

import torch

Step = Callable[[], None]
Agreement = Callable[[Step, Step], bool]

# Replays of a fresh capture that are compared with the step itself: the one of the step that was captured, and the one after it, since a
# number of the host's that the capture has frozen is still right in the first.
CHECKED_REPLAYS = 2


def same_numbers(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results of a step are the same but for rounding: to 1e-3 of the largest number, in half precision to 8 units of it.

    Kernels may be chosen anew for a capture, and round otherwise. What a capture gets wrong, such as a column that stays where it was, is
    off by a multiple of that.
    """
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    scale = float(expected.nan_to_num(posinf=0.0, neginf=0.0).abs().amax())
    tolerance = max(1e-3, 8 * torch.finfo(expected.dtype).eps)
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance * scale, equal_nan=True)


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


class WrongReplayError(RuntimeError):
    """A captured step came to other numbers than the step itself. Whatever it has written to is spoilt."""


class RepeatedStep:
    """A step that is run as it is the first time, captured the second time, and replayed from then on.

    No replay is trusted unchecked: the first `CHECKED_REPLAYS` are compared with the step run as it is.

    Args:
        device: where it runs; of a type that `CAPTURES` has.

    Attributes:
        failed: it could not be captured, and is run as it is for ever.
    """

    def __init__(self, device: torch.device) -> None:
        self._capture = CAPTURES[device.type]
        self._replay: Step | None = None
        self._warm = False
        self._unchecked = CHECKED_REPLAYS
        self.failed = False

    def __call__(self, step: Step, agree: Agreement) -> None:
        """Takes the step.

        Args:
            step: the same each time; after its capture and the checks it is not called.
            agree: takes the step both ways from the same state, by a replay and as it is, and says whether both come to the same.

        Raises:
            WrongReplayError: they do not.
        """
        if self._replay is None and self._warm and not self.failed:
            self._replay = self._capture(step)
            self.failed = self._replay is None
        self._warm = True
        if self._replay is None:
            step()
        elif self._unchecked:
            self._unchecked -= 1
            if not agree(self._replay, step):
                raise WrongReplayError("A captured decode step came to other numbers than the step itself.")
        else:
            self._replay()
