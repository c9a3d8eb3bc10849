"""How probable texts are under a policy: nats per token, and perplexity. Under the reference: how fluent a trained policy still is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from textgym.agents.common.sampling import Sampling
from textgym.agents.policy import CausalLMPolicy
from textgym.prompts import PromptText

Rows: TypeAlias = Sequence[PromptText | Mapping[str, Any]]


@dataclass(frozen=True)
class Perplexity:
    """How probable texts are.

    Attributes:
        nats_per_token: −1/n Σ log π(y_t|s_t) over all n tokens of all texts.
        perplexity: exp of that.
        tokens: n, EOS included, prompts not.
    """

    nats_per_token: float
    perplexity: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as JSON types."""
        return asdict(self)


def perplexity(
    policy: CausalLMPolicy,
    prompts: Sequence[PromptText | Mapping[str, Any]],
    completion_ids: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
) -> Perplexity:
    """Returns the perplexity of completions under a policy; see `completion_nats` for the arguments."""
    nats = completion_nats(policy, prompts, completion_ids, batch_size=batch_size)
    tokens = sum(map(len, completion_ids))
    mean = float(nats.sum()) / tokens
    return Perplexity(mean, math.exp(mean) if mean < 700 else math.inf, tokens)


@torch.no_grad()
def completion_nats(
    policy: CausalLMPolicy,
    prompts: Sequence[PromptText | Mapping[str, Any]],
    completion_ids: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
) -> npt.NDArray[np.float64]:
    """Returns −log π(y|x) of completions in nats, (N,), under the model itself: temperature 1, nothing truncated.

    Args:
        policy: π.
        prompts: N texts or message lists, or dicts with a `prompt` column.
        completion_ids: N lists of at least one token of the policy's tokenizer, EOS included.
        batch_size: completions scored at once.
    """
    if not len(prompts) == len(completion_ids) or not len(prompts):
        raise ValueError(f"`prompts` and `completion_ids` must have one entry per text, got {len(prompts)} and {len(completion_ids)}.")
    found = []
    for start in range(0, len(prompts), batch_size):
        prompt_ids, prompt_lengths = policy.encode_prompts(list(prompts[start : start + batch_size]))
        rows = [torch.tensor(ids) for ids in completion_ids[start : start + batch_size]]
        lengths = torch.tensor([len(row) for row in rows], device=prompt_ids.device)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(prompt_ids.device)
        found.append(-policy.score(prompt_ids, prompt_lengths, ids, lengths, sampling=Sampling()).log_probs.double().sum(1))
    return torch.cat(found).cpu().numpy()
