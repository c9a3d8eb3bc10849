"""Best-of-n: sample n completions, keep the one with the highest reward. No training; what every trained policy is held against.

Beside an RL agent it pays for its reward at every use, n queries per completion, and for its KL once and for all: at most
log n − (n − 1)/n, little for what it gains (Beirami et al. 2024, arXiv:2401.01879). Rejection sampling trains on what it keeps.
"""

from dataclasses import replace
from typing import Any

import torch

from textgym.agents.common.checks import check_count
from textgym.agents.common.generation import Generation
from textgym.agents.common.scored_completions import PromptRows, score
from textgym.agents.policy import CausalLMPolicy
from textgym.kl import best_of_n_kl
from textgym.rewards.compose import RewardSet


class BestOfN:
    """A policy that samples n completions of a prompt and keeps the best one.

        y = argmax_i r(x, y_i),   y_1 .. y_n ~ π(·|x);        KL(π_n ‖ π) ≤ log n − (n − 1)/n

    Of completions with equal rewards the first is kept, which makes the same distribution as any other rule that does not look at
    them (`textgym.exact.best_of_n`, which has that distribution on a token tree).

    Args:
        policy: π.
        reward: r, in any form that `RewardSet.build` takes.
        n: completions of which one is kept.

    Attributes:
        reward_queries: completions that were scored since the object was made.
    """

    def __init__(self, policy: CausalLMPolicy, reward: Any, n: int = 4) -> None:
        check_count("n", n, "completions")
        self.policy, self.reward, self.n = policy, RewardSet.build(reward), n
        self.reward_queries = 0

    @property
    def kl_bound(self) -> float:
        """The KL to the policy in nats per completion, at most."""
        return best_of_n_kl(self.n)

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 32,
        temperature: float | None = None,
        num_generations: int = 1,
        seed: int | None = None,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Generation:
        """Completes prompts; each completion is the best of n.

        Args:
            prompts: texts, message lists, or dicts with a `prompt` column, the other columns of which reach the reward; or any other form
                that an environment takes.
            max_new_tokens: as in `CausalLMPolicy.generate`.
            temperature: as there.
            num_generations: completions kept per prompt, each out of n of its own; rows are prompt-major. A prompt is prefilled once.
            seed: as there; with n = 1 the completions are the policy's own with this seed.
            generator: as there.
            **options: further arguments of `CausalLMPolicy.generate`.

        Returns:
            What the policy's `generate` returns; `log_probs` are those of π, not of π_n, which has none that can be computed.
        """
        check_count("num_generations", num_generations, "completions")
        rows, drawn = PromptRows.read(prompts), num_generations * self.n
        sampled = self.policy.generate(
            rows.as_rows(), max_new_tokens, temperature, num_generations=drawn, seed=seed, generator=generator, **options
        )
        owners = [prompt for prompt in range(len(rows)) for _ in range(drawn)]
        rewards, _ = score(self.reward, rows.select(owners), sampled.prompt_id_lists, sampled.completion_ids, sampled.decode)
        self.reward_queries += len(rewards)
        best = torch.from_numpy(rewards.reshape(-1, self.n).argmax(axis=1))  # (P * G, n) -> (P * G,), the first of equals
        return select(sampled, torch.arange(len(best)) * self.n + best)


def select(generation: Generation, rows: torch.Tensor) -> Generation:
    """Returns some rows of a generation, (R,) int64, in that order."""
    rows = rows.to(generation.ids.device)
    names = ("ids", "lengths", "log_probs", "prompt_ids", "prompt_lengths", "stopped")
    kept = None if generation.kept is None else generation.kept[rows]
    return replace(generation, kept=kept, **{name: getattr(generation, name)[rows] for name in names})
