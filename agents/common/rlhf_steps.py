"""The steps of learning from human feedback, one function each: sample pairs to compare, fit a reward model to the comparisons."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from textgym.agents.common.scored_completions import PromptRows
from textgym.agents.policy import CausalLMPolicy
from textgym.agents.reward_model import RewardModel
from textgym.agents.reward_model_trainer import RewardModelTrainer
from textgym.evaluation.reward_model_report import RewardModelReport
from textgym.feedback import Comparison
from textgym.prompts import PromptText

HELD_OUT = 0.1  # of the prompts; their comparisons measure the reward model
NORMALISED_ON = 512  # completions
SAMPLED_AT_ONCE = 64  # prompts


def sample_completions(
    policy: CausalLMPolicy, prompts: Sequence[PromptText | Mapping[str, Any]], max_new_tokens: int, seed: int, num_generations: int = 1
) -> list[str]:
    """Returns completions of prompts (or of rows with them), `num_generations` neighbours each."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    texts: list[str] = []
    for start in range(0, len(prompts), SAMPLED_AT_ONCE):
        batch = list(prompts[start : start + SAMPLED_AT_ONCE])
        texts += policy.generate(batch, max_new_tokens, num_generations=num_generations, generator=generator).texts
    return texts


def sample_pairs(policy: CausalLMPolicy, prompts: PromptRows, num_pairs: int, max_new_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Samples pairs of completions to compare.

    Args:
        policy: who is sampled.
        prompts: each comes equally often, give or take one, in random order.
        num_pairs: how many.
        max_new_tokens: of a completion.
        seed: of sampling and of the order.

    Returns:
        rows with the columns of the prompt's row and `completions`, a list of two texts.
    """
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(len(prompts)) for _ in range(-(-num_pairs // len(prompts)))]
    chosen = prompts.select(np.concatenate(passes)[:num_pairs].tolist())
    texts = sample_completions(policy, chosen.as_rows(), max_new_tokens, seed, num_generations=2)
    return [{**row, "completions": texts[2 * i : 2 * i + 2]} for i, row in enumerate(chosen.as_rows())]


def split_by_prompt(comparisons: Sequence[Comparison], share: float, seed: int) -> tuple[list[Comparison], list[Comparison]]:
    """Parts comparisons into those to learn from and those held out; a prompt is on one side.

    Args:
        comparisons: N of them.
        share: of the prompts that is held out, at least one where there are two.
        seed: which.
    """
    prompts = sorted({repr(one.prompt) for one in comparisons})
    count = max(1, round(share * len(prompts))) if len(prompts) > 1 else 0
    held_out = set(np.random.default_rng(seed).permutation(prompts)[:count].tolist())
    parts: tuple[list[Comparison], list[Comparison]] = ([], [])
    for one in comparisons:
        parts[repr(one.prompt) in held_out].append(one)
    return parts


def fit_reward_model(
    reference: CausalLMPolicy,
    comparisons: Sequence[Comparison],
    prompts: PromptRows,
    max_new_tokens: int,
    seed: int,
    options: Mapping[str, Any],
    progress_bar: bool = False,
) -> tuple[RewardModel, RewardModelReport | None]:
    """Fits a reward model to comparisons: the reference's trunk with a fresh head, its mean on the reference's completions taken out.

    Args:
        reference: π_ref.
        comparisons: all there are; those of a tenth of the prompts only measure it.
        prompts: whose completions by π_ref have mean reward 0 afterwards.
        max_new_tokens: of such a completion.
        seed: of everything that is drawn.
        options: further arguments of `RewardModelTrainer`.
        progress_bar: show one.

    Returns:
        the model, and what it is worth on the held-out comparisons (None where all have one prompt).
    """
    train, held_out = split_by_prompt(comparisons, HELD_OUT, seed)
    model = RewardModel.from_policy(reference, seed=seed)
    trainer = RewardModelTrainer(model, None, seed=seed, **options)
    trainer.connect(train, sampled=True)
    trainer.learn(progress_bar=progress_bar)
    rng = np.random.default_rng(seed)
    drawn = prompts.select(rng.integers(len(prompts), size=NORMALISED_ON).tolist())
    texts = sample_completions(reference, drawn.as_rows(), max_new_tokens, seed)
    model.normalise(drawn.texts, texts, columns=drawn.columns)
    return model, trainer.evaluate(held_out) if held_out else None
