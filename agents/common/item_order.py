"""Which prompt or example comes next: owned by the agent, so that a resumed run sees what an uninterrupted one would have seen."""

from typing import Any

import numpy as np

from textgym.types import IntArray


class ItemOrder:
    """Goes through all items (prompts, examples) in random order, again and again; every pass is a new permutation.

    Args:
        num_items: how many there are.
        generator: the source of the permutations.
    """

    def __init__(self, num_items: int, generator: np.random.Generator) -> None:
        self.num_items = num_items
        self._generator = generator
        self._queue: IntArray = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> IntArray:
        """Returns the indices of the next `count` items, (count,)."""
        while len(self._queue) < count:
            self._queue = np.concatenate([self._queue, self._generator.permutation(self.num_items)])
        taken, self._queue = self._queue[:count], self._queue[count:]
        return taken

    @property
    def left(self) -> int:
        """How many items are left of the present pass; 0 between two passes."""
        return len(self._queue)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as JSON types."""
        return {"num_items": self.num_items, "queue": self._queue.tolist(), "generator": self._generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._queue = np.asarray(state["queue"], dtype=np.int64)
        self._generator.bit_generator.state = state["generator"]
