"""`ModelMask`: the tokens that a model thinks probable, as the mask of the policy that is trained."""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from torch import Tensor

from textgym.agents.common.acting import ActingState
from textgym.agents.common.action_masks import PolicyMask
from textgym.agents.common.layout import Rows
from textgym.agents.common.sampling import TokenRule
from textgym.agents.common.scoring import kept_along
from textgym.agents.policy import CausalLMPolicy


class ModelMask:
    """What a rule keeps of a model's distribution at each state: a `TokenMask`.

    Args:
        model: who decides; a frozen policy.
        rule: from its logits to the legal tokens.
    """

    def __init__(self, model: CausalLMPolicy, rule: TokenRule) -> None:
        self.model, self.rule = model, rule
        self._acting = ActingState()

    def masker(self) -> PolicyMask:
        """See `TokenMask`: one more cached forward pass per decode step."""
        return PolicyMask(self.model.backbone, self.rule)

    def at(self, observations: Mapping[str, npt.NDArray[Any]]) -> Tensor:
        """See `TokenMask`: observations that grow by a token per call cost one cached step each."""
        return self.rule(self._acting.observe(self.model.backbone, observations))

    def along(self, layout: Rows) -> Tensor:
        """See `TokenMask`: one teacher-forced pass."""
        return kept_along(self.model.backbone, layout, self.rule)
