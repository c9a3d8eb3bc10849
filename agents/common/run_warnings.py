"""`RunWarnings`: what a run has been told already. Each sentence of `textgym.agents.common.diagnostics` goes out once in a run."""

import sys
import warnings
from collections.abc import Iterable
from typing import Any

from stable_baselines3.common.logger import Logger

from textgym.agents.common.diagnostics import Finding
from textgym.errors import TrainingWarning

_INSIDE = ("textgym", "stable_baselines3", "torch", "contextlib")


class RunWarnings:
    """Tells findings, each once, when they have lasted long enough: as a `TrainingWarning` and in the log.

    It is part of a checkpoint, so a resumed run does not repeat what the run was told before.
    """

    def __init__(self) -> None:
        self.told: set[str] = set()
        self.noted: set[str] = set()
        self._lasting: dict[str, tuple[int, int]] = {}  # observations in a row with the symptom, and items in them

    def observe(self, findings: Iterable[Finding], logger: Logger) -> None:
        """Takes what checks found, and tells what has lasted.

        Args:
            findings: one of each check.
            logger: the sentences go there, too, at its level `WARN`.
        """
        for finding in findings:
            if finding.name in self.told:
                continue
            if finding.sentence is None:
                self._lasting.pop(finding.name, None)
                continue
            observations, items = self._lasting.get(finding.name, (0, 0))
            observations, items = observations + 1, items + finding.items
            self._lasting[finding.name] = (observations, items)
            if observations >= finding.lasting and items >= finding.at_least:
                self.tell(finding.name, finding.sentence, logger)

    def tell(self, name: str, sentence: str, logger: Logger) -> None:
        """Tells a sentence, if it was not told before."""
        if name in self.told:
            return
        self.told.add(name)
        self._lasting.pop(name, None)
        logger.warn(sentence)
        warnings.warn(sentence, TrainingWarning, stacklevel=_callers_level())

    def note(self, fact: str) -> None:
        """Remembers a fact of the run, for checks that depend on what was before."""
        self.noted.add(fact)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run has to know, as JSON types."""
        return {
            "told": sorted(self.told),
            "noted": sorted(self.noted),
            "lasting": {name: list(both) for name, both in self._lasting.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.told, self.noted = set(state["told"]), set(state["noted"])
        self._lasting = {name: (both[0], both[1]) for name, both in state["lasting"].items()}


def _callers_level() -> int:
    """The `stacklevel` at which a warning of `tell` points to the line of the user's that trains, not into a library."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    return level
