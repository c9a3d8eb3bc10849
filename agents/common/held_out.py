"""The loss on held-out examples during training, the best model by it, and stopping when it gets no better."""

from pathlib import Path
from typing import Any

from textgym.agents.common.checks import check_count


class HeldOut:
    """Measures a learner from examples on others at intervals; takes the place of an `Evaluation` in an environment.

    Logged: `eval/loss`, and under `eval/` every other number that the learner logs in training.

    Args:
        examples: held-out examples or feedback, in any form that the learner takes.
        interval: optimiser steps between two measurements.
        patience: stop when the loss was not the lowest so far this many times in a row; None never stops.
        best_model_path: folder for the model with the lowest loss so far; None keeps none.

    Attributes:
        best_loss: the lowest loss so far.
        last: the numbers of the last measurement, by log key.
    """

    def __init__(
        self, examples: Any, *, interval: int = 10, patience: int | None = None, best_model_path: str | Path | None = None
    ) -> None:
        check_count("interval", interval, "optimiser steps")
        if patience is not None:
            check_count("patience", patience, "measurements")
        self.interval, self.patience = interval, patience
        self.best_model_path = None if best_model_path is None else Path(best_model_path)
        self.iterations = self.waited = 0
        self.best_loss: float | None = None
        self.last: dict[str, float] = {}
        self._source, self._read = examples, None

    def after_iteration(self, agent: Any) -> bool:
        """Called by the learner after each of its steps; returns whether training shall stop."""
        self.iterations += 1
        if self.iterations % self.interval == 0:
            self.run(agent)
        return self.patience is not None and self.waited >= self.patience

    def run(self, agent: Any) -> dict[str, float]:
        """Measures now, logs, and saves the model if it is the best so far."""
        if self._read is None:
            self._read = agent.read(self._source)
        self.last = {f"eval/{name.rpartition('/')[2]}": value for name, value in agent.numbers_on(self._read).items()}
        for name, value in self.last.items():
            agent.logger.record(name, value)
        loss = self.last["eval/loss"]
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.waited = loss, 0
            if self.best_model_path is not None:
                agent.policy.save_pretrained(self.best_model_path)
        else:
            self.waited += 1
        return self.last

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as JSON types."""
        return {"best_loss": self.best_loss, "waited": self.waited, "iterations": self.iterations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.best_loss, self.waited, self.iterations = state["best_loss"], state["waited"], state["iterations"]
