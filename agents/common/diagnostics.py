"""What ruins a run without an error: checks of numbers that a run has computed anyway. docs/agents.md has the table of what they say.

Each check is a pure function that returns a `Finding`; `RunWarnings` decides when one has lasted long enough to be told, and tells it once.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from textgym.agents.common.batches import RolloutBatch

ROLLOUTS = 2  # in a row, before a symptom of rollouts is told ...
COMPLETIONS = 16  # ... and completions (or groups of them) that it is seen in: a few are alike by chance
PART_ROLLOUTS = 10  # a reward in several parts may have one that pays late
STEPS = 10  # optimiser steps in a row
SHORT = 12  # tokens: where completions cannot be longer they may be cut, alike or empty by design
ALIKE = 4  # tokens: shorter answers are alike honestly
REPEATED, EMPTY = 0.5, 0.5  # shares of the completions
# Nats per token that two passes over the same tokens may differ by.
TOLERANCE_FLOAT32, TOLERANCE_HALF = 0.01, 0.1
# Under the policy's own samples E[exp(-sum of log ratios)] <= 1, so a sum below -IMPROBABLE nats has a probability below exp(-IMPROBABLE).
IMPROBABLE = 20.0


class Finding(NamedTuple):
    """What one check says of one rollout or step.

    Attributes:
        name: of the symptom.
        sentence: what to tell; None if the symptom is not there.
        items: completions, groups of them or steps that were looked at.
        lasting: observations in a row that must have the symptom before it is told.
        at_least: items that they must have had together.
    """

    name: str
    sentence: str | None
    items: int = 1
    lasting: int = 1
    at_least: int = 1


# -- rollouts -------------------------------------------------------------------------------------------------------


def rollout_findings(
    rollout: RolloutBatch, paid: Tensor, *, algorithm: str, room: int, compares_groups: bool, varied: bool = False, spread: bool = False
) -> Iterator[Finding]:
    """Yields what stands out in a rollout: its rewards, its ends, its texts.

    Args:
        rollout: the whole rollout.
        paid: the reward of each completion without the KL term, (B,).
        algorithm: who learns from it.
        room: the most tokens that a completion can have.
        compares_groups: whether the algorithm learns only from differences between the completions of a prompt.
        varied: whether the reward varied earlier in the run.
        spread: whether the completions of a prompt differed in it then.
    """
    yield never_ends(rollout)
    constant = saturated_reward(paid) if varied else constant_reward(paid)
    yield constant
    if compares_groups and rollout.num_generations > 1:
        no_spread = groups_without_spread(paid, rollout.num_generations, algorithm, varied=spread)
        yield no_spread._replace(sentence=None) if constant.sentence else no_spread  # one sentence for one cause
    if room >= SHORT:
        empty = empty_completions(rollout)
        yield empty
        repeated = repeated_completions(rollout)
        yield repeated._replace(sentence=None) if empty.sentence else repeated


def _of_rollout(name: str, sentence: str | None, completions: int, lasting: int = ROLLOUTS) -> Finding:
    return Finding(name, sentence, completions, lasting, COMPLETIONS)


def never_ends(rollout: RolloutBatch) -> Finding:
    """Every completion was cut at the maximum length, and that is long enough for some to end."""
    cut = bool(rollout.infos) and all(info.get("finish_reason") == "length" for info in rollout.infos)
    longest = int(rollout.lengths.max())
    sentence = (
        f"Every completion was cut at the maximum length ({longest} tokens), none ended by itself (`rollout/eos_fraction` is "
        "0): rewards see unfinished texts and nothing is learned about ending; raise `max_new_tokens`, check `eos_token_ids` "
        "and the prompts' chat template, or set `missing_eos_penalty`."
    )
    return _of_rollout("never_ends", sentence if cut and longest >= SHORT else None, len(rollout))


def _equal(rewards: Tensor) -> Tensor:
    """Whether the rewards along the last axis are all the same, to the rounding that taking the KL term out leaves."""
    low, high = rewards.amin(-1), rewards.amax(-1)
    return high - low <= 1e-5 * torch.maximum(low.abs(), high.abs()).clamp(min=1)


def varies(paid: Tensor) -> bool:
    """Whether some completions got more reward than others, (B,), or than others of their prompt, (P, G)."""
    return not bool(_equal(paid).all())


def constant_reward(paid: Tensor) -> Finding:
    """Every completion got the same reward."""
    sentence = (
        f"Every completion got the same reward, {float(paid[0]):g} (`rollout/reward_std` is 0), so nothing can be learned from "
        "it; read some completions, check that the reward reads what the policy writes, take easier prompts, or pay parts of a "
        "success too."
    )
    return _of_rollout("constant_reward", None if varies(paid) else sentence, len(paid))


def saturated_reward(paid: Tensor) -> Finding:
    """Every completion got the same reward, of a reward that varied earlier in the run."""
    sentence = (
        f"The reward varied earlier and is now {float(paid[0]):g} for every completion: it is at its limit, and only the KL "
        "term still moves the policy; stop here (`Evaluation` keeps the best model), and read completions to see whether the "
        "reward was found out."
    )
    return _of_rollout("saturated_reward", None if varies(paid) else sentence, len(paid))


def groups_without_spread(paid: Tensor, num_generations: int, algorithm: str, *, varied: bool = False) -> Finding:
    """No prompt has two completions of different reward.

    Args:
        paid: the reward of each completion, (B,); rows prompt-major.
        num_generations: completions per prompt.
        algorithm: who learns from it.
        varied: whether there were such prompts earlier in the run.
    """
    groups = paid.view(-1, num_generations)
    seen = "No prompt had two completions of different reward (`rollout/frac_reward_zero_std` is 1)"
    never = (
        f"{seen}, and {algorithm} learns from these differences alone: no gradient comes from the reward; take prompts that succeed "
        "sometimes, more `num_generations`, a higher temperature, or a finer reward."
    )
    no_longer = (
        f"{seen}, as some had earlier: {algorithm} has learned what these prompts teach, or the policy has collapsed; read completions, "
        "and stop, take harder prompts, or raise `beta`."
    )
    sentence = no_longer if varied else never
    return _of_rollout("no_spread", sentence if bool(_equal(groups).all()) else None, len(groups))


def identical_fraction(rollout: RolloutBatch) -> float:
    """The share of completions that repeat another one of their prompt, or of the rollout where each prompt has one completion.

    0 if all differ, 1 if all completions of each prompt are the same.
    """
    prompts = rollout.prompt_ids.tolist()
    grouped = rollout.num_generations > 1 or len(set(map(tuple, prompts))) < len(prompts)
    keys = [tuple(prompt) if grouped else () for prompt in prompts]
    completions = [tuple(ids[:length]) for ids, length in zip(rollout.completion_ids.tolist(), rollout.lengths.tolist(), strict=True)]
    groups = len(set(keys))
    different = len(set(zip(keys, completions, strict=True)))
    return (len(keys) - different) / max(len(keys) - groups, 1)


def repeated_completions(rollout: RolloutBatch) -> Finding:
    """More than half of the completions repeat another one."""
    share = identical_fraction(rollout)
    sentence = (
        f"{share:.0%} of the completions repeat another one (`rollout/identical_fraction`): the policy has collapsed, or "
        "samples almost greedily; raise `beta` or the temperature, lower the learning rate, or go back to an earlier "
        "checkpoint."
    )
    long_enough = float(rollout.lengths.float().mean()) >= ALIKE
    return _of_rollout("identical", sentence if share > REPEATED and long_enough else None, len(rollout))


def empty_completions(rollout: RolloutBatch) -> Finding:
    """More than half of the completions are the end token alone."""
    ended = [info.get("finish_reason") == "eos" for info in rollout.infos]
    share = sum(e and n == 1 for e, n in zip(ended, rollout.lengths.tolist(), strict=False)) / max(len(rollout), 1)
    sentence = (
        f"{share:.0%} of the completions are empty (the end token at once): pay empty texts less, and check that the prompts "
        "end where the model's answer begins (chat template, no end token of their own)."
    )
    return _of_rollout("empty", sentence if share > EMPTY else None, len(rollout))


def part_findings(rollout: RolloutBatch, names: Sequence[str]) -> Iterator[Finding]:
    """Yields what stands out in the named parts of a reward that has several: one that pays nothing, one that pays always the same."""
    if len(names) < 2 or not rollout.infos:
        return
    for name in names:
        values = [float(info["rewards"][name]) for info in rollout.infos if name in info.get("rewards", {})]
        none = (
            f"The reward part `{name}` gave None for every completion, so it is left out of every reward; check the columns "
            "that it reads, or take it off."
        )
        same = (
            f"The reward part `{name}` has been {values[0] if values else 0:g} for every completion of {PART_ROLLOUTS} "
            "rollouts, so it teaches nothing; check what it looks for (a format that the policy never writes?), or take it off."
        )
        yield _of_rollout(f"part_without_value/{name}", None if values else none, len(rollout))
        constant = bool(values) and max(values) == min(values)
        yield _of_rollout(f"constant_part/{name}", same if constant else None, len(rollout), PART_ROLLOUTS)


# -- distributions --------------------------------------------------------------------------------------------------


def tolerance(dtype: torch.dtype) -> float:
    """Nats per token that two passes of a model that computes in `dtype` may differ by."""
    return TOLERANCE_HALF if dtype in (torch.bfloat16, torch.float16) else TOLERANCE_FLOAT32


def kl_at_start(rollout: RolloutBatch, dtype: torch.dtype) -> Finding:
    """The KL to a reference that is the policy itself, before the first step; it must be 0."""
    measured, limit = ~rollout.kl_per_sequence.isnan(), tolerance(dtype)
    per_token = float((rollout.kl_per_sequence[measured].abs() / rollout.lengths[measured]).mean()) if measured.any() else 0.0
    sentence = (
        f"Before the first optimiser step the KL to the reference is {per_token:.3g} nats per token, where it must be 0 (up to "
        f"{limit:g} in {_short(dtype)}): the tokens are drawn from another distribution than the one that is scored; make the "
        "policy with `engine=TransformersEngine()`, or check an engine of your own and that the model is in evaluation mode."
    )
    return Finding("kl_at_start", sentence if not per_token <= limit else None)


def negative_kl(rollout: RolloutBatch, dtype: torch.dtype) -> Finding:
    """The KL estimate is lower than chance allows it to be for samples of the policy that is scored."""
    measured = ~rollout.kl_per_sequence.isnan()
    total, tokens = float(rollout.kl_per_sequence[measured].double().sum()), int(rollout.lengths[measured].sum())
    rounding = tolerance(dtype) * tokens
    sentence = (
        f"The KL to the reference is {total / max(int(measured.sum()), 1):.3g} nats per completion, further below 0 than chance "
        "allows for samples of the policy: they are drawn from another distribution than the one that is scored; check an "
        "engine of your own, wrappers that change actions, and the sampling settings of policy and reference."
    )
    return Finding("negative_kl", sentence if total < -IMPROBABLE - rounding else None)


def sampling_mismatch(sampled: Tensor, scored: Tensor, mask: Tensor, dtype: torch.dtype) -> Finding:
    """The log-probs that sampling gave differ from those of the training pass over the same tokens; each (B, T)."""
    limit = tolerance(dtype)
    gap = _mean_gap(sampled, scored, mask)
    sentence = (
        f"The log-probabilities of the sampled tokens differ from those of the training pass by {gap:.3g} nats per token (up to "
        f"{limit:g} is rounding in {_short(dtype)}): the policy learns from samples that are not its own; make it with "
        "`engine=TransformersEngine()`, or check an engine of your own."
    )
    return Finding("sampling_mismatch", sentence if not gap <= limit else None)


def ratio_at_start(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, dtype: torch.dtype) -> Finding:
    """The ratio of the policy to itself, before the first step; it must be 1. Both (B, T)."""
    limit = tolerance(dtype)
    gap = _mean_gap(log_probs, old_log_probs, mask)
    sentence = (
        f"Before the first optimiser step the ratio of the policy to itself is off 1 by {gap:.3g} in its logarithm (up to "
        f"{limit:g} is rounding in {_short(dtype)}): two passes over the same tokens do not agree; switch dropout off "
        "(`policy.model.eval()`), set `micro_batch_size=1` if rows influence each other, or train in float32."
    )
    return Finding("ratio_at_start", sentence if not gap <= limit else None)


def _mean_gap(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Returns how far two sets of log-probs are apart, in nats per token that counts."""
    return float((one - other).abs()[mask].mean())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- optimiser steps ------------------------------------------------------------------------------------------------


def zero_gradient(norm: float) -> Finding:
    """The gradient is exactly 0."""
    sentence = (
        f"The gradient was exactly 0 in {STEPS} optimiser steps in a row (`train/grad_norm`): nothing is learned; look for "
        "rewards that are all equal, pairs whose two sides are the same tokens, or a model none of whose trained weights "
        "reaches its outputs."
    )
    return Finding("zero_gradient", sentence if norm == 0 else None, lasting=STEPS)


def broken_gradient(norm: float, step: int) -> Finding:
    """The gradient is not finite; the step must not be taken, for it would make every weight NaN."""
    sentence = (
        f"The gradient of optimiser step {step} is not finite ({norm}), so this step is left out and the weights stay as they "
        "are (`train/skipped_steps` counts them); lower the learning rate, look for infinite rewards, or train in float32 with "
        '`autocast="bfloat16"` and not in float16.'
    )
    return Finding("broken_gradient", sentence if not norm < float("inf") else None)


def still_outputs(before: Tensor, now: Tensor, steps: int) -> Finding:
    """What an adapter's model says of the same tokens, before the first steps and after them."""
    sentence = (
        f"After {steps} optimiser steps the model with its adapter says exactly what it said before them: the adapter is not "
        "trained; check that it is the active one, that its weights require gradients, that its target modules are used, and "
        "the learning rate."
    )
    return Finding("still_adapter", sentence if torch.equal(before, now) else None)
