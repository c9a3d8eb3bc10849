"""Rejection sampling: sample, score, keep the best, fine-tune on them, and again (filtered SFT).

RAFT keeps the best of n for each prompt (Dong et al. 2023, arXiv:2304.06767), ReST all above a threshold (Gulcehre et al. 2023,
arXiv:2308.08998). Against best-of-n it pays for the reward once, in training; against the policy gradient it learns from good samples
only and has no KL term: what holds it back are the number of rounds and n.
"""

from dataclasses import dataclass, field
from typing import Any, Self, Unpack

import numpy as np
import torch
from stable_baselines3.common.type_aliases import Schedule

from textgym.agents.common.checks import check_count, check_number
from textgym.agents.common.generation import Generation
from textgym.agents.common.options import CommonOptions, with_common_defaults
from textgym.agents.common.scored_completions import Float64Array, PromptRows, start_scoring
from textgym.agents.policy import CausalLMPolicy
from textgym.agents.sft import SFT
from textgym.pending import Pending, in_turn
from textgym.rewards.compose import RewardSet


@dataclass(frozen=True)
class KeptSamples:
    """What is left of a policy's samples.

    Attributes:
        examples: rows for `SFT`: prompt_ids and completion_ids as they were sampled, and prompt, completion and reward to look at.
        rewards: (P, n) rewards of all samples.
        kept: (P, n) bool, which of them were kept.
    """

    examples: list[dict[str, Any]] = field(repr=False)
    rewards: Float64Array = field(repr=False)
    kept: np.ndarray[Any, np.dtype[np.bool_]] = field(repr=False)

    @property
    def reward_queries(self) -> int:
        """How many samples were scored."""
        return int(self.rewards.size)

    @property
    def reward_mean(self) -> float:
        """The mean reward of all samples: that of the policy."""
        return float(self.rewards.mean())

    @property
    def kept_reward_mean(self) -> float:
        """The mean reward of those that were kept: what fine-tuning goes towards."""
        return float(self.rewards[self.kept].mean())


@dataclass(frozen=True)
class Round:
    """One round of rejection sampling.

    Attributes:
        samples: what was sampled, and kept.
        nats_per_token: cross-entropy of the kept samples after fine-tuning on them.
    """

    samples: KeptSamples
    nats_per_token: float


def keep_best(
    policy: CausalLMPolicy,
    prompts: Any,
    reward: Any,
    *,
    n: int = 4,
    threshold: float | None = None,
    quantile: float | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> KeptSamples:
    """Samples n completions of each prompt and keeps the best.

    Args:
        policy: who is sampled.
        prompts: in any form that an environment takes.
        reward: in any form that `RewardSet.build` takes.
        n: completions per prompt.
        threshold: keep every sample with at least this reward. At most one of `threshold` and `quantile` is given; with neither the best
            sample of each prompt is kept, the first of equals.
        quantile: keep the samples whose reward is at least this quantile of all rewards, in [0, 1); 0.9 keeps the best tenth.
        max_new_tokens: a completion ends there, or at EOS.
        batch_size: prompts completed at once.
        seed: of sampling; None: the policy's own generator goes on.
        generator: takes the place of `seed`.

    Raises:
        ValueError: an argument breaks one of the rules above, or no sample reaches the threshold.
    """
    _check(n, threshold, quantile)
    rows, rewards = PromptRows.read(prompts), RewardSet.build(reward)
    if seed is not None:
        if generator is not None:
            raise ValueError("Give `seed` or `generator`, not both: a generator carries its own state.")
        generator = torch.Generator(policy.device).manual_seed(seed)

    def start(batch: PromptRows) -> Pending[list[dict[str, Any]]]:
        """Samples completions of some prompts, and asks for their rewards."""
        sampled = policy.generate(batch.as_rows(), max_new_tokens, num_generations=n, generator=generator)
        owned = batch.select([prompt for prompt in range(len(batch)) for _ in range(n)])
        scores = start_scoring(rewards, owned, sampled.prompt_id_lists, sampled.completion_ids, sampled.decode)
        return scores.then(lambda paid: _examples(owned, sampled, paid[0]))

    examples = [example for part in in_turn(start(batch) for batch in rows.batches(batch_size)) for example in part]
    table = np.array([example["reward"] for example in examples]).reshape(-1, n)
    kept = _kept(table, threshold, quantile)
    return KeptSamples([example for example, keep in zip(examples, kept.ravel().tolist(), strict=True) if keep], table, kept)


def _examples(prompts: PromptRows, sampled: Generation, rewards: Float64Array) -> list[dict[str, Any]]:
    """Returns the rows of `KeptSamples.examples` for all samples."""
    columns = {
        "prompt_ids": sampled.prompt_id_lists,
        "completion_ids": sampled.completion_ids,
        "prompt": prompts.texts,
        "completion": sampled.texts,
        "reward": rewards.tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class RejectionSampling:
    """Trains a policy by rounds of sampling, keeping the best and supervised fine-tuning on them.

        D_k = {(x, y_i): y_i ~ π_k(·|x), i = 1..n, kept},    π_{k+1} = SFT(π_k, D_k)

    Each round samples the policy as it then is. With one round and enough samples and epochs the fixed point is best-of-n of the policy
    at the start (`textgym.exact.best_of_n`).

    Args:
        policy: the policy to train, in place.
        prompts: in any form that an environment takes.
        reward: in any form that `RewardSet.build` takes.
        learning_rate: of SFT in each round, a number or a schedule.
        n: see `keep_best`.
        threshold: see `keep_best`.
        quantile: see `keep_best`.
        prompts_per_round: prompts sampled per round, in random order, none again before all have come (default: all). A round takes n
            times as many reward queries.
        max_new_tokens: a completion ends there, or at EOS.
        n_epochs: passes over the kept samples of each round.
        batch_size: samples per optimiser step.
        sampling_batch_size: prompts completed at once.
        **options: of `SFT`, see `CommonOptions`; the `seed` is also that of sampling and of the order of prompts, and an `evaluation` goes
            on from round to round.

    Attributes:
        rounds: what happened, round by round.
    """

    def __init__(
        self,
        policy: CausalLMPolicy,
        prompts: Any,
        reward: Any,
        learning_rate: float | Schedule = 1e-5,
        *,
        n: int = 4,
        threshold: float | None = None,
        quantile: float | None = None,
        prompts_per_round: int | None = None,
        max_new_tokens: int = 32,
        n_epochs: int = 1,
        batch_size: int = 16,
        sampling_batch_size: int = 64,
        **options: Unpack[CommonOptions],
    ) -> None:
        _check(n, threshold, quantile)
        self.policy, self.prompts, self.reward = policy, PromptRows.read(prompts), RewardSet.build(reward)
        self.prompts_per_round = len(self.prompts) if prompts_per_round is None else prompts_per_round
        check_count("prompts_per_round", self.prompts_per_round, "prompts")
        self.learning_rate, self.n, self.threshold, self.quantile = learning_rate, n, threshold, quantile
        self.max_new_tokens, self.n_epochs, self.batch_size = max_new_tokens, n_epochs, batch_size
        self.sampling_batch_size, self.options = sampling_batch_size, options
        given = with_common_defaults(options, type(self))["seed"]
        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if given is None else given
        self.generator = torch.Generator(policy.device).manual_seed(self.seed)
        self._order = np.random.default_rng(self.seed)
        self._waiting: list[int] = []
        self.rounds: list[Round] = []

    @property
    def reward_queries(self) -> int:
        """Completions that were scored in all rounds."""
        return sum(one.samples.reward_queries for one in self.rounds)

    def learn(self, rounds: int = 1) -> Self:
        """Takes further rounds.

        Args:
            rounds: how many.

        Returns:
            self
        """
        check_count("rounds", rounds, "rounds")
        for _ in range(rounds):
            samples = self.sample()
            self.rounds.append(Round(samples, self.train(samples)))
        return self

    def sample(self) -> KeptSamples:
        """Samples the next prompts and keeps the best."""
        return keep_best(
            self.policy,
            self._next_prompts(),
            self.reward,
            n=self.n,
            threshold=self.threshold,
            quantile=self.quantile,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.sampling_batch_size,
            generator=self.generator,
        )

    def train(self, samples: KeptSamples) -> float:
        """Fine-tunes on what was kept, with a fresh optimiser; returns the nats per token afterwards."""
        options: CommonOptions = {**self.options}
        options["seed"] = self.seed + len(self.rounds)
        agent = SFT(
            self.policy, samples.examples, self.learning_rate, n_epochs=self.n_epochs, batch_size=self.batch_size, **options
        ).learn()
        return agent.evaluate(samples.examples)["train/nats_per_token"]

    def _next_prompts(self) -> PromptRows:
        while len(self._waiting) < self.prompts_per_round:
            self._waiting += self._order.permutation(len(self.prompts)).tolist()
        chosen, self._waiting = self._waiting[: self.prompts_per_round], self._waiting[self.prompts_per_round :]
        return self.prompts.select(chosen)


def _kept(rewards: Float64Array, threshold: float | None, quantile: float | None) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which samples stay, (P, n) bool."""
    if threshold is None and quantile is None:
        return np.asarray(np.arange(rewards.shape[1]) == rewards.argmax(axis=1)[:, None])
    least = threshold if threshold is not None else float(np.quantile(rewards, quantile or 0.0))
    kept = rewards >= least
    if not kept.any():
        raise ValueError(f"`threshold` must be reached by at least one sample, got {threshold}; the highest reward is {rewards.max():g}.")
    return np.asarray(kept)


def _check(n: int, threshold: float | None, quantile: float | None) -> None:
    check_count("n", n, "completions")
    if threshold is not None and quantile is not None:
        raise ValueError("Give `threshold` or `quantile`, not both; with neither the best of each prompt is kept.")
    if threshold is not None:
        check_number("threshold", threshold)
    if quantile is not None and not 0 <= quantile < 1:
        raise ValueError(f"`quantile` must be a number from 0 to below 1, got {quantile!r}.")
