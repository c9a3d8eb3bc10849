"""Certifies the bundled agents in full (docs/exact.md), and prints the tables.

    python benchmarks/certify.py [--agents NAME ...] [--seeds 5] [--rollouts 400] [--jobs 2] [--out result.json]

Part (a): each agent is trained on the hard tree of five seeds, with one setting for all of them and a learning rate that falls
to 0; the worst total variation to π* must stay within 0.02 (DPO from a million sampled labels: 0.05). Part (b), for every baseline:
the mean of 400 sampled first-step gradients at a policy far from π* must be the exact policy gradient within its standard error, and
the expected gradient, with nothing sampled, to four digits. The exit status says whether all of it holds.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import certify_dqn
import certify_frontier
import common
import numpy as np
import torch

from textgym.agents import DPO, GRPO, NLPO, PPO, REBEL, REINFORCE, RLOO, CausalLMPolicy
from textgym.exact import GroupAdvantages, TokenTree, grpo_fixed_point, hard_tree
from textgym.exact.certification import (
    FixedPoint,
    Setup,
    certify_fixed_point,
    compare_gradients,
    exact_setup_gradient,
    expected_gradient,
    make_setup,
    sampled_gradients,
)
from textgym.types import BoolArray

BOUND = 0.02  # of the worst total variation
MASK_TOP_P = 0.8  # of NLPO
SAMPLED_LABELS_BOUND = 0.05  # the same where a million labels were drawn
DEVIATIONS = 4.0  # of a sampled gradient, in standard errors
PRECISION = 1e-4  # of an expected gradient, relative: float32


def quick_adam(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """Adam that forgets soon: a rare completion's one large gradient does not slow its parameters down for a thousand steps."""
    return torch.optim.Adam(parameters, lr=0.0, betas=(0.8, 0.95), eps=1e-5)


@dataclass(frozen=True)
class Candidate:
    """An agent with the setting it is certified at.

    Attributes:
        agent_class: makes the agent, see `make_agent`.
        options: what makes it this variant.
        training: further options, for the sake of training.
        learning_rate: at the start.
        exponent: the learning rate falls to 0 with this power of the progress remaining.
        num_envs: completions per rollout.
        tokens: to train for.
        kept: the part of the vocabulary that policy and reference are renormalised over, see `certify_fixed_point`; None for all of it.
        bound: of the worst total variation.
        target: its fixed point, where that is not π*.
    """

    agent_class: Callable[..., Any]
    options: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-3
    exponent: float = 1.0
    num_envs: int = 768
    tokens: int = 2_500_000
    kept: Callable[[Any, Setup], BoolArray] | None = None
    bound: float = BOUND
    target: Callable[[Setup], Any] | None = None

    def schedule(self, left: float) -> float:
        """Returns the learning rate when the share `left` of the tokens is still to come."""
        return self.learning_rate * left**self.exponent


def top_p_sets(agent: Any, setup: Setup) -> BoolArray:
    """What NLPO's first mask is, (N, S, V), without its code: the reference's tokens up to a mass of `MASK_TOP_P`, and EOS."""
    del agent
    table = setup.reference_policy()
    order = np.argsort(-table, axis=-1)
    ordered = np.take_along_axis(np.exp(table), order, axis=-1)
    kept = np.zeros(table.shape, dtype=np.bool_)
    np.put_along_axis(kept, order, np.cumsum(ordered, axis=-1) - ordered < MASK_TOP_P, axis=-1)
    kept[..., setup.tree.eos_token_id] = True
    return kept


def every_pair(tree: TokenTree, reference: Any, seed: int) -> list[dict[str, Any]]:
    """Returns every pair of completions of each prompt once, with its Bradley–Terry probability under the tree's rewards."""
    labels = 1 / (1 + np.exp(tree.rewards[:, None, :] - tree.rewards[:, :, None]))
    return pair_rows(tree, np.ones_like(labels), labels)


def sampled_pairs(tree: TokenTree, reference: Any, seed: int, count: int = 1_000_000) -> list[dict[str, Any]]:
    """Draws pairs and their labels, and adds equal pairs up to one with a weight and the share of its labels.

    Each side is a completion of the reference or, as often, a uniform one. What reference completions alone say is not enough for 0.05:
    π* has mass where the reference hardly goes, and the maximum-likelihood rewards themselves are then up to 0.08 away.
    """
    generator = np.random.default_rng(seed)
    wins = np.zeros((tree.num_prompts, tree.num_completions, tree.num_completions))
    prompts = generator.integers(tree.num_prompts, size=count)
    writers = 0.5 * np.exp(tree.log_probs(reference)) + 0.5 / tree.num_completions
    for prompt, writer in enumerate(writers / writers.sum(axis=1, keepdims=True)):
        size = int((prompts == prompt).sum())
        first, second = (generator.choice(tree.num_completions, size, p=writer) for _ in range(2))
        better = generator.random(size) < 1 / (1 + np.exp(tree.rewards[prompt, second] - tree.rewards[prompt, first]))
        np.add.at(wins[prompt], (np.where(better, first, second), np.where(better, second, first)), 1)
    counts = wins + wins.swapaxes(1, 2)
    return pair_rows(tree, counts, wins / np.maximum(counts, 1))


def pair_rows(tree: TokenTree, weights: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """Returns the pairs of a tree as rows of DPO; weights and P(first ≻ second) are (N, C, C)."""
    return [
        {
            "prompt_ids": list(ids),
            "chosen_ids": list(tree.ids(first)),
            "rejected_ids": list(tree.ids(second)),
            "preference": float(labels[prompt, first, second]),
            "weight": float(weights[prompt, first, second]),
        }
        for prompt, ids in enumerate(tree.prompts)
        for first in range(tree.num_completions)
        for second in range(first + 1, tree.num_completions)
    ]


def dpo(policy: CausalLMPolicy, envs: Any, *, pairs: Callable[..., Any], reference: CausalLMPolicy, seed: int, **options: Any) -> DPO:
    """Makes a DPO agent whose every step sees all pairs of `hard_tree(seed)`; the environment is not used."""
    rows = pairs(hard_tree(seed), reference, seed)
    return DPO(policy, rows, batch_size=len(rows), reference=reference, seed=seed, **options)


DPO_TOKENS = 1500 * 62_748  # steps, and tokens of all pairs: each of the 255 completions stands in 84
DPO_TRAINING: dict[str, Any] = {"learning_rate": 1e-2, "exponent": 2.0, "num_envs": 1, "tokens": DPO_TOKENS}


GRPO_GROUP = 3  # all groups of three of 85 completions can be written down in a second


def grpo_target(setup: Setup) -> Any:
    """Returns where GRPO's expected step vanishes; "dapo" in large batches, whose tokens are nearly a constant."""
    return grpo_fixed_point(GroupAdvantages(setup.tree, GRPO_GROUP), setup.reference_policy(), setup.beta)


CANDIDATES = {
    # The critic learns faster than the policy: while it is wrong, its noise drives the policy onto plateaus.
    "ppo": Candidate(
        PPO,
        {"critic": "separate"},
        {
            "n_epochs": 2,
            "batch_size": 384,
            "gae_lambda": 0.95,
            "optimizer": quick_adam,
            "critic_learning_rate": lambda left: 5e-3 * left,
        },
        learning_rate=1.5e-3,
        num_envs=1536,
        tokens=3_000_000,
    ),
    # At π* the whole return r − β log π/π_ref is one number for all completions of a prompt: the noise of its advantages dies out on the
    # way there. That of the rewards-to-go does not, their mean over a prompt's completions being no function of the state.
    "reinforce-leave-one-out": Candidate(
        REINFORCE, {"baseline": "leave_one_out", "num_generations": 8, "reward_to_go": False}, {"optimizer": quick_adam}
    ),
    "reinforce-value": Candidate(
        REINFORCE,
        {"baseline": "value", "critic": "separate"},
        {"optimizer": quick_adam, "critic_learning_rate": lambda left: 5e-3 * left},
        learning_rate=1.5e-3,
        tokens=3_000_000,
    ),
    # To the optimum inside the mask, which lies up to 0.8 from that over the whole vocabulary. It stays what it is: the top-p sets of the
    # reference, which the policy starts from.
    "nlpo": Candidate(
        NLPO,
        {"critic": "separate", "top_p": MASK_TOP_P, "min_tokens_to_keep": 1, "mask_refresh_interval": None},
        {"optimizer": quick_adam, "n_epochs": 2, "batch_size": 192, "gae_lambda": 0.95},
        tokens=400_000,
        kept=top_p_sets,
    ),
    "dpo-exact-labels": Candidate(dpo, {"pairs": every_pair}, **DPO_TRAINING),
    "dpo-sampled-labels": Candidate(dpo, {"pairs": sampled_pairs}, bound=SAMPLED_LABELS_BOUND, **DPO_TRAINING),
    "rloo-2": Candidate(RLOO, {"num_generations": 2}, {"batch_size": 512, "optimizer": quick_adam}, num_envs=1536, tokens=3_000_000),
    "rloo-4": Candidate(RLOO, {"num_generations": 4}, {"optimizer": quick_adam}, num_envs=1536, tokens=4_000_000),
    "rebel": Candidate(
        REBEL, {"num_generations": 2}, {"n_epochs": 2, "batch_size": 768, "optimizer": quick_adam}, num_envs=1536, tokens=3_000_000
    ),
    # Its advantages do not die out at the fixed point: the learning rate has to.
    "grpo": Candidate(
        GRPO,
        {"num_generations": GRPO_GROUP},
        {"batch_size": 384, "optimizer": quick_adam},
        exponent=2.0,
        num_envs=1536,
        tokens=5_000_000,
        target=grpo_target,
    ),
}

FRONTIER = "grpo-frontier"
AGENTS = [*CANDIDATES, *(f"dqn-{kind}" for kind in certify_dqn.KINDS), FRONTIER]

# Part (b): every baseline, and PPO as it is before its second step. (class, options, completions per rollout of the expected gradient)
GRADIENTS: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {
    "ppo": (PPO, {"n_epochs": 1, "gae_lambda": 1.0}, 1),
    "ppo, separate critic": (PPO, {"n_epochs": 1, "gae_lambda": 1.0, "critic": "separate"}, 1),
    "reinforce, none": (REINFORCE, {"baseline": "none"}, 1),
    "reinforce, none, whole return": (REINFORCE, {"baseline": "none", "reward_to_go": False}, 1),
    "reinforce, batch mean": (REINFORCE, {"baseline": "batch_mean", "num_generations": 2}, 2),
    "reinforce, moving average": (REINFORCE, {"baseline": "moving_average"}, 1),
    "reinforce, value": (REINFORCE, {"baseline": "value"}, 1),
    "reinforce, leave-one-out": (REINFORCE, {"baseline": "leave_one_out", "num_generations": 2}, 2),
    "reinforce, leave-one-out, whole return": (REINFORCE, {"baseline": "leave_one_out", "num_generations": 2, "reward_to_go": False}, 2),
    "rloo, k = 2": (RLOO, {"num_generations": 2}, 2),
    "rloo, k = 3": (RLOO, {"num_generations": 3}, 3),
}


def make_agent(setup: Setup, agent_class: Callable[..., Any], **options: Any) -> Any:
    """Makes an agent as certification wants it: with the setup's reference, and the gradient's norm unclipped."""
    device = setup.model.device
    policy = CausalLMPolicy(setup.model, setup.tokenizer, device=device)
    reference = CausalLMPolicy(setup.reference, setup.tokenizer, device=device).reference()
    return agent_class(policy, setup.envs, beta=setup.beta, reference=reference, seed=setup.seed, max_grad_norm=None, **options)


def train(run: tuple[str, int], tokens: int | None, device: str) -> FixedPoint:
    """Part (a) for one agent and seed."""
    name, seed = run
    candidate = CANDIDATES[name]

    def make(setup: Setup) -> Any:
        options = candidate.options | candidate.training
        return make_agent(setup, candidate.agent_class, learning_rate=candidate.schedule, **options)

    return certify_fixed_point(
        make,
        seed=seed,
        num_envs=candidate.num_envs,
        total_timesteps=tokens or candidate.tokens,
        kept=candidate.kept,
        target=candidate.target,
        device=device,
    )


def with_random_critic(setup: Setup, agent_class: Callable[..., Any], **options: Any) -> Any:
    """As `make_agent`; the critic's values are far from 0 and from right: the gradient must not depend on them."""
    agent = make_agent(setup, agent_class, learning_rate=1e-3, **options)
    torch.manual_seed(0)
    for parameter in agent.critic.parameters() if agent.critic is not None else ():
        torch.nn.init.normal_(parameter, std=0.3)
    return agent


def enumerable_tree() -> TokenTree:
    """Returns a tree with four completions of one to three tokens for each of two prompts: groups of them can be enumerated."""
    return TokenTree(2, 3, 1, [[0], [0, 0]], lambda i, y: float(np.sin(3 * len(y) + 2 * sum(y) + i)) + 3 * i)


def gradient(name: str, rollouts: int, device: str) -> dict[str, float]:
    """Part (b) for one agent: the relative error of its expected gradient, and how its sampled ones compare."""
    agent_class, options, group = GRADIENTS[name]
    make = partial(with_random_critic, agent_class=agent_class, **options)
    tiny = make_setup(enumerable_tree(), seed=0, num_envs=group, displaced=True, device=device)
    exact = exact_setup_gradient(tiny)
    found = expected_gradient(make, tiny, group=group, before_rollout=preset_average)
    setup = make_setup(hard_tree(0), seed=0, num_envs=192, displaced=True, device=device)
    comparison = compare_gradients(sampled_gradients(make, setup, rollouts), exact_setup_gradient(setup))
    slope, residual = comparison.deviations()
    return {
        "expected_error": float((found - exact).norm() / exact.norm()),
        **comparison._asdict(),
        "slope_deviation": slope,
        "residual_deviation": residual,
    }


def preset_average(agent: Any) -> None:
    """Keeps a moving average where it is: it may depend on the past, but not on which completion is enumerated next."""
    agent.load_extra_state({"average_return": 1.5})


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    runs = [(name, seed) for name in options.agents for seed in range(options.seeds) if name in CANDIDATES]
    dqn_runs = [(kind, seed) for kind in certify_dqn.KINDS for seed in range(options.seeds) if f"dqn-{kind}" in options.agents]
    names = list(GRADIENTS) if options.rollouts else []
    with common.each_in(options.jobs) as parallel:
        trained = print_fixed_points(runs, parallel(partial(train, tokens=options.tokens, device=options.device), runs))
        of_dqn = certify_dqn.print_runs(parallel(certify_dqn.run, dqn_runs))
        frontier_seeds = range(options.seeds) if FRONTIER in options.agents else []
        of_frontier = certify_frontier.print_runs(parallel(certify_frontier.run, frontier_seeds))
        gradients = print_gradients(names, parallel(partial(gradient, rollouts=options.rollouts, device=options.device), names))
    passed = (
        all(point.worst <= CANDIDATES[name].bound for name, point in trained)
        and all(result["ok"] for result in [*of_dqn, *of_frontier])
        and all(gradient_passes(values) for values in gradients.values())
    )
    print(
        f"\n{'certified' if passed else 'NOT CERTIFIED'}: total variation within its bound, gradients within {DEVIATIONS} standard errors"
    )
    common.write(
        options.out,
        {
            "machine": common.machine(options.jobs, options.device),
            "fixed_points": [{"agent": name, "worst": point.worst, **point._asdict()} for name, point in trained],
            "dqn": of_dqn,
            "frontier": of_frontier,
            "gradients": gradients,
            "certified": passed,
        },
    )
    return 0 if passed else 1


def print_fixed_points(runs: list[tuple[str, int]], points: Iterable[FixedPoint]) -> list[tuple[str, FixedPoint]]:
    """Prints a row per run as it comes in, then the worst of each agent."""
    if runs:
        print("agent                     seed  TV start  TV worst        J     J*     KL    KL*   queries  seconds")
    found = []
    for (name, seed), point in zip(runs, points, strict=True):
        found.append((name, point))
        print(
            f"{name:25} {seed:4d}  {min(point.start):8.3f}  {point.worst:8.4f}  {point.objective:7.4f}  {point.optimum:5.3f}  "
            f"{point.kl:5.3f}  {point.optimal_kl:5.3f}  {point.reward_queries:8,}  {point.seconds:7.0f}",
            flush=True,
        )
    for name in dict.fromkeys(name for name, _ in runs):
        print(f"{name:25} worst of {sum(n == name for n, _ in runs)} seeds: {max(p.worst for n, p in found if n == name):.4f}")
    return found


def gradient_passes(values: dict[str, float]) -> bool:
    """Whether a gradient is the exact one as far as can be seen."""
    within = max(abs(values["slope_deviation"]), abs(values["residual_deviation"])) < DEVIATIONS
    return within and values["expected_error"] < PRECISION


def print_gradients(names: list[str], results: Iterable[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Prints a row per agent as it comes in."""
    if names:
        print("\nfirst-step gradient                      expected: error   sampled: slope ± error   residual ± error   error of the mean")
    found = {}
    for name, values in zip(names, results, strict=True):
        found[name] = values
        print(
            f"{name:40} {values['expected_error']:15.1e}   {values['slope']:14.4f} ± {values['slope_error']:.4f}"
            f"   {values['residual']:9.2f} ± {values['residual_error']:.2f}   {values['norm_error']:16.1%}",
            flush=True,
        )
    return found


def parser() -> argparse.ArgumentParser:
    result = common.parser("Certify the bundled on-policy agents against exactly solved token MDPs.", jobs=1, device="cpu")
    result.add_argument("--agents", nargs="*", choices=AGENTS, default=AGENTS, help="agents of part (a); default: all")
    result.add_argument("--seeds", type=int, default=5, help="seeds of part (a); default: 5")
    result.add_argument("--tokens", type=int, default=None, help="tokens of each run of part (a); default: what the agent needs")
    result.add_argument("--rollouts", type=int, default=400, help="sampled gradients of part (b), 0 leaves it out; default: 400")
    return result


if __name__ == "__main__":
    sys.exit(main())
