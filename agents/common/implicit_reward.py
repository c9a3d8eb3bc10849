"""The reward that a policy implies: what a preference-trained policy says of completions (Rafailov et al. 2023, arXiv:2305.18290, §4)."""

from collections.abc import Sequence
from typing import Any

import torch

from textgym.agents.policy import CausalLMPolicy
from textgym.conversations import with_template_columns
from textgym.prompts import PromptText


class ImplicitReward:
    """r̂(x, y) = β log π(y|x)/π_ref(y|x), in the calling form of rewards.

    Differences between completions of one prompt are those of the reward that the preferences came from; the level of a prompt,
    β log Z(x), is not in it. The environment must have the policy's tokenizer: the ids are scored, not the texts.

    Args:
        policy: π.
        reference: π_ref.
        beta: β, in reward per nat.
        batch_size: completions scored at once.
    """

    __name__ = "implicit_reward"

    def __init__(self, policy: CausalLMPolicy, reference: CausalLMPolicy, beta: float, batch_size: int = 64) -> None:
        self.policy, self.reference, self.beta, self.batch_size = policy, reference, beta, batch_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[PromptText], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """Returns one reward per completion; of the other columns those that go into a chat template are looked at."""
        rewards: list[float] = []
        asked = with_template_columns(prompts, columns)
        for start in range(0, len(prompts), self.batch_size):
            prompt_ids, prompt_lengths = self.policy.encode_prompts(asked[start : start + self.batch_size])
            rows = [torch.tensor(ids) for ids in completion_ids[start : start + self.batch_size]]
            lengths = torch.tensor([len(row) for row in rows], device=prompt_ids.device)
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(prompt_ids.device)
            own, other = (model.score(prompt_ids, prompt_lengths, ids, lengths).log_probs for model in (self.policy, self.reference))
            rewards += (self.beta * (own - other).sum(1)).tolist()
        return rewards

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImplicitReward":
        return self
