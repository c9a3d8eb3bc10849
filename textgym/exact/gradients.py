"""The exact objective of a torch policy, and its gradient. Importing this module loads torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from textgym.exact.tree import TokenTree

ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def completion_log_probs(tree: TokenTree, score: ScoreFunction, device: torch.device | str = "cpu") -> Tensor:
    """Returns log π(y|x) of every completion with its gradient, (N, C).

    Args:
        tree: the MDP.
        score: log-probs of tokens, (prompt_ids (B, P) left-padded, prompt_lengths (B,), completion_ids (B, T), lengths (B,)) to
            (B, T), zero behind the end of each row. `model_score` makes one of a transformers model.
        device: where the ids are put.
    """
    batch = tree.batch()
    log_probs = score(*(torch.as_tensor(part, device=device) for part in batch))
    expected = (len(batch.lengths), tree.horizon)
    if log_probs.shape != expected:
        raise ValueError(f"`score` must return the log-probs of all tokens, shape {expected}, got {tuple(log_probs.shape)}.")
    return log_probs.sum(dim=1).view(tree.num_prompts, tree.num_completions)


def exact_objective(tree: TokenTree, log_probs: Tensor, reference: Any, beta: float) -> Tensor:
    """Returns the mean over the prompts of J(π) = Σ_y π(y|x) (r(x,y) − β log(π(y|x)/π_ref(y|x))), a scalar with gradient.

    Args:
        tree: the MDP.
        log_probs: log π(y|x), (N, C).
        reference: π_ref, as `TokenTree` takes policies.
        beta: β, in reward per nat.
    """
    rewards = torch.as_tensor(tree.rewards).to(log_probs)
    reference_log_probs = torch.as_tensor(tree.log_probs(reference)).to(log_probs)
    shaped = rewards - beta * (log_probs - reference_log_probs)
    return (log_probs.exp() * shaped).sum(dim=1).mean()


def exact_gradient(
    tree: TokenTree, score: ScoreFunction, parameters: Sequence[Tensor], reference: Any, beta: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns ∇J as one flat vector; a parameter that J does not depend on (a value head) has zeros.

    Args:
        tree: the MDP.
        score: the policy, see `completion_log_probs`.
        parameters: what to differentiate by, in the order of the result.
        reference: π_ref, as `TokenTree` takes policies.
        beta: β, in reward per nat.
        device: of the policy.
    """
    value = exact_objective(tree, completion_log_probs(tree, score, device), reference, beta)
    gradients = torch.autograd.grad(value, list(parameters), allow_unused=True)
    return flatten([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)])


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the entries of all tensors as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def model_score(model: Any, temperature: float = 1.0) -> ScoreFunction:
    """Returns the `score` of a transformers causal language model, one pass over the left-padded sequences.

    Args:
        model: the model.
        temperature: the logits are divided by it.
    """

    def score(prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, lengths: Tensor) -> Tensor:
        width, horizon = prompt_ids.shape[1], completion_ids.shape[1]
        columns = torch.arange(width + horizon, device=prompt_ids.device)
        start, end = (width - prompt_lengths).unsqueeze(1), (width + lengths).unsqueeze(1)
        attention_mask = ((columns >= start) & (columns < end)).long()
        position_ids = (columns - start).clamp(min=0)
        ids = torch.cat([prompt_ids, completion_ids], dim=1)
        logits = model(input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).logits
        log_probs = (logits[:, width - 1 : -1] / temperature).log_softmax(dim=-1)
        chosen = log_probs.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)
        return torch.where(columns[:horizon] < lengths.unsqueeze(1), chosen, torch.zeros_like(chosen))

    return score
