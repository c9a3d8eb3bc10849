"""`PretrainingMix`: texts whose likelihood is kept up while a policy learns from reward."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger
from torch import Tensor

from textgym.agents.common.batches import micro_batches
from textgym.agents.common.item_order import ItemOrder
from textgym.agents.common.masking import reduce_tokens
from textgym.agents.common.sampling import Sampling
from textgym.agents.policy import CausalLMPolicy
from textgym.encoding import encode_whole


class PretrainingMix:
    """The second term of PPO-ptx, Ouyang et al. 2022 (arXiv:2203.02155), eq. 2, as a loss.

        L_ptx = −γ_ptx 1/|B| Σ_{x ∈ B} Σ_{t ≥ 2} log π(x_t|x_{<t}),    |B| the tokens x_t, t ≥ 2, of all texts of the batch B

    The mean is over tokens, as in pretraining. The first token of a text is given, not predicted. π is the model's own distribution:
    temperature 1, the whole vocabulary.

    Args:
        policy: whose model it is; its tokenizer reads the texts, with the special tokens that it puts there itself, none
            of those in front twice, and no other.
        texts: strings or id lists, of at least two tokens each.
        coefficient: γ_ptx, above 0, in units of loss per nat and token.
        batch_size: texts per optimiser step.
        seed: of the order of the texts, a new permutation in each pass.

    Raises:
        ValueError: a text is no such thing, or too long for the model; which is said.
    """

    def __init__(
        self, policy: CausalLMPolicy, texts: Sequence[str | Sequence[int]], coefficient: float, batch_size: int, seed: int
    ) -> None:
        self.coefficient, self.batch_size = coefficient, batch_size
        self.rows = _checked_rows(policy, texts)
        # A stream of its own: those that an agent draws from already are children of `SeedSequence(seed)`.
        self.order = ItemOrder(len(self.rows), np.random.default_rng(np.random.SeedSequence([seed, 1])))

    def losses(
        self, policy: CausalLMPolicy, micro_batch_size: int | None, logger: Logger, micro_batch_tokens: int | None = None
    ) -> Iterator[Tensor]:
        """Yields the scalars of the next batch, one per micro-batch, that add up to L_ptx; logs its nats per token.

        Args:
            policy: the policy, as it is now.
            micro_batch_size: texts per forward and backward pass, at most; None for no bound.
            logger: gets `train/ptx_loss`, the loss before γ_ptx.
            micro_batch_tokens: tokens per pass, at most; None for no bound.
        """
        rows = [self.rows[index] for index in self.order.take(self.batch_size)]
        tokens = sum(len(row) - 1 for row in rows)
        nats = 0.0
        for places in micro_batches(torch.tensor([len(row) for row in rows]), micro_batch_size, micro_batch_tokens):
            part = [rows[place] for place in places.tolist()]
            lengths = torch.tensor([len(row) - 1 for row in part])
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in part], batch_first=True)
            log_probs = policy.score(ids[:, :1], torch.ones_like(lengths), ids[:, 1:], lengths, sampling=Sampling()).log_probs
            mask = torch.arange(ids.shape[1] - 1) < lengths[:, None]
            loss = reduce_tokens(-log_probs, mask.to(log_probs.device), reduction="token_mean", count=tokens)
            nats += float(loss.detach())
            yield self.coefficient * loss
        logger.record_mean("train/ptx_loss", nats)

    def state_dict(self) -> dict[str, Any]:
        """Returns where it stands in the texts, as JSON types."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: it is that of another number of texts.
        """
        if state["num_items"] != len(self.rows):
            raise ValueError(f"`ptx_texts` must be the {state['num_items']} texts that the checkpoint was made with, got {len(self.rows)}.")
        self.order.load_state_dict(state)


def _checked_rows(policy: CausalLMPolicy, texts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"`ptx_texts` must be a non-empty list of strings or id lists, got {texts!r}.")
    limit = policy.backbone.max_positions
    rows = []
    for index, text in enumerate(texts):
        row = [int(token) for token in (encode_whole(policy.tokenizer, [text])[0] if isinstance(text, str) else text)]
        if len(row) < 2 or (limit is not None and len(row) > limit):
            bound = "at least 2 tokens" if limit is None else f"from 2 to {limit} tokens, what the model has positions for"
            raise ValueError(f"`ptx_texts` must be texts of {bound}; number {index} has {len(row)}.")
        if not 0 <= min(row) <= max(row) < policy.vocab_size:
            raise ValueError(f"`ptx_texts` must hold ids from 0 to {policy.vocab_size - 1}; number {index} has {min(row)} to {max(row)}.")
        rows.append(row)
    return rows
