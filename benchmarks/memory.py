"""Memory: of an update with a large vocabulary beside the unchunked log-softmax, and of a stored rollout beside SB3's buffer.

    python benchmarks/memory.py [--device auto] [--tokens 16384 ...] [--out result.json]

The update: V = 50,257, completions of 64 tokens behind prompts of 32, a GPT-2 of random weights so small (2 layers of width 64) that the
logits dominate. Log-probs and entropies of all tokens, backward, a step of Adam; in textgym by `policy.score(..., entropy=True)`, plainly
by `log_softmax` over float32 (B, T, V). Each in a process of its own, which has taken a small update before (it makes the optimiser's
moments); measured is how far the peak lies above what was held before: on the CPU resident memory (so Linux), on an accelerator what torch
allocated. Both must find the same loss. The plain one is left out where its logits would not fit `PLAIN_COPIES` times.

The rollout: 64 completions of 64 tokens behind prompts of 32; bytes of all arrays of textgym's `RolloutBatch` and of SB3's
`DictRolloutBuffer` on the same environment. The batch's final infos (texts, mostly) are no arrays and stand beside.

The exit status says whether the update takes at most a quarter, and the rollout at most a twentieth.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import common
import gymnasium as gym
import numpy as np
import torch
from floors import FIRST_WORD, Shape
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import get_device
from torch import Tensor

import textgym  # noqa: F401  (registers the ids)
from textgym.agents import PPO, CausalLMPolicy

VOCAB_SIZE, PROMPT_TOKENS, NEW_TOKENS = 50_257, 32, 64
COMPLETIONS = 64  # of the stored rollout
ENTROPY_COEFFICIENT = 0.01
UPDATE_RATIO, ROLLOUT_RATIO = 1 / 4, 1 / 20
PLAIN_COPIES = 6
Scorer = Callable[[CausalLMPolicy, Tensor, Tensor], tuple[Tensor, Tensor]]


def chunked(policy: CausalLMPolicy, prompts: Tensor, completions: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (B, T) as textgym makes them."""
    lengths = [torch.full((len(ids),), ids.shape[1], device=ids.device) for ids in (prompts, completions)]
    scores = policy.score(prompts, lengths[0], completions, lengths[1], entropy=True)
    assert scores.entropy is not None
    return scores.log_probs, scores.entropy


def plain(policy: CausalLMPolicy, prompts: Tensor, completions: Tensor) -> tuple[Tensor, Tensor]:
    """The same over the whole table of logits, (B, T, V), of the completions alone."""
    ids = torch.cat((prompts, completions), 1)[:, :-1]
    table = policy.model(ids, use_cache=False, logits_to_keep=completions.shape[1]).logits.float().log_softmax(-1)
    return table.gather(-1, completions.unsqueeze(-1)).squeeze(-1), -(table.exp() * table).sum(-1)


SCORERS: dict[str, Scorer] = {"textgym": chunked, "unchunked": plain}


def measure_update(scorer: Scorer, tokens: int, device: torch.device) -> dict[str, float]:
    """Memory before an update of so many completion tokens and at its peak, in bytes, and its loss."""
    policy = Shape(VOCAB_SIZE, 64, 2).policy(PROMPT_TOKENS + NEW_TOKENS, str(device))
    optimizer = torch.optim.Adam(policy.parameters(), 1e-4)
    rows = tokens // NEW_TOKENS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_WORD, VOCAB_SIZE, (rows, PROMPT_TOKENS + NEW_TOKENS), generator=generator).to(device)
    advantages = torch.randn((rows, NEW_TOKENS), generator=generator).to(device)

    def update(count: int) -> float:
        log_probs, entropy = scorer(policy, ids[:count, :PROMPT_TOKENS], ids[:count, PROMPT_TOKENS:])
        loss = -(advantages[:count] * log_probs).mean() - ENTROPY_COEFFICIENT * entropy.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    update(1)
    before = common.reset_peak(device)
    loss = update(rows)
    return {"before": before, "peak": common.peak(device), "loss": loss}


def compare_updates(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measures both scorers at each number of tokens, prints and returns a row per number."""
    results = []
    print(f"{'B T':>8}{'logits once':>14}{'textgym':>12}{'unchunked':>12}{'ratio':>8}   (MB)")
    for tokens in options.tokens:
        once = 4.0 * tokens * VOCAB_SIZE
        row: dict[str, Any] = {"tokens": tokens, "logits_once": once, "textgym": child(options, "textgym", tokens)}
        fits = PLAIN_COPIES * once < common.free_memory(device)
        row["unchunked"] = child(options, "unchunked", tokens) if fits else None
        ours, theirs = ({} if row[name] is None else row[name] for name in SCORERS)
        if ours and theirs:
            if abs(ours["loss"] - theirs["loss"]) > 1e-4 * max(1.0, abs(theirs["loss"])):
                raise SystemExit(f"The losses differ: {ours['loss']} and {theirs['loss']}.")
            row["ratio"] = ours["update"] / theirs["update"]
        results.append(row)
        cells = [f"{found['update'] / 1e6:12,.0f}" if found else f"{'no room':>12}" for found in (ours, theirs)]
        print(f"{tokens:8,}{once / 1e6:14,.0f}{cells[0]}{cells[1]}{row.get('ratio', float('nan')):8.3f}")
    return results


def child(options: argparse.Namespace, scorer: str, tokens: int) -> dict[str, Any] | None:
    """One measurement in a process of its own; None if the memory was not enough."""
    found = common.again("--scorer", scorer, "--tokens", str(tokens))
    return None if found is None else found | {"update": found["peak"] - found["before"]}


class KeepRollout(BaseCallback):
    """Keeps the last rollout."""

    rollout: Any = None

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.rollout = self.locals["rollout"]


def compare_rollouts() -> dict[str, float]:
    """Bytes of as many stored completions in textgym and in SB3, printed and returned."""
    policy = Shape(512, 64, 1).policy(PROMPT_TOKENS + NEW_TOKENS, "cpu")
    prompts = [" ".join(f"w{FIRST_WORD + (i + j) % 500}" for j in range(PROMPT_TOKENS)) for i in range(COMPLETIONS)]
    sizes = {"max_prompt_tokens": PROMPT_TOKENS, "max_new_tokens": NEW_TOKENS}
    envs = gym.make_vec("TextGen-v0", num_envs=COMPLETIONS, prompts=prompts, tokenizer=policy.tokenizer, reward=lengths_of_texts, **sizes)
    keep = KeepRollout()
    PPO(policy, envs, seed=0).learn(1, callback=keep)
    ours = sum(value.nbytes for f in fields(keep.rollout) if isinstance(value := getattr(keep.rollout, f.name), Tensor))
    buffer = DictRolloutBuffer(NEW_TOKENS, envs.single_observation_space, envs.single_action_space, "cpu", n_envs=COMPLETIONS)
    arrays = [*vars(buffer).values(), *buffer.observations.values()]
    theirs = sum(value.nbytes for value in arrays if isinstance(value, np.ndarray))
    infos = deep_size(keep.rollout.infos, set())
    each = {"textgym": ours, "SB3": theirs, "final infos besides": infos}
    print(f"\nbytes of a stored completion of {NEW_TOKENS} tokens behind {PROMPT_TOKENS}; ratio {ours / theirs:.4f}")
    for name, total in each.items():
        print(f"    {name:<22}{total / COMPLETIONS:>10,.0f}")
    return {"completions": COMPLETIONS, "textgym": ours, "sb3": theirs, "ratio": ours / theirs, "infos": infos}


def lengths_of_texts(completions: list[str], **columns: Any) -> list[float]:
    """A reward: the characters of a completion."""
    return [float(len(text)) for text in completions]


def deep_size(value: Any, seen: set[int]) -> int:
    """Bytes of an object and all that it holds, each thing once."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return sys.getsizeof(value) + sum(deep_size(part, seen) for part in parts)


def main() -> int:
    options = parser().parse_args()
    device = get_device(options.device)
    if options.scorer:
        print(json.dumps(measure_update(SCORERS[options.scorer], options.tokens[0], device)))
        return 0
    updates = compare_updates(options, device)
    rollout = compare_rollouts()
    compared = [row["ratio"] for row in updates if "ratio" in row]
    passed = bool(compared) and max(compared) <= UPDATE_RATIO and rollout["ratio"] <= ROLLOUT_RATIO
    print(f"{'within' if passed else 'NOT WITHIN'} {UPDATE_RATIO:g} of the unchunked update and {ROLLOUT_RATIO:g} of SB3's buffer")
    common.write(options.out, {"setting": common.setting(device), "updates": updates, "rollout": rollout})
    return 0 if passed else 1


def parser() -> argparse.ArgumentParser:
    result = common.parser(__doc__, device="auto")
    result.add_argument("--tokens", type=int, nargs="+", default=[16_384], help=f"B T, multiples of {NEW_TOKENS}; default: 16384")
    result.add_argument("--scorer", choices=list(SCORERS), default=None, help="this one only, its numbers as JSON")
    return result


if __name__ == "__main__":
    sys.exit(main())
