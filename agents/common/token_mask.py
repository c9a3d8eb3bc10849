"""Masks over the vocabulary that depend on the state, as a part of a policy's distribution: for sampling and for scoring alike."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt
from torch import Tensor

from textgym.agents.common.action_masks import ActionMasker
from textgym.agents.common.layout import Rows


class TokenMask(Protocol):
    """Says which tokens are legal: while completions are sampled, at observations, and along completions. The three must agree."""

    def masker(self) -> ActionMasker:
        """Returns what follows one decode loop."""
        ...

    def at(self, observations: Mapping[str, npt.NDArray[Any]]) -> Tensor:
        """Returns the legal tokens at batched observations of the environment, (B, V) bool."""
        ...

    def along(self, layout: Rows) -> Tensor:
        """Returns the packed legal sets at the states of completions, (N, ceil(V/8)) uint8, one per completion token."""
        ...
