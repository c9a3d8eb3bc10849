"""`LaggedMask`: the tokens that an earlier version of a policy thinks probable, as that policy's own mask."""

import copy
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from textgym.agents.common.model_mask import ModelMask
from textgym.agents.common.sampling import Sampling, TokenRule
from textgym.agents.policy import CausalLMPolicy


class LaggedMask(ModelMask):
    """The top-p set of a lagged copy of a policy, at the policy's temperature: a `TokenMask`.

    The copy holds parameters of its own only where the policy has trainable ones (a LoRA policy: the adapter); the rest is shared.
    Every place that asks, the decode loop included, goes to the one copy that `refresh` moves.

    Args:
        policy: who is followed.
        top_p: probability mass of the set, in (0, 1).
        min_tokens_to_keep: so many of the most probable tokens are in it whatever their mass.
        always: ids that are legal everywhere.

    Attributes:
        rule: from the logits of the copy to the legal tokens.
        model: the copy.
    """

    def __init__(self, policy: CausalLMPolicy, top_p: float, min_tokens_to_keep: int = 1, always: Sequence[int] = ()) -> None:
        # What is in the memo is not copied.
        shared = [tensor for tensor in chain(policy.parameters(), policy.buffers()) if not tensor.requires_grad]
        lagged: CausalLMPolicy = copy.deepcopy(policy, {id(item): item for item in (policy.tokenizer, policy.engine, *shared)})
        twins = zip(policy.model.named_parameters(), lagged.model.parameters(), strict=True)
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {
            name: (source, twin) for (name, source), twin in twins if source.requires_grad
        }
        lagged.requires_grad_(False)
        lagged.frozen, lagged.mask = True, None
        super().__init__(lagged, TokenRule(Sampling(policy.sampling.temperature, top_p=top_p), min_tokens_to_keep, always))

    def allow(self, always: Sequence[int]) -> None:
        """Exchanges the ids that are legal everywhere."""
        self.rule = TokenRule(self.rule.sampling, self.rule.min_tokens_to_keep, always)

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings the copy up to the policy as it is now. In place: nobody is left with an older one."""
        for source, twin in self._pairs.values():
            twin.copy_(source)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters of the copy, by name, for a checkpoint."""
        return {name: twin.detach() for name, (_, twin) in self._pairs.items()}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` returned."""
        for name, (_, twin) in self._pairs.items():
            twin.copy_(tensors[name])
