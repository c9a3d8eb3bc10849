"""Certifies DQN on the hard tree of five seeds: soft against π* and β log Z, hard against the best completions.

    python benchmarks/certify_dqn.py [--seeds 0 1 2 3 4] [--kinds soft hard] [--out result.json]

`certify.py` runs it too, as the agents "dqn-soft" and "dqn-hard".

One setting each for all seeds, learning rates that fall to 0. Soft passes within 0.02 total variation of π* in every prompt, with V(s_0)
within 0.005 of β log Z (two decimals). Hard passes where the greedy completion of every prompt is its best one. The exit status says
whether all do.
"""

import sys
import time
from collections.abc import Iterable
from typing import Any

import common
import numpy as np
import torch
from stable_baselines3.common.utils import LinearSchedule

from textgym.agents import DQN, CausalLMPolicy
from textgym.agents.common.q_values import score_states, states_of
from textgym.exact import hard_solution, hard_tree, soft_solution, total_variation
from textgym.exact.certification import Setup, make_setup

KINDS = ("soft", "hard")
MOST_VARIATION, MOST_VALUE_ERROR = 0.02, 0.005
ROWS = {"soft": 384, "hard": 192}
TOKENS = {"soft": 300_000, "hard": 80_000}
SETTINGS: dict[str, dict[str, Any]] = {
    "soft": {
        "learning_rate": LinearSchedule(2e-3, 0.0, 1.0),
        "critic": "separate",
        "batch_size": 512,
        "learning_starts": 20_000,
    },
    "hard": {
        "learning_rate": LinearSchedule(3e-3, 0.0, 1.0),
        "batch_size": 256,
        "target_update_interval": 25,
        "exploration_fraction": 0.5,
        "exploration_final_eps": 0.2,
    },
}


def train(kind: str, seed: int) -> tuple[Setup, DQN, float]:
    setup = make_setup(hard_tree(seed), seed=seed, num_envs=ROWS[kind])
    policy = CausalLMPolicy(setup.model, setup.tokenizer, device="cpu")
    reference = CausalLMPolicy(setup.reference, setup.tokenizer, device="cpu").reference()
    shared: dict[str, Any] = {"gradient_steps": 16, "buffer_size": 150_000, "max_grad_norm": None, "seed": seed, "reference": reference}
    agent = DQN(policy, setup.envs, beta=setup.beta if kind == "soft" else 0.0, **shared, **SETTINGS[kind])
    begin = time.perf_counter()
    agent.learn(TOKENS[kind])
    return setup, agent, time.perf_counter() - begin


def root_values(setup: Setup, agent: DQN) -> np.ndarray:
    """V(s_0) of each prompt."""
    prompts = setup.tree.num_prompts
    rollout = agent.collector.walk(np.arange(setup.envs.num_envs) % prompts, agent.sampling_generator)
    assert agent.critic is not None
    with torch.no_grad():
        return score_states(agent.policy, agent.critic, states_of(rollout, None, end_states=False)).values[:prompts, 0].numpy()


def soft(seed: int) -> dict[str, Any]:
    setup, agent, seconds = train("soft", seed)
    solution = soft_solution(setup.tree, setup.reference_policy(), setup.beta)
    distance = total_variation(setup.tree, agent.policy, solution.policy)
    queries = setup.reward.num_queries
    error = np.abs(root_values(setup, agent) - setup.beta * solution.log_z)
    passed = bool(distance.max() <= MOST_VARIATION and error.max() < MOST_VALUE_ERROR)
    return {
        "total_variation": float(distance.max()),
        "value_error": float(error.max()),
        "queries": queries,
        "seconds": seconds,
        "ok": passed,
    }


def hard(seed: int) -> dict[str, Any]:
    setup, agent, seconds = train("hard", seed)
    tree = setup.tree
    greedy = agent.policy.generate(tree.prompt_texts, tree.horizon, temperature=0).completion_ids
    index = {tree.ids(j): j for j in range(tree.num_completions)}
    reached = np.array([tree.rewards[i, index[tuple(ids)]] for i, ids in enumerate(greedy)])
    shortfall = hard_solution(tree).state_values[:, 0] - reached
    return {"shortfall": float(shortfall.max()), "queries": setup.reward.num_queries, "seconds": seconds, "ok": bool(shortfall.max() <= 0)}


def run(kind_and_seed: tuple[str, int]) -> dict[str, Any]:
    """Trains and judges one kind with one seed."""
    kind, seed = kind_and_seed
    return {"kind": kind, "seed": seed, **{"soft": soft, "hard": hard}[kind](seed)}


def print_runs(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints a row per run as it comes in."""
    found = []
    for result in results:
        found.append(result)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in result.items() if name not in ("kind", "seed", "ok"))
        print(f"dqn-{result['kind']}  seed {result['seed']}  {numbers}  {'ok' if result['ok'] else 'NOT OK'}", flush=True)
    return found


def main() -> int:
    parser = common.parser("Certify DQN, soft and hard, against exactly solved token MDPs.")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)), help="which; default: 0 1 2 3 4")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS), help="default: both")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = print_runs(map(run, [(kind, seed) for kind in options.kinds for seed in options.seeds]))
    passed = all(result["ok"] for result in results)
    print("certified" if passed else "NOT CERTIFIED")
    common.write(options.out, {"torch": torch.__version__, "runs": results, "certified": passed})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
