"""Trains the bundled reward model: Bradley-Terry on noisy comparisons, by the true reward, of what the language model writes.

It approximates the true reward only where the language model goes. Its comparisons hold whole reviews, so it never learns what an
unfinished or endless one is worth; repetition and word salad are rare in them, so it scores those by their praise. That is what a policy
without a KL penalty finds.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from textgym.bundled.true_reward import true_reward

if TYPE_CHECKING:
    import torch

Floats: TypeAlias = npt.NDArray[np.float64]

ANNOTATOR_TEMPERATURE = 0.25  # the annotator prefers a to b with probability sigmoid((r(a) - r(b)) / temperature)
BATCH = 64  # comparisons per optimiser step


class Comparisons(NamedTuple):
    """Pairs of reviews, each pair with the same beginning.

    Attributes:
        chosen: the reviews that the noisy annotator preferred.
        rejected: the others.
        true_margins: the true reward of the chosen review minus that of the rejected one.
    """

    chosen: list[str]
    rejected: list[str]
    true_margins: Floats

    def split(self, count: int) -> tuple["Comparisons", "Comparisons"]:
        """Returns the first `count` comparisons and the others."""
        return self._rows(slice(count)), self._rows(slice(count, None))

    def _rows(self, rows: slice) -> "Comparisons":
        return Comparisons(self.chosen[rows], self.rejected[rows], self.true_margins[rows])


def compare(prompts: Sequence[str], completions: Sequence[Sequence[str]], rng: np.random.Generator) -> Comparisons:
    """Lets the noisy annotator choose between the two completions of each prompt."""
    rewards = np.array([true_reward(prompts, side) for side in completions])  # (2, pairs)
    margins = rewards[0] - rewards[1]
    first_wins = rng.random(len(prompts)) < 1.0 / (1.0 + np.exp(-margins / ANNOTATOR_TEMPERATURE))
    reviews = [[prompt + completion for prompt, completion in zip(prompts, side, strict=True)] for side in completions]
    ordered = [(a, b) if wins else (b, a) for a, b, wins in zip(*reviews, first_wins, strict=True)]
    chosen, rejected = (list(side) for side in zip(*ordered, strict=True))
    return Comparisons(chosen, rejected, np.where(first_wins, margins, -margins))


def score(model: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> "torch.Tensor":
    """Returns the scores of texts, (B,), each read at its last token by length."""
    import torch

    ids = [tokenizer.encode(text).ids for text in texts]
    lengths = torch.tensor([len(row) for row in ids])
    padded = torch.tensor([row + [model.config.pad_token_id] * (int(lengths.max()) - len(row)) for row in ids])  # (B, L)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    hidden = model.transformer(input_ids=padded, attention_mask=mask.long()).last_hidden_state  # (B, L, H)
    scores: torch.Tensor = model.score(hidden[torch.arange(len(ids)), lengths - 1])[:, 0]
    return scores


def train_reward_model(tokenizer: Tokenizer, comparisons: Comparisons, epochs: int, positions: int) -> Any:
    """Trains a one-layer one-label classifier: mean of -log sigmoid(r_chosen - r_rejected), AdamW, cosine schedule."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    special: dict[str, Any] = {name: tokenizer.token_to_id(f"<{name[:3]}>") for name in ("eos_token_id", "pad_token_id")}
    shape: dict[str, Any] = {"n_positions": positions, "n_embd": 32, "n_layer": 1, "n_head": 2, "num_labels": 1}
    no_dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=tokenizer.get_vocab_size(), bos_token_id=None, **special, **shape, **no_dropout)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    count = len(comparisons.chosen)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * -(-count // BATCH))
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(count).split(BATCH):
            texts = [comparisons.chosen[row] for row in rows] + [comparisons.rejected[row] for row in rows]
            chosen, rejected = score(model, tokenizer, texts).chunk(2)
            loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        print(f"reward model: epoch {epoch + 1}/{epochs}, loss {np.mean(losses):.3f}", flush=True)
    return model.eval()


def score_all(model: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> Floats:
    """Returns the scores of any number of texts, without gradients."""
    import torch

    with torch.no_grad():
        parts = [score(model, tokenizer, texts[start : start + 256]).numpy() for start in range(0, len(texts), 256)]
    return np.concatenate(parts).astype(np.float64)


def shift_scores(model: Any, shift: float) -> None:
    """Adds `shift` to every score. The head has no bias, so the bias of the layer norm before it moves along the head's direction."""
    import torch

    direction = model.score.weight[0].detach()
    with torch.no_grad():
        model.transformer.ln_f.bias += shift * direction / direction.square().sum()


def measure(model: Any, tokenizer: Tokenizer, held_out: Comparisons) -> dict[str, float]:
    """Returns how well the scores agree with the true reward on held-out comparisons.

    `accuracy` is the share of pairs ordered as the true reward orders them (equal ones left out), `label_accuracy` the share ordered as the
    noisy annotator did, `annotator_accuracy` what the annotator's own labels reach against the true order, `margin_correlation` the
    correlation of score margins with true margins.
    """
    margins = score_all(model, tokenizer, held_out.chosen) - score_all(model, tokenizer, held_out.rejected)
    differ = np.abs(held_out.true_margins) > 1e-9
    return {
        "accuracy": float(np.mean((margins * held_out.true_margins > 0)[differ])),
        "label_accuracy": float(np.mean(margins > 0)),
        "annotator_accuracy": float(np.mean(held_out.true_margins[differ] > 0)),
        "margin_correlation": float(np.corrcoef(margins, held_out.true_margins)[0, 1]),
    }
