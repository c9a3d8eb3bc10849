"""Certifies how near GRPO comes to the frontier of reward and KL on the hard tree of five seeds.

    python benchmarks/certify_frontier.py [--seeds 0 1 2 3 4] [--out result.json]
    python benchmarks/certify_frontier.py --fixed-points [--generations 8]

GRPO does not maximise J, so π* is not its goal; but it should waste little. At β = 0.04, the value of its paper, and groups of 8 it passes
where its gain in reward over the reference is at least 95 % of what any policy could gain at the KL that it ends with. `certify.py` runs
it too, as the agent "grpo-frontier".

β falls to 0.04 from 2, by a constant factor per token, over the first 70 % of the training: a policy that is let go at once collapses onto
the completions that the reference samples most, and from there the best are out of reach.

`--fixed-points` trains nothing: it iterates GRPO's expected update, groups sampled, and says what share its fixed point has, which is the
most that the agent can be asked for.
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import common
import numpy as np
import torch

from textgym.agents import GRPO, CausalLMPolicy
from textgym.exact import TokenTree, expected_reward, frontier_reward, grpo_logit_gradient, hard_tree, kl_divergence
from textgym.exact.certification import Setup, make_setup

BETA, FIRST_BETA, HELD = 0.04, 2.0, 0.3  # β is BETA for the last 30 %
SHARE = 0.95
ROWS, TOKENS, LEARNING_RATE = 1536, 3_000_000, 2e-3


def falling_beta(progress_remaining: float) -> float:
    """From FIRST_BETA to BETA geometrically, then BETA."""
    return float(BETA * (FIRST_BETA / BETA) ** max(0.0, (progress_remaining - HELD) / (1 - HELD)))


def train(setup: Setup) -> GRPO:
    policy = CausalLMPolicy(setup.model, setup.tokenizer, device="cpu")
    agent = GRPO(
        policy,
        setup.envs,
        lambda progress_remaining: LEARNING_RATE * progress_remaining,
        beta=falling_beta,
        reference=CausalLMPolicy(setup.reference, setup.tokenizer, device="cpu").reference(),
        num_generations=8,
        batch_size=ROWS // 2,
        max_grad_norm=None,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.0, betas=(0.8, 0.95), eps=1e-5),
        seed=setup.seed,
    )
    return agent.learn(TOKENS)


def run(seed: int) -> dict[str, Any]:
    """Trains and judges one seed."""
    tree = hard_tree(seed)
    setup = replace(make_setup(tree, seed=seed, num_envs=ROWS), beta=BETA)
    begin = time.perf_counter()
    agent = train(setup)
    seconds = time.perf_counter() - begin
    numbers = share_of_frontier(tree, agent.policy, setup.reference_policy())
    queries = setup.reward.num_queries
    return {"seed": seed, **numbers, "queries": queries, "seconds": seconds, "ok": numbers["share"] >= SHARE}


class SampledGroups:
    """E[A | y] of GRPO as `textgym.exact.GroupAdvantages` has it, from sampled groups: those of 8 are too many to be written down."""

    def __init__(self, tree: TokenTree, num_generations: int, seed: int) -> None:
        self.tree, self.num_generations, self.num_groups = tree, num_generations, 2_000
        self.rng = np.random.default_rng(seed)

    def __call__(self, log_probs: np.ndarray) -> np.ndarray:
        """Returns π(y|x) E[A | y], (N, C)."""
        weighted = []
        for own, rewards in zip(log_probs, self.tree.rewards, strict=True):
            probabilities = np.exp(own) / np.exp(own).sum()
            members = self.rng.choice(len(own), size=(self.num_groups, self.num_generations), p=probabilities)
            groups = rewards[members]
            advantages = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
            weighted.append(np.bincount(members.ravel(), weights=advantages.ravel() / advantages.size, minlength=len(own)))
        return np.stack(weighted)


def fixed_point_share(seed: int, num_generations: int, iterations: int = 120) -> float:
    """The share of the frontier's gain at which GRPO's expected update comes to rest; steps as in `textgym.exact.grpo_fixed_point`."""
    tree = hard_tree(seed)
    reference = make_setup(tree, seed=seed, num_envs=1).reference_policy()
    advantages: Any = SampledGroups(tree, num_generations, seed)
    policy = tree.tabular(tree.log_probs(reference))
    states, actions = tree.state_of[tree.mask], tree.completions[tree.mask]
    for iteration in range(iterations):
        left = 1 - iteration / iterations
        advantages.num_groups = 2_000 if left > 0.4 else 20_000
        gradient = grpo_logit_gradient(advantages, policy, reference, BETA)
        reached = np.zeros_like(policy)
        on_the_way = np.where(tree.mask, np.exp(tree.log_probs(policy))[..., None], 0.0)
        for prompt in range(tree.num_prompts):
            np.add.at(reached[prompt], (states, actions), on_the_way[prompt][tree.mask])
        step = gradient * tree.num_prompts / np.maximum(reached, 1e-12)
        policy = policy + np.clip(min(0.5, 0.5 * left / 0.7) * step, -1.0, 1.0)
        policy = policy - np.logaddexp.reduce(policy, axis=-1, keepdims=True)
    return share_of_frontier(tree, policy, reference)["share"]


def share_of_frontier(tree: TokenTree, policy: Any, reference: Any) -> dict[str, float]:
    """What a policy gains over the reference, beside the most that can be gained at its KL."""
    start = expected_reward(tree, reference).mean()
    gain = float(expected_reward(tree, policy).mean() - start)
    kl = float(kl_divergence(tree, policy, reference).mean())
    possible = float(frontier_reward(tree, reference, kl) - start)
    return {"gain": gain, "possible": possible, "share": gain / possible, "kl": kl}


def print_runs(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints a row per run as it comes in."""
    found = []
    for result in results:
        found.append(result)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in result.items() if name not in ("seed", "ok"))
        print(f"grpo-frontier  seed {result['seed']}  {numbers}  {'ok' if result['ok'] else 'NOT OK'}", flush=True)
    return found


def main() -> int:
    parser = common.parser("Certify that GRPO comes near the frontier of reward and KL.")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)), help="which; default: 0 1 2 3 4")
    parser.add_argument("--fixed-points", action="store_true", help="train nothing; the shares of the fixed points")
    parser.add_argument("--generations", type=int, default=8, help="completions per group of --fixed-points; default: 8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fixed_points:
        for seed in options.seeds:
            print(f"seed {seed}  groups of {options.generations}  share {fixed_point_share(seed, options.generations):.4f}", flush=True)
        return 0
    results = print_runs(map(run, options.seeds))
    passed = all(result["ok"] for result in results)
    print("certified" if passed else "NOT CERTIFIED")
    common.write(options.out, {"torch": torch.__version__, "runs": results, "certified": passed})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
