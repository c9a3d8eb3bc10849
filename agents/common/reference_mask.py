"""`ReferenceMask`: the tokens that a frozen reference thinks probable, as the mask of the policy that is trained."""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from torch import Tensor

from textgym.agents.common.acting import ActingState
from textgym.agents.common.cached_decoder import PolicyMask
from textgym.agents.common.sampling import Sampling, TokenRule
from textgym.agents.common.scoring import Rows, kept_along
from textgym.agents.policy import CausalLMPolicy


class ReferenceMask:
    """The top-k or top-p set of a reference, the same for ever: a `TokenMask`.

    Args:
        reference: the frozen model that decides.
        sampling: its temperature, top-k, top-p and min-p.
    """

    def __init__(self, reference: CausalLMPolicy, sampling: Sampling) -> None:
        self.reference, self.rule = reference, TokenRule(sampling)
        self._acting = ActingState()

    def masker(self) -> PolicyMask:
        """See `TokenMask`: one more cached forward pass per decode step."""
        return PolicyMask(self.reference.backbone, self.rule)

    def at(self, observations: Mapping[str, npt.NDArray[Any]]) -> Tensor:
        """See `TokenMask`: observations that grow by a token per call cost one cached step each."""
        return self.rule(self._acting.observe(self.reference.backbone, observations))

    def along(self, layout: Rows) -> Tensor:
        """See `TokenMask`: one teacher-forced pass."""
        return kept_along(self.reference.backbone, layout, self.rule)
