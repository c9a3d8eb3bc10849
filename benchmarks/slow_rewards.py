"""What a slow reward costs: PPO iterations of several walks whose reward waits for somebody else, as a plain function and as an async one.

    python benchmarks/slow_rewards.py [--device auto] [--threads 2] [--repeats 5] [--iterations 2] [--out result.json]

The task of `training_speed.py` (64 environments, 16 + 32 tokens, 1.1 million parameters); a rollout is four walks, 256 completions. The
reward sleeps once per call, for half as long as sampling a walk takes, as long, or twice as long, all measured first. An async function is
waited for while the next walk is sampled and while the reference scores, a plain one at once.

It prints the median milliseconds of an iteration without waiting, with the plain function and with the async one, and which part of the
waiting the async function hides. The update needs the last walk's reward, so at most about 3/4 can be hidden.
"""

import argparse
import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import speed_task
import torch
import transformers
from loop_path import milliseconds
from stable_baselines3.common.utils import get_device

from textgym.agents import PPO, CausalLMPolicy

ROWS, WALKS, NEW_TOKENS = 64, 4, 32
SHARES = (0.5, 1.0, 2.0)


def plain(seconds: float) -> Callable[..., Any]:
    """Returns a reward function that takes so long."""

    def waits(**arguments: Any) -> list[float]:
        time.sleep(seconds)
        return speed_task.reward(**arguments)

    return waits


def awaited(seconds: float) -> Callable[..., Any]:
    """Returns the same as an async function."""

    async def waits(**arguments: Any) -> list[float]:
        await asyncio.sleep(seconds)
        return speed_task.reward(**arguments)

    return waits


def make_agent(reward: Callable[..., Any], device: torch.device) -> PPO:
    """Returns PPO on the task with this reward."""
    policy = CausalLMPolicy(speed_task.make_model(), speed_task.make_tokenizer(), device=device)
    envs = speed_task.make_envs(ROWS, NEW_TOKENS, reward)
    return PPO(policy, envs, 1e-5, beta=0.05, reference=policy.reference(), rollout_size=WALKS * ROWS, n_epochs=1, seed=0)


def sampling_seconds(agent: PPO) -> float:
    """Returns the median time of sampling one walk."""
    prompts = agent.policy.encode_prompts(speed_task.make_texts(ROWS, speed_task.PROMPT_TOKENS))

    def walks() -> None:
        agent.policy.generate_ids(*prompts, NEW_TOKENS)

    rates = common.alternate({"walks": common.per_second(walks, agent.policy.device)}, 5)
    return 1.0 / rates["walks"]


def measure(share: float, seconds: float, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Returns milliseconds of an iteration, and which part of the waiting is hidden."""
    waiting = share * seconds
    agents = {
        "no waiting": make_agent(speed_task.reward, device),
        "plain": make_agent(plain(waiting), device),
        "async": make_agent(awaited(waiting), device),
    }
    tokens = options.iterations * WALKS * ROWS * NEW_TOKENS
    found = common.alternate({name: partial(milliseconds, agent, tokens) for name, agent in agents.items()}, options.repeats)
    return found | {"waiting": 1000 * WALKS * waiting, "hidden": (found["plain"] - found["async"]) / (found["plain"] - found["no waiting"])}


def main() -> None:
    """Measures, prints the table and writes the JSON file."""
    parser = common.parser(__doc__, device="auto", repeats=5)
    parser.add_argument("--iterations", type=int, default=2, help="iterations of a round; default: 2")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = get_device(options.device)
    seconds = sampling_seconds(make_agent(speed_task.reward, device))
    print(f"sampling a walk of {ROWS} completions: {1000 * seconds:.0f} ms")
    results = {}
    for share in SHARES:
        results[str(share)] = found = measure(share, seconds, options, device)
        print(f"the reward takes {share:g} of that, {found['waiting']:.0f} ms an iteration")
        for name in ("no waiting", "plain", "async"):
            print(f"    {name:<28}{found[name]:10,.0f} ms an iteration")
        print(f"    {'hidden':<28}{found['hidden']:10.2f} of the waiting")
    common.write(options.out, {"setting": common.setting(device), "ms of sampling a walk": 1000 * seconds, "ms an iteration": results})


if __name__ == "__main__":
    main()
