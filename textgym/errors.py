"""The exceptions and warnings a user may want to catch. Everything else that is wrong with an argument is a plain `ValueError`."""

from typing import Any


class RewardError(ValueError):
    """A reward function returned something unusable: the wrong count, NaN, or nothing for a row."""


class EpisodeEndedError(ValueError):
    """An environment was stepped after its episode had ended, without a reset in between."""


class StalePolicyError(RuntimeError):
    """KL shaping was asked to score with a policy that it does not have, or with a copy that no longer follows the agent's."""


class FeedbackError(ValueError):
    """Rows of feedback break the rules of their form.

    Attributes:
        feedback: the `textgym.feedback.Feedback` with all that was read: the records of the good rows, and the bad rows.
    """

    def __init__(self, message: str, feedback: Any) -> None:
        super().__init__(message)
        self.feedback = feedback


class FeedbackNeeded(RuntimeError):  # noqa: N818  (no error of the program: somebody's turn)
    """Somebody has to compare completions before learning can go on; the message says which file, and where to put the answers."""


class TrainingWarning(UserWarning):
    """A run goes on, and what it shows says that it does not learn, or not what it should; docs/agents.md has the table of all of them."""
