"""What offline learners train on when they are given no file: made from what ships, with the run's seed."""

import random
from typing import TYPE_CHECKING, Any

from textgym.bundled import bundled_prompts
from textgym.bundled.grammar import sample_review, to_text
from textgym.feedback import Comparison, SyntheticAnnotator

if TYPE_CHECKING:
    from textgym.agents import CausalLMPolicy

Row = dict[str, Any]
DEMONSTRATIONS = 2000
COMPLETIONS_PER_PROMPT = 20  # of 200 prompts: 2,000 pairs
REWARD = "film-review"
TRUE_REWARD = "film-review-true"
ANNOTATOR_TEMPERATURE = 0.25  # of the comparisons that a reward model is trained on, in true reward
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
    """Returns pairs of different completions of the bundled prompts by the policy, labelled by Bradley–Terry with the bundled reward."""
    rows = _sampled(policy, seed, max_new_tokens)
    first, second = rows[::2], rows[1::2]
    texts = [[row["completion"] for row in half] for half in (first, second)]
    won = _annotator(seed).outcomes([row["prompt"] for row in first], *texts)
    pairs = []
    for one, other, outcome in zip(first, second, won, strict=True):
        chosen, rejected = (one, other) if outcome else (other, one)
        if chosen["completion_ids"] != rejected["completion_ids"]:  # two samples may be the same, which teaches nothing
            pairs.append({**_ids(chosen, "chosen_ids"), "rejected_ids": rejected["completion_ids"]})
    return pairs


def comparisons(policy: "CausalLMPolicy", seed: int, max_new_tokens: int) -> list[Comparison]:
    """Returns pairs of the policy's own completions of the bundled prompts, compared by a noisy annotator who knows the true reward."""
    rows = _sampled(policy, seed, max_new_tokens)
    first, second = rows[::2], rows[1::2]
    texts = [[row["completion"] for row in half] for half in (first, second)]
    annotator = SyntheticAnnotator(TRUE_REWARD, temperature=ANNOTATOR_TEMPERATURE, seed=[seed, 1])
    return annotator.compare([row["prompt"] for row in first], *texts)


def labelled(policy: "CausalLMPolicy", seed: int, max_new_tokens: int) -> list[Row]:
    """Returns the policy's own completions of the bundled prompts, desirable with probability σ(reward): the reward's mean on them is 0."""
    rows = _sampled(policy, seed, max_new_tokens)
    labels = _annotator(seed).label([row["prompt"] for row in rows], [row["completion"] for row in rows])
    return [{**_ids(row, "completion_ids"), "label": label.good} for row, label in zip(rows, labels, strict=True)]


def _annotator(seed: int) -> SyntheticAnnotator:
    return SyntheticAnnotator(REWARD, seed=[seed, 1])


def _sampled(policy: "CausalLMPolicy", seed: int, max_new_tokens: int) -> list[Row]:
    """Samples completions, neighbours of the same prompt."""
    prompts = [row["prompt"] for row in bundled_prompts("train")]
    encoded = dict(zip(prompts, _prompt_ids(policy, prompts), strict=True))
    found: list[Row] = []
    for place, start in enumerate(range(0, len(prompts), 50)):
        part = prompts[start : start + 50]
        sampled = policy.generate(part, max_new_tokens=max_new_tokens, num_generations=COMPLETIONS_PER_PROMPT, seed=seed * 1000 + place)
        texts = [prompt for prompt in part for _ in range(COMPLETIONS_PER_PROMPT)]
        found += [
            {"prompt": text, "prompt_ids": encoded[text], "completion": completion, "completion_ids": ids}
            for text, completion, ids in zip(texts, sampled.texts, sampled.completion_ids, strict=True)
        ]
    return found


def _prompt_ids(policy: "CausalLMPolicy", prompts: list[str]) -> list[list[int]]:
    ids, lengths = policy.encode_prompts(prompts)
    return [row[len(row) - length :] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]


def _ids(row: Row, column: str) -> Row:
    return {"prompt_ids": row["prompt_ids"], column: row["completion_ids"]}
