"""Several completions in one row of the model's input, without padding between them and without seeing each other.

A prompt stands once, and its completions behind it:

    tokens      p1 p2 p3 | a1 a2 | b1 b2 b3 | q1 q2 | c1 ...
    positions    0  1  2 |  3  4 |  3  4  5 |  0  1 |  2 ...
    sees        own past |  p, a |     p, b | own p |  q, c

Positions start again with each prompt, and the mask is handed over ready-made, (rows, 1, S, S): the rule by which transformers finds
packed sequences from restarting positions holds only without mask and cache, and is silently off otherwise (transformers#46634).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from textgym.agents.common.layout import Rows
from textgym.agents.common.offline_batches import CompletionBatch
from textgym.agents.common.scoring import score_completions
from textgym.agents.policy import CausalLMPolicy


def check_packing(policy: CausalLMPolicy) -> None:
    """Raises a `ValueError` if the policy's model cannot be given a mask of our own."""
    if not policy.backbone.dense_mask:
        raise ValueError(
            f"`packing` must be False for {type(policy.model).__name__}: its attention (sliding windows, linear biases, or a kernel other "
            "than sdpa and eager) builds its mask itself, so completions in one row would see each other."
        )


def score_packed(policy: CausalLMPolicy, batch: CompletionBatch) -> Tensor:
    """Scores completions in packed rows: what `policy.score` says, with fewer tokens computed.

    Args:
        policy: a policy that passed `check_packing`; gradients flow unless it is frozen.
        batch: the completions; those of one prompt share it.

    Returns:
        log π(y_t|s_t) in nats, (U, T) float32, zero from `lengths` on.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not policy.frozen):
        return score_completions(policy.backbone, pack(batch), policy.sampling).log_probs


def pack(batch: CompletionBatch) -> Rows:
    """Lays completions out in as few rows as fit into the width that the longest prompt with its completions needs."""
    prompt_lengths, lengths = batch.prompt_lengths.tolist(), batch.lengths.tolist()
    members: dict[int, list[int]] = {}
    for place, prompt in enumerate(batch.prompt_index.tolist()):
        members.setdefault(prompt, []).append(place)
    groups = list(members.values())
    # The last token of a completion predicts nothing that is scored, so it is no input.
    sizes = [prompt_lengths[group[0]] + sum(lengths[one] - 1 for one in group) for group in groups]
    rows = first_fit(sizes, max(sizes))

    width, device = max(sizes), batch.prompt_ids.device
    input_ids = torch.zeros((len(rows), width), dtype=torch.int64, device=device)
    positions = torch.zeros_like(input_ids)
    part = torch.full_like(input_ids, -1)  # which prompt or completion a token belongs to
    parent = torch.full_like(input_ids, -1)  # which part it sees besides its own: its prompt
    row_of, columns = [0] * len(batch), [torch.empty(0, dtype=torch.int64)] * len(batch)
    parts = 0
    for row, content in enumerate(rows):
        end = 0
        for group in (groups[place] for place in content):
            prompt, own, length = slice(end, end + prompt_lengths[group[0]]), parts, prompt_lengths[group[0]]
            input_ids[row, prompt] = batch.prompt_ids[group[0], -length:]
            positions[row, prompt] = torch.arange(length, device=device)
            part[row, prompt] = parent[row, prompt] = own
            end = prompt.stop
            for place in group:
                parts += 1
                count = lengths[place] - 1
                here = slice(end, end + count)
                input_ids[row, here] = batch.completion_ids[place, :count]
                positions[row, here] = torch.arange(length, length + count, device=device)
                part[row, here], parent[row, here] = parts, own
                row_of[place] = row
                columns[place] = torch.tensor([prompt.stop - 1, *range(here.start, here.stop)])
                end = here.stop
            parts += 1
    mask = batch.completion_mask
    return Rows(
        input_ids=input_ids,
        rows=torch.tensor(row_of, device=device).repeat_interleave(batch.lengths),
        columns=torch.cat(columns).to(device),
        targets=batch.completion_ids[mask],
        mask=mask,
        position_ids=positions,
        visible=visibility(part, parent).unsqueeze(1),
    )


def visibility(part: Tensor, parent: Tensor) -> Tensor:
    """Returns which keys each query sees, (R, S, S) bool: the past of its own part, and its prompt.

    Args:
        part: the part of each token, (R, S) int64; −1 for padding, which sees padding only.
        parent: the part of its prompt, (R, S) int64.
    """
    queries, keys = part.unsqueeze(2), part.unsqueeze(1)
    past = torch.ones(part.shape[1], part.shape[1], dtype=torch.bool, device=part.device).tril()
    return past & ((queries == keys) | (parent.unsqueeze(2) == keys))


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts things of some sizes into bins, the largest first, each into the first bin with room; returns the places in each bin."""
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        chosen = next((number for number, left in enumerate(room) if left >= sizes[place]), len(bins))
        if chosen == len(bins):
            bins.append([])
            room.append(capacity)
        bins[chosen].append(place)
        room[chosen] -= sizes[place]
    return bins
