"""The steps of learning from human feedback, one function each: sample pairs to compare, fit a reward model to the comparisons."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from textgym.agents.common.feedback_sets import FeedbackSet
from textgym.agents.common.progress import counting_bar
from textgym.agents.common.scored_completions import PromptRows
from textgym.agents.policy import CausalLMPolicy
from textgym.agents.reward_model import RewardModel
from textgym.agents.reward_model_trainer import RewardModelTrainer
from textgym.evaluation.reward_model_report import RewardModelReport
from textgym.feedback import Comparison
from textgym.prompts import PromptText, encode_prompts
from textgym.rewards.model_trials import announced_limit

HELD_OUT = 0.1  # of the prompts; their comparisons measure the reward model
NORMALISED_ON = 512  # completions
SAMPLED_AT_ONCE = 64  # prompts


class Fitted(NamedTuple):
    """A reward model that was fitted to comparisons.

    Attributes:
        model: the model, its mean on the reference's completions taken out.
        report: what it is worth on the held-out comparisons; None where nothing was measured.
        training: how many comparisons it learned from (`records`), and how many were left out and why (`left_out`).
        not_measured: why there is no report; "" where there is one.
    """

    model: RewardModel
    report: RewardModelReport | None
    training: dict[str, Any]
    not_measured: str = ""


def readable_prompts(
    prompts: PromptRows, policy: CausalLMPolicy, max_new_tokens: int, max_tokens: int | None = None
) -> tuple[PromptRows, int]:
    """Returns the prompts that a reward model with this policy's trunk can read with their completions, and how many are too long for that.

    Args:
        prompts: N prompts.
        policy: whose tokenizer and positions the reward model has.
        max_new_tokens: of a completion.
        max_tokens: the longest text that the reward model learns from; longer prompts are left out. None: one that is longer than the model
            reads is an error.

    Raises:
        ValueError: prompts are too long and `max_tokens` is None, or no prompt is left.
    """
    readable = min(announced_limit(policy.model, policy.tokenizer), policy.backbone.max_positions or math.inf, max_tokens or math.inf)
    if readable == math.inf:
        return prompts, 0
    limit = int(readable)
    lengths = [len(ids) for ids in encode_prompts(policy.tokenizer, prompts.texts, columns=prompts.columns)]
    kept = [place for place, length in enumerate(lengths) if length + max_new_tokens <= limit]
    if len(kept) == len(prompts):
        return prompts, 0
    too_long = f"{len(prompts) - len(kept):,} of {len(prompts):,} `prompts` with `max_new_tokens={max_new_tokens}` behind them are longer"
    if max_tokens is None:
        raise ValueError(
            f"{too_long} than the {limit} tokens that the reward model reads, the longest {max(lengths) + max_new_tokens}: leave them out, "
            f"as `max_tokens={limit}` among the options of the reward model does."
        )
    if not kept:
        raise ValueError(f"{too_long} than {limit} tokens, the most that the reward model is given: none is left; raise `max_tokens`.")
    return prompts.select(kept), len(prompts) - len(kept)


def sample_completions(
    policy: CausalLMPolicy,
    prompts: Sequence[PromptText | Mapping[str, Any]],
    max_new_tokens: int,
    seed: int,
    num_generations: int = 1,
    progress_bar: bool = False,
) -> list[str]:
    """Returns completions of prompts (or of rows with them), `num_generations` neighbours each."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    texts: list[str] = []
    with counting_bar("sampling", len(prompts), shown=progress_bar) as advance:
        for start in range(0, len(prompts), SAMPLED_AT_ONCE):
            batch = list(prompts[start : start + SAMPLED_AT_ONCE])
            texts += policy.generate(batch, max_new_tokens, num_generations=num_generations, generator=generator).texts
            advance(len(batch))
    return texts


def sample_pairs(
    policy: CausalLMPolicy, prompts: PromptRows, num_pairs: int, max_new_tokens: int, seed: int, progress_bar: bool = False
) -> list[dict[str, Any]]:
    """Samples pairs of completions to compare.

    Args:
        policy: who is sampled.
        prompts: each comes equally often, give or take one, in random order.
        num_pairs: how many.
        max_new_tokens: of a completion.
        seed: of sampling and of the order.
        progress_bar: show one, on a terminal.

    Returns:
        rows with the columns of the prompt's row and `completions`, a list of two texts.
    """
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(len(prompts)) for _ in range(-(-num_pairs // len(prompts)))]
    chosen = prompts.select(np.concatenate(passes)[:num_pairs].tolist())
    texts = sample_completions(policy, chosen.as_rows(), max_new_tokens, seed, 2, progress_bar)
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
) -> Fitted:
    """Fits a reward model to comparisons: the reference's trunk with a fresh head, its mean on the reference's completions taken out.

    What cannot be read, for `max_tokens` or the model's own limit, is left out of all steps: of training, of measuring, of the completions.

    Args:
        reference: π_ref.
        comparisons: all there are; those of a tenth of the prompts only measure it.
        prompts: whose completions by π_ref have mean reward 0 afterwards.
        max_new_tokens: of such a completion.
        seed: of everything that is drawn.
        options: further arguments of `RewardModelTrainer`.
        progress_bar: show one.
    """
    train, held_out = split_by_prompt(comparisons, HELD_OUT, seed)
    model = RewardModel.from_policy(reference, seed=seed)
    trainer = RewardModelTrainer(model, None, seed=seed, **options)
    trainer.connect(train, sampled=True)
    assert trainer.examples is not None
    # All that could fail for what is given comes before the training.
    measured, not_measured = _read_held_out(trainer, held_out)
    rng = np.random.default_rng(seed)
    drawn = prompts.select(rng.integers(len(prompts), size=NORMALISED_ON).tolist())
    texts = sample_completions(reference, drawn.as_rows(), max_new_tokens, seed, progress_bar=progress_bar)
    drawn, texts = _readable(trainer, drawn, texts)
    trainer.learn(progress_bar=progress_bar)
    model.normalise(drawn.texts, texts, columns=drawn.columns, progress_bar=progress_bar)
    report = None if measured is None else trainer.evaluate(measured, progress_bar=progress_bar)
    training = {"records": len(trainer.examples), "left_out": trainer.examples.left_out._asdict()}
    return Fitted(model, report, training, not_measured)


def _read_held_out(trainer: RewardModelTrainer, held_out: Sequence[Comparison]) -> tuple[FeedbackSet | None, str]:
    """Returns the held-out comparisons as the reward model reads them; where none can be measured, why."""
    if not held_out:
        return None, "all comparisons are of one prompt, so that none could be held out"
    try:
        return trainer.read(list(held_out)), ""
    except ValueError as error:
        return None, f"none of the {len(held_out):,} held-out comparisons can be measured: {error}"


def _readable(trainer: RewardModelTrainer, prompts: PromptRows, completions: Sequence[str]) -> tuple[PromptRows, list[str]]:
    """Returns the completions, with their prompts, that are no longer than what the reward model reads and learns from."""
    limit = min((one for one in (trainer.max_tokens, trainer.reward_model.limit) if one is not None), default=None)
    pieces = trainer.reward_model.encode(prompts.texts, completions, prompts.columns)
    kept = [place for place, piece in enumerate(pieces) if limit is None or len(piece.ids) <= limit]
    if not kept:
        raise ValueError(
            f"`prompts` must have completions of at most {limit} tokens, prompt included, on which the reward is normalised; all of "
            f"{len(pieces)} are longer: give shorter prompts, or raise `max_tokens`."
        )
    return prompts.select(kept), [completions[place] for place in kept]
