"""Prompts in every form that a policy takes, as one left-padded batch of ids."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from textgym.conversations import TEMPLATE_COLUMNS
from textgym.prompts import PromptText, encode_prompts, split_row
from textgym.unknown_tokens import check_known, unknown_token_id

Observation: TypeAlias = Mapping[str, npt.NDArray[Any]]
Row: TypeAlias = Mapping[str, Any]
Prompts: TypeAlias = Sequence[PromptText] | Sequence[PromptText | Row] | Sequence[Sequence[int]] | Observation | tuple[Any, Any]


def encode(prompts: Prompts, tokenizer: Any, fill_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Turns prompts into ids.

    Args:
        prompts: texts, message lists, dicts with a `prompt` column (of whose other columns some go into a chat template), id lists, one
            observation or a batch of them (what it shows so far is the prompt), or a pair
            (left-padded ids (B, P), lengths (B,)).
        tokenizer: reads the texts, exactly as it does in the environment.
        fill_token_id: stands before shorter prompts.
        device: where the tensors go.

    Returns:
        ids (B, P) int64, left-padded, and lengths (B,) int64.
    """
    if isinstance(prompts, tuple):
        ids, lengths = prompts
        return _checked_pair(ids, lengths, device)
    rows = _observed(prompts) if isinstance(prompts, Mapping) else _tokenised(prompts, tokenizer)
    empty = [index for index, row in enumerate(rows) if not len(row)]
    if not rows or empty:
        found = f"none in the rows {empty[:8]}" if rows else "no prompts"
        raise ValueError(f"`prompts` must hold at least one prompt, and each at least one token; got {found}.")
    highest = max(max(row) for row in rows)
    if highest >= len(tokenizer) or min(min(row) for row in rows) < 0:
        raise ValueError(f"`prompts` must hold ids from 0 to {len(tokenizer) - 1} (`len(tokenizer) - 1`), got ids up to {highest}.")
    width = max(len(row) for row in rows)
    padded = [[fill_token_id] * (width - len(row)) + list(row) for row in rows]
    lengths = [len(row) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device), torch.tensor(lengths, dtype=torch.int64, device=device)


def warn_of_unknown(prompts: Prompts, ids: Tensor, lengths: Tensor, tokenizer: Any) -> None:
    """Warns where much of prompts that were texts, now left-padded ids (B, P), is unknown to the tokenizer."""
    if isinstance(prompts, tuple | Mapping) or unknown_token_id(tokenizer) is None:
        return
    if not isinstance(prompts[0], str | Mapping) and not isinstance(prompts[0][0], Mapping):
        return  # ids
    counts = lengths.cpu().numpy()
    rows = ids.cpu().numpy()
    real = np.arange(rows.shape[1]) >= rows.shape[1] - counts[:, None]
    check_known(tokenizer, rows[real], counts, "`prompts`", lambda row: repr(prompts[row])[:60], refuse=False)


def _checked_pair(ids: Any, lengths: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
    lengths = torch.as_tensor(lengths, dtype=torch.int64, device=device)
    if ids.ndim != 2 or lengths.shape != ids.shape[:1] or not len(lengths):
        raise ValueError(
            "`prompts` given as a pair must be left-padded ids (B, P) and lengths (B,) with B >= 1, "
            f"got the shapes {tuple(ids.shape)} and {tuple(lengths.shape)}."
        )
    if int(lengths.min()) < 1 or int(lengths.max()) > ids.shape[1]:
        raise ValueError(f"`prompts`: lengths must be from 1 to P = {ids.shape[1]}, got {lengths.tolist()}.")
    return ids, lengths


def _observed(observation: Observation) -> list[list[int]]:
    ids = np.atleast_2d(np.asarray(observation["input_ids"]))
    mask = np.atleast_2d(np.asarray(observation["attention_mask"])) != 0
    return [row[shown].tolist() for row, shown in zip(ids, mask, strict=True)]


def _tokenised(prompts: Sequence[Any], tokenizer: Any) -> list[list[int]]:
    if isinstance(prompts, str):
        raise ValueError(f"`prompts` must be a list of prompts, got one string; write [{prompts[:20]!r}].")
    if all(isinstance(prompt, str | Mapping) or (len(prompt) > 0 and isinstance(prompt[0], Mapping)) for prompt in prompts):
        texts, others = (
            zip(*(split_row(row, f"row {i} of `prompts`") for i, row in enumerate(prompts)), strict=True) if prompts else ((), ())
        )
        columns = {name: [of_row.get(name) for of_row in others] for name in TEMPLATE_COLUMNS}
        return [row.tolist() for row in encode_prompts(tokenizer, texts, columns=columns)]
    return [[int(token) for token in prompt] for prompt in prompts]
