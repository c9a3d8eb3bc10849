"""One policy against another, or against given texts: win rate, rewards, KL, and what the texts look like, in one report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from textgym.agents.best_of_n import BestOfN
from textgym.agents.common.checks import check_count
from textgym.agents.common.generation import Generation
from textgym.agents.common.perplexity import Perplexity, perplexity
from textgym.agents.common.scored_completions import Float64Array, PromptRows, Sampler, start_scoring, text_ids
from textgym.agents.policy import CausalLMPolicy
from textgym.evaluation.bootstrap import Estimate, bootstrap_mean
from textgym.evaluation.over_optimisation import OverOptimisationReport, ScoredTexts, over_optimisation_report
from textgym.evaluation.tables import markdown_table
from textgym.evaluation.text_statistics import TextStatistics, text_statistics
from textgym.evaluation.win_rate import WinRate, judged_points, win_points, win_rate_from_points
from textgym.feedback.judging import PairJudge
from textgym.pending import Pending, in_turn
from textgym.rewards.compose import RewardSet, Scores
from textgym.rewards.episodes import as_completion

REWARD, TRUE_REWARD, JUDGE = "reward", "true_reward", "judge"


@dataclass(frozen=True)
class SideReport:
    """What one side of a comparison wrote.

    Attributes:
        name: of the side.
        rewards: mean of each reward that was given, "reward" and "true_reward", with its interval over prompts.
        kl_per_sequence: KL to the reference, nats per completion; None for given texts and without a reference.
        kl_is_bound: it is an upper bound, as of best-of-n: the KL bound plus the log-ratio of the policy that is sampled from.
        perplexity: of the texts under the reference; None without one.
        texts: length, diversity, repetition.
        reward_queries: rewards that making the texts took; 0 for a policy.
    """

    name: str
    rewards: dict[str, Estimate]
    kl_per_sequence: Estimate | None
    kl_is_bound: bool
    perplexity: Perplexity | None
    texts: TextStatistics
    reward_queries: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as JSON types."""
        return {
            "name": self.name,
            "rewards": {name: estimate.to_dict() for name, estimate in self.rewards.items()},
            "kl_per_sequence": None if self.kl_per_sequence is None else self.kl_per_sequence.to_dict(),
            "kl_is_bound": self.kl_is_bound,
            "perplexity": None if self.perplexity is None else self.perplexity.to_dict(),
            "texts": self.texts.to_dict(),
            "reward_queries": self.reward_queries,
        }


@dataclass(frozen=True)
class ComparisonReport:
    """What `compare_policies` found.

    Attributes:
        sides: A, and B where there is one.
        win_rates: of A against B, by "true_reward", "reward" and "judge", those that were given.
        over_optimisation: B as before, A as after; None unless both are policies and both rewards were given.
        samples: one dict per completion of A: prompt, its completions and rewards by the names of the sides.
        settings: how the texts were sampled.
    """

    sides: tuple[SideReport, ...]
    win_rates: dict[str, WinRate]
    over_optimisation: OverOptimisationReport | None
    samples: list[dict[str, Any]] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report without its samples, as JSON types."""
        return {
            "sides": [side.to_dict() for side in self.sides],
            "win_rates": {name: rate.to_dict() for name, rate in self.win_rates.items()},
            "over_optimisation": None if self.over_optimisation is None else self.over_optimisation.to_dict(),
            "settings": self.settings,
        }

    def table(self) -> list[list[str]]:
        """Returns the numbers as rows of cells: the label and one value per side; rows that no side has are left out."""
        rows = [[label, *(cell(side) for side in self.sides)] for label, cell in _ROWS.items()]
        return [row for row in rows if any(row[1:])]

    def win_rate_lines(self) -> list[str]:
        """Returns the win rates in words."""
        return [f"{self.sides[0].name} against {self.sides[1].name} by {_LABELS[name]}: {rate}" for name, rate in self.win_rates.items()]

    def to_markdown(self) -> str:
        """Returns the report as text: the table, the win rates and, where there is one, the reward-hacking report."""
        parts = [markdown_table(["", *(side.name for side in self.sides)], self.table())]
        parts += self.win_rate_lines()
        if self.over_optimisation is not None:
            parts += [
                f"From {self.sides[1].name} to {self.sides[0].name}: is the reward being hacked?",
                self.over_optimisation.to_markdown(),
            ]
        return "\n\n".join(parts).rstrip() + "\n"

    __str__ = to_markdown


def compare_policies(
    policy: CausalLMPolicy | BestOfN,
    prompts: Any,
    against: CausalLMPolicy | BestOfN | str | None = None,
    *,
    reward: Any = None,
    true_reward: Any = None,
    judge: PairJudge | None = None,
    reference: CausalLMPolicy | None = None,
    max_new_tokens: int = 32,
    num_generations: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    confidence: float = 0.95,
    names: Sequence[str] = ("A", "B"),
    on_batch: Callable[[int], None] | None = None,
) -> ComparisonReport:
    """Samples completions of held-out prompts and measures them, beside those of another policy or given texts.

    Args:
        policy: A, which is sampled as it is (its own temperature and truncation).
        prompts: held-out prompts in any form that an environment takes; further columns reach the rewards.
        against: B: a policy; the name of the column of `prompts` that holds the texts to beat; None measures A alone.
        reward: the proxy, what was trained on; in any form that `RewardSet.build` takes.
        true_reward: the gold reward, what is meant.
        judge: is shown both texts of a prompt, in both orders; see `textgym.evaluation.judged_win_rate`.
        reference: π_ref, for KL and perplexity; None measures neither. KL needs the vocabulary of the policy; for perplexity the texts of
            a policy with another one are tokenised again.
        max_new_tokens: a completion ends there, or at EOS.
        num_generations: completions per prompt. Intervals are over prompts all the same.
        seed: of sampling, the same for both sides, and of the bootstrap.
        batch_size: prompts completed at once.
        confidence: of the intervals, in (0, 1).
        names: what the sides are called.
        on_batch: called with the number of prompts that were completed, batch by batch and side by side; for a progress bar.

    Raises:
        ValueError: an argument breaks one of the rules above.
    """
    check_count("batch_size", batch_size, "prompts")
    rows = PromptRows.read(prompts)
    rewards = {name: RewardSet.build(one) for name, one in ((REWARD, reward), (TRUE_REWARD, true_reward)) if one is not None}
    options = _Options(reference, max_new_tokens, num_generations, seed, batch_size, on_batch)
    given = [_given(_base(policy), rows, against)] if isinstance(against, str) else []  # first: sampling takes longer than a wrong name
    samplers = [policy] if against is None or isinstance(against, str) else [policy, against]
    written = chain((_sampled(one, rows, options) for one in samplers), given)
    sides = list(in_turn(side.start_scoring(rewards) for side in written))
    estimate = partial(bootstrap_mean, confidence=confidence, seed=seed)
    win_rates = {}
    if len(sides) == 2:
        points = {
            name: win_points(*(side.per_prompt(side.scores[name]) for side in sides)) for name in (TRUE_REWARD, REWARD) if name in rewards
        }
        if judge is not None:
            points[JUDGE] = _judged(judge, *sides)
        win_rates = {name: win_rate_from_points(found, confidence=confidence, seed=seed) for name, found in points.items()}
    return ComparisonReport(
        sides=tuple(side.report(name, reference, estimate) for name, side in zip(names, sides, strict=False)),
        win_rates=win_rates,
        over_optimisation=_over_optimisation(sides, confidence, seed) if len(rewards) == 2 and _both_sampled(sides) else None,
        samples=_samples(sides, names),
        settings={"prompts": len(rows), "num_generations": num_generations, "max_new_tokens": max_new_tokens, "seed": seed},
    )


@dataclass(frozen=True)
class _Options:
    """How to sample; see `compare_policies`."""

    reference: CausalLMPolicy | None
    max_new_tokens: int
    num_generations: int
    seed: int
    batch_size: int
    on_batch: Callable[[int], None] | None


@dataclass(eq=False)
class _Side:
    """The texts of one side, prompt-major.

    Attributes:
        prompts: one row per text.
        num_prompts: P.
        prompt_ids: N lists of tokens, those of the prompts.
        ids: N lists of tokens, EOS included.
        policy: whose tokens they are.
        kl: (N,) Σ_t log π − log π_ref, nats; None where it was not measured.
        sampled: a policy wrote them.
        kl_is_bound: see `SideReport`.
        reward_queries: rewards that it took.
        scores: (N,) by reward.
    """

    prompts: PromptRows
    num_prompts: int
    prompt_ids: list[list[int]]
    ids: list[list[int]]
    policy: CausalLMPolicy
    kl: Float64Array | None
    sampled: bool
    kl_is_bound: bool = False
    reward_queries: int = 0
    scores: dict[str, Float64Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.texts = self.policy.decode_texts(self.prompt_ids, self.ids)

    def per_prompt(self, values: Float64Array) -> Float64Array:
        """(N,) -> (P, G)."""
        return values.reshape(self.num_prompts, -1)

    def start_scoring(self, rewards: dict[str, RewardSet]) -> Pending["_Side"]:
        """Asks for the rewards; the result is this side with its scores."""
        pending = Pending.of(self)
        for name, reward in rewards.items():
            with pending:
                paid = start_scoring(reward, self.prompts, self.prompt_ids, self.ids, self.policy.decode_texts)
            pending = pending.beside(paid).then(partial(_with_scores, name))
        return pending

    def report(self, name: str, reference: CausalLMPolicy | None, estimate: Any) -> SideReport:
        means = {key: estimate(self.per_prompt(scores).mean(axis=1)) for key, scores in self.scores.items()}
        return SideReport(
            name=name,
            rewards=means,
            kl_per_sequence=None if self.kl is None else estimate(self.per_prompt(self.kl).mean(axis=1)),
            kl_is_bound=self.kl_is_bound,
            perplexity=None if reference is None else perplexity(reference, self.prompts.as_rows(), self._ids_of(reference)),
            texts=text_statistics(self.texts, self.ids, self.policy.eos_token_ids),
            reward_queries=self.reward_queries,
        )

    def _ids_of(self, reference: CausalLMPolicy) -> list[list[int]]:
        return self.ids if same_tokens(self.policy, reference) else text_ids(reference, self.prompts, self.texts, "completion {}")[1]


def _with_scores(name: str, scored: tuple[_Side, Scores]) -> _Side:
    """Notes a side's scores."""
    side, (totals, _) = scored
    side.scores[name] = totals
    return side


def _sampled(sampler: Sampler, rows: PromptRows, options: _Options) -> _Side:
    """Lets a policy complete all prompts."""
    policy = _base(sampler)
    generator = torch.Generator(policy.device).manual_seed(options.seed)
    queries = getattr(sampler, "reward_queries", 0)
    prompt_ids: list[list[int]] = []
    ids: list[list[int]] = []
    kls: list[Float64Array] = []
    for batch in rows.batches(options.batch_size):
        # Best-of-n scores what it samples, and its reward may want the other columns; some go into chat templates.
        generation = sampler.generate(batch.as_rows(), options.max_new_tokens, num_generations=options.num_generations, generator=generator)
        prompt_ids += generation.prompt_id_lists
        ids += generation.completion_ids
        if options.reference is not None and same_tokens(policy, options.reference):
            kls.append(_log_ratios(policy, options.reference, generation) + (sampler.kl_bound if isinstance(sampler, BestOfN) else 0.0))
        if options.on_batch is not None:
            options.on_batch(len(batch))
    owners = [prompt for prompt in range(len(rows)) for _ in range(options.num_generations)]
    return _Side(
        prompts=rows.select(owners),
        num_prompts=len(rows),
        prompt_ids=prompt_ids,
        ids=ids,
        policy=policy,
        kl=np.concatenate(kls) if kls else None,
        sampled=True,
        kl_is_bound=isinstance(sampler, BestOfN),
        reward_queries=getattr(sampler, "reward_queries", 0) - queries,
    )


def _given(policy: CausalLMPolicy, rows: PromptRows, column: str) -> _Side:
    """Takes the texts of a column."""
    if column not in rows.columns:
        raise ValueError(
            f"`against` must be a policy or the name of a column of `prompts` that holds texts, got {column!r}; "
            f"the columns are {list(rows.columns)}."
        )
    texts = rows.columns[column]
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"Column {column!r} of `prompts` must hold a text in every row, got {text!r} in row {row}.")
    return _Side(rows, len(rows), *text_ids(policy, rows, texts, f"{column!r} of row {{}} of `prompts`"), policy, None, False)


def _base(sampler: Any) -> CausalLMPolicy:
    """Returns the policy that is sampled from."""
    policy = sampler.policy if isinstance(sampler, BestOfN) else sampler
    if not isinstance(policy, CausalLMPolicy):
        raise ValueError(f"`policy` and `against` must be a CausalLMPolicy or a BestOfN, got {type(policy).__name__}.")
    return policy


def same_tokens(policy: CausalLMPolicy, other: CausalLMPolicy) -> bool:
    """Whether the ids of both policies mean the same tokens."""
    return policy.tokenizer is other.tokenizer or policy.tokenizer.get_vocab() == other.tokenizer.get_vocab()


def _log_ratios(policy: CausalLMPolicy, reference: CausalLMPolicy, generation: Generation) -> Float64Array:
    """Returns Σ_t log π − log π_ref of sampled completions, (N,), both at the policy's temperature and kept set, as `KLShaping` has it."""
    arrays = [t.cpu().numpy() for t in (generation.prompt_ids, generation.prompt_lengths, generation.ids, generation.lengths)]
    other = policy.reference_sequence_log_probs(reference, *arrays)
    ratios: Float64Array = generation.log_probs.double().sum(1).cpu().numpy() - other.sum(axis=1, dtype=np.float64)
    return ratios


def _judged(judge: PairJudge, first: _Side, second: _Side) -> Float64Array:
    """Returns the judge's points, (P, G); a side with one text per prompt has it compared with all of the other's."""
    per_prompt = max(len(side.ids) for side in (first, second)) // first.num_prompts
    longer = first if len(first.ids) >= len(second.ids) else second
    texts = [[side.texts[place * len(side.ids) // len(longer.ids)] for place in range(len(longer.ids))] for side in (first, second)]
    return judged_points(judge, longer.prompts.texts, *texts).reshape(first.num_prompts, per_prompt)


def _both_sampled(sides: Sequence[_Side]) -> bool:
    return len(sides) == 2 and all(side.sampled for side in sides)


def _over_optimisation(sides: Sequence[_Side], confidence: float, seed: int) -> OverOptimisationReport:
    after, before = sides
    texts = [
        ScoredTexts(
            side.prompts.texts,
            [as_completion(*row) for row in zip(side.prompts.texts, side.texts, strict=True)],
            side.scores[REWARD],
            side.scores[TRUE_REWARD],
            side.ids,
        )
        for side in (before, after)
    ]
    return over_optimisation_report(*texts, eos_token_ids=after.policy.eos_token_ids, confidence=confidence, seed=seed)


def _samples(sides: Sequence[_Side], names: Sequence[str]) -> list[dict[str, Any]]:
    samples = []
    for row, prompt in enumerate(sides[0].prompts.texts):
        sample: dict[str, Any] = {"prompt": prompt}
        for name, side in zip(names, sides, strict=False):
            place = row * len(side.ids) // len(sides[0].ids)
            scores = {key: float(values[place]) for key, values in side.scores.items()}
            sample[name] = {"completion": side.texts[place], **scores}
        samples.append(sample)
    return samples


def _kl(side: SideReport) -> str:
    if side.kl_per_sequence is None:
        return ""
    return f"at most {side.kl_per_sequence.mean:.3f}" if side.kl_is_bound else str(side.kl_per_sequence)


_LABELS = {TRUE_REWARD: "true reward", REWARD: "reward", JUDGE: "judge"}
_ROWS: dict[str, Any] = {
    "reward": lambda side: str(side.rewards.get(REWARD, "")),
    "true reward": lambda side: str(side.rewards.get(TRUE_REWARD, "")),
    "KL to the reference, nats per completion": _kl,
    "perplexity under the reference": lambda side: "" if side.perplexity is None else f"{side.perplexity.perplexity:.2f}",
    "nats per token under the reference": lambda side: "" if side.perplexity is None else f"{side.perplexity.nats_per_token:.3f}",
    "tokens per completion": lambda side: f"{side.texts.tokens:.1f}",
    "words per completion": lambda side: f"{side.texts.words:.1f}",
    "completions that end by themselves": lambda side: f"{side.texts.ended:.0%}",
    "distinct-1": lambda side: f"{side.texts.distinct_1:.3f}",
    "distinct-2": lambda side: f"{side.texts.distinct_2:.3f}",
    "repeated 3-grams": lambda side: f"{side.texts.repetition:.3f}",
    "reward queries per completion": lambda side: f"{side.reward_queries / side.texts.count:g}" if side.reward_queries else "",
}
