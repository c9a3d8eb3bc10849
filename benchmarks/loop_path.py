"""What a wrapper of the user's own costs: a PPO iteration that steps the environment token by token, beside the one-pass iteration.

    python benchmarks/loop_path.py [--device cpu] [--threads 2] [--repeats 7] [--iterations 3] [--only NAME ...] [--out result.json]

Bundled wrappers take whole completions in one pass. A `VectorWrapper` that says nothing about whole sequences is stepped, so that it is
honoured, after the completions were sampled and scored in one pass. The wrapper here changes every reward a little and passes on the rest.
It stands where a user puts it, below the KL shaping that the agent adds ("below"), or around a KL shaping of the user's own ("above"):
there the log-probs of sampling are not handed on, since that wrapper might change the actions, and the policy scores once more.

Three cases: the task of `training_speed.py` (64 completions of 32 tokens, 1.1 million parameters); the same with 256 completions; and the
bundled model and prompts, tiny, 64 completions of at most 24 tokens that end early. A cheap reward everywhere, which remembers nothing (the
bundled rule knows texts again, and what is measured second would find them known). PPO with a value head, one epoch.

It prints the median milliseconds of an iteration and the ratios to the one-pass path (should be at most 1.2 on the CPU, 1.3 on a GPU).
"""

import argparse
from functools import partial
from typing import Any

import common
import gymnasium as gym
import speed_task
import torch
import transformers
from gymnasium.vector import VectorEnv, VectorWrapper

from textgym.agents import PPO, CausalLMPolicy
from textgym.bundled import bundled_model_path
from textgym.wrappers.vector import KLShaping

NEW_TOKENS, BUNDLED_NEW_TOKENS, BETA, LEARNING_RATE = 32, 24, 0.05, 1e-5
CASES = {"1.1 M, 64 rows": 64, "1.1 M, 256 rows": 256, "bundled, 64 rows": 64}
PATHS = ("one pass", "wrapper below", "wrapper above")
NEVER = 10**9  # iterations between two rows of a log
AT_MOST = {"cpu": 1.2, "gpu": 1.3}


class LittleMore(VectorWrapper[Any, Any, Any, Any, Any]):
    """A user's wrapper: a hundredth more for every step."""

    def step(self, actions: Any) -> Any:
        """Steps, and adds to the rewards."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        return observations, rewards + 0.01, terminated, truncated, infos


def make_task(case: str, device: torch.device, rows: int) -> tuple[CausalLMPolicy, VectorEnv[Any, Any, Any]]:
    """Returns policy and environment of a case."""
    if case.startswith("bundled"):
        policy = CausalLMPolicy.from_pretrained(bundled_model_path(), device=device)
        envs = gym.make_vec("textgym:TextGen-v0", num_envs=rows, reward=speed_task.reward, max_new_tokens=BUNDLED_NEW_TOKENS)
        return policy, envs
    policy = CausalLMPolicy(speed_task.make_model(), speed_task.make_tokenizer(), device=device)
    return policy, speed_task.make_envs(rows, NEW_TOKENS)


def make_agent(case: str, path: str, device: torch.device, rows: int) -> PPO:
    """Returns the agent of a case, with the wrapper where `path` says."""
    policy, envs = make_task(case, device, rows)
    reference = policy.reference()
    if path == "wrapper below":
        envs = LittleMore(envs)
    elif path == "wrapper above":
        envs = LittleMore(KLShaping(envs, policy, reference, beta=BETA))
    return PPO(policy, envs, LEARNING_RATE, beta=BETA, reference=reference, n_epochs=1, seed=0)


def milliseconds(agent: PPO, tokens: int) -> float:
    """Trains on so many tokens and returns the median milliseconds of an iteration."""
    clock = speed_task.IterationClock(agent.policy.device)
    agent.learn(tokens, callback=clock, log_interval=NEVER, reset_num_timesteps=False)
    return 1000.0 * clock.seconds(warm_up=0)


def measure(case: str, options: argparse.Namespace) -> dict[str, float]:
    """Returns the median milliseconds of an iteration on each path, and their ratios to the one-pass path."""
    rows = options.rows or CASES[case]
    new_tokens = BUNDLED_NEW_TOKENS if case.startswith("bundled") else NEW_TOKENS
    agents = {path: make_agent(case, path, torch.device(options.device), rows) for path in PATHS}
    runs = {path: partial(milliseconds, agent, options.iterations * rows * new_tokens) for path, agent in agents.items()}
    found = common.alternate(runs, options.repeats)
    return found | {f"{path} / one pass": found[path] / found["one pass"] for path in PATHS[1:]}


def parser() -> argparse.ArgumentParser:
    result = common.parser(__doc__, device="cpu", repeats=7)
    result.add_argument("--iterations", type=int, default=3, help="iterations of a round at least, whose median counts; default: 3")
    result.add_argument("--threads", type=int, default=None, help="torch's threads")
    result.add_argument("--only", nargs="+", default=list(CASES), metavar="NAME", choices=list(CASES), help="measure these cases only")
    result.add_argument("--rows", type=int, default=None, help="completions of an iteration; default: as the case says")
    return result


def main() -> None:
    """Measures, prints the table and writes the JSON file."""
    options = parser().parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    at_most = AT_MOST["cpu" if options.device == "cpu" else "gpu"]
    results = {}
    for case in options.only:
        results[case] = measure(case, options)
        print(case)
        for name, value in results[case].items():
            print(f"    {name:<28}{value:10,.3f}   (at most {at_most})" if "/" in name else f"    {name:<28}{value:10,.1f} ms")
    document = {"setting": common.setting(options.device), "at most": at_most, "ms an iteration": results}
    common.write(options.out, document)


if __name__ == "__main__":
    main()
