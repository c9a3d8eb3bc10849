"""The exceptions a user may want to catch. Everything else that is wrong with an argument is a plain `ValueError`."""


class RewardError(ValueError):
    """A reward function returned something unusable: the wrong count, NaN, or nothing for a row."""


class EpisodeEndedError(ValueError):
    """An environment was stepped after its episode had ended, without a reset in between."""


class StalePolicyError(RuntimeError):
    """KL shaping was asked to score with a policy that it does not have, or with a copy that no longer follows the agent's."""
