"""What offline learners train on when they are given no file: made from what ships, with the run's seed."""

import math
import random
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.bundled import bundled_prompts
from textgym.bundled.grammar import sample_review, to_text
from textgym.rewards.resolve import resolve_reward

if TYPE_CHECKING:
    from textgym.agents import CausalLMPolicy

Row = dict[str, Any]
DEMONSTRATIONS = 2000
COMPLETIONS_PER_PROMPT = 20  # of 200 prompts: 2,000 pairs
REWARD = "film-review"
FAVOURABLE = 0.95  # probability that an opinion in a demonstration is favourable
PROMPT_WORDS = (2, 8)


def demonstrations(seed: int) -> list[Row]:
    """Returns favourable film reviews of the bundled grammar, each cut into prompt and completion: what a good answer looks like.

    The bundled model was trained on reviews of every mood, so that there is something to learn; none of the bundled prompts, trained on or
    held out, is used.
    """
    rng = random.Random(f"{seed} demonstrations")
    known = {row["prompt"] for split in ("train", "eval") for row in bundled_prompts(split)}
    rows: list[Row] = []
    while len(rows) < DEMONSTRATIONS:
        words = sample_review(rng, FAVOURABLE)
        cut = rng.randint(PROMPT_WORDS[0], min(PROMPT_WORDS[1], len(words) - 1))
        prompt, review = to_text(words[:cut]), to_text(words)
        if prompt not in known:
            rows.append({"prompt": prompt, "completion": review[len(prompt) :]})
    return rows


def preferences(policy: "CausalLMPolicy", seed: int, max_new_tokens: int) -> list[Row]:
    """Returns pairs of the policy's own completions of the bundled prompts, labelled by Bradley–Terry with the bundled reward."""
    rows, labels = _scored(policy, seed, max_new_tokens), np.random.default_rng([seed, 1])
    pairs = []
    for (first, reward), (second, other) in zip(rows[::2], rows[1::2], strict=True):
        wins = labels.random() < _sigmoid(reward - other)
        chosen, rejected = (first, second) if wins else (second, first)
        pairs.append({**_ids(chosen, "chosen_ids"), "rejected_ids": rejected["completion_ids"]})
    return pairs


def labelled(policy: "CausalLMPolicy", seed: int, max_new_tokens: int) -> list[Row]:
    """Returns the policy's own completions of the bundled prompts, desirable with probability σ(reward): the reward's mean on them is 0."""
    labels = np.random.default_rng([seed, 1])
    return [
        {**_ids(row, "completion_ids"), "label": bool(labels.random() < _sigmoid(reward))}
        for row, reward in _scored(policy, seed, max_new_tokens)
    ]


def _scored(policy: "CausalLMPolicy", seed: int, max_new_tokens: int) -> list[tuple[Row, float]]:
    """Samples completions, neighbours of the same prompt, and scores them."""
    prompts = [row["prompt"] for row in bundled_prompts("train")]
    reward = resolve_reward(REWARD)[1]
    found: list[tuple[Row, float]] = []
    for place, start in enumerate(range(0, len(prompts), 50)):
        part = prompts[start : start + 50]
        sampled = policy.generate(part, max_new_tokens=max_new_tokens, num_generations=COMPLETIONS_PER_PROMPT, seed=seed * 1000 + place)
        texts = [prompt for prompt in part for _ in range(COMPLETIONS_PER_PROMPT)]
        ids = sampled.completion_ids
        scores = reward(prompts=texts, completions=sampled.texts)
        found += [({"prompt": text, "completion_ids": one}, score) for text, one, score in zip(texts, ids, scores, strict=True)]
    encoded = {text: ids for text, ids in zip(prompts, _prompt_ids(policy, prompts), strict=True)}
    return [({**row, "prompt_ids": encoded[row["prompt"]]}, score) for row, score in found]


def _prompt_ids(policy: "CausalLMPolicy", prompts: list[str]) -> list[list[int]]:
    ids, lengths = policy.encode_prompts(prompts)
    return [row[len(row) - length :] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]


def _ids(row: Row, column: str) -> Row:
    return {"prompt_ids": row["prompt_ids"], column: row["completion_ids"]}


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
