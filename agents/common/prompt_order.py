"""Which prompt comes next: owned by the agent, so that a resumed run sees the prompts an uninterrupted one would have seen."""

from typing import Any

import numpy as np

from textgym.types import IntArray


class PromptOrder:
    """Goes through all prompts in random order, again and again; every pass is a new permutation.

    Args:
        num_prompts: how many there are.
        generator: the source of the permutations.
    """

    def __init__(self, num_prompts: int, generator: np.random.Generator) -> None:
        self.num_prompts = num_prompts
        self._generator = generator
        self._queue: IntArray = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> IntArray:
        """Returns the next `count` prompt indices, (count,)."""
        while len(self._queue) < count:
            self._queue = np.concatenate([self._queue, self._generator.permutation(self.num_prompts)])
        taken, self._queue = self._queue[:count], self._queue[count:]
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as JSON types."""
        return {"num_prompts": self.num_prompts, "queue": self._queue.tolist(), "generator": self._generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._queue = np.asarray(state["queue"], dtype=np.int64)
        self._generator.bit_generator.state = state["generator"]
