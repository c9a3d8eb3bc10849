"""Where each millisecond of one PPO iteration goes, beside the floor of each part counted from bytes and operations.

    python benchmarks/profile_iteration.py [--device auto] [--repeats 7] [--out result.json]

A GPT-2-type model of random weights (V = 2,048, width 128, 4 layers: 1.1 M parameters), 64 completions of 32 tokens of 16 prompts of 16
tokens (4 of each), KL shaping, critic head, one epoch in one step, a plain Python reward, the log written to CSV and TensorBoard as
`textgym train` writes it.

Functions and methods of the package are wrapped from outside while some iterations run, each span's time without that of the spans inside
it; on an accelerator it waits for the device at both ends of a span. Iterations without the wrappers take turns with the wrapped ones;
their time stands below the table. A floor is the matrix products at the rate of this machine's large products, or the bytes to read at
the rate of its copies, whichever takes longer; beside it the time that products of these very sizes take here when nothing else is done.

The exit status says whether environment, rewards, bookkeeping and logging together are under 5 % of an iteration.
"""

import argparse
import importlib
import inspect
import pkgutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import common
import gymnasium as gym
import torch
from floors import FIRST_WORD, Machine, Shape, Work
from stable_baselines3.common.logger import Logger, configure
from torch import Tensor

import textgym.agents.common
from textgym.agents import PPO, CausalLMPolicy
from textgym.agents.clipped import ClippedAgent
from textgym.agents.online import OnlineAgent
from textgym.rewards import RewardSet
from textgym.stacks import definer, layers

SHAPE = Shape(vocab_size=2048, width=128, layers=4)
ROWS, GENERATIONS, PROMPT_TOKENS, NEW_TOKENS = 64, 4, 16, 32
MOST_OVERHEAD = 0.05

PREFILL, STEPS, SAMPLING = "decode: prompts", "decode: model steps", "decode: sampling"
ENVIRONMENT, REWARDS = "environment", "rewards"
REFERENCE, OLD = "reference log-probs", "old log-probs, values, advantages"
FORWARD, BACKWARD, OPTIMISER, MINIBATCH = "update: forward, losses", "update: backward", "update: optimiser", "update: minibatches"
BOOKKEEPING, LOGGING, REST = "rollout: bookkeeping", "logging", "rest"
PARTS = (
    PREFILL, STEPS, SAMPLING, ENVIRONMENT, REWARDS, REFERENCE, OLD, FORWARD, BACKWARD, OPTIMISER, MINIBATCH, BOOKKEEPING, LOGGING, REST,
)  # fmt: skip
OVERHEAD = (ENVIRONMENT, REWARDS, BOOKKEEPING, LOGGING, REST)


class Spans:
    """Wrapped functions, and the seconds spent in them without the wrapped ones inside.

    Args:
        wait: called at both ends of a span.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._wait = wait
        self._inner: list[float] = []  # of each open span, the seconds of spans inside it
        self._undo: list[tuple[Any, str, Any]] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Counts what `owner.name` takes to `part`."""
        function = inspect.getattr_static(owner, name)
        self._undo.append((owner, name, function))
        setattr(owner, name, self._timed(function, part))

    def wrap_function(self, function: Any, part: str) -> None:
        """Counts what a function of the package takes to `part`, under every name that it was imported by."""
        for module in [module for name, module in sys.modules.items() if name.startswith("textgym")]:
            for name in [name for name, value in vars(module).items() if value is function]:
                self.wrap(module, name, part)

    def restore(self) -> None:
        """Takes all wrappers off."""
        while self._undo:
            setattr(*self._undo.pop())

    def _timed(self, function: Any, part: str) -> Any:
        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.span(part):
                return function(*arguments, **named)

        return timed

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Counts what is done in the context to `part`."""
        self._wait()
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            self._wait()
            whole = time.perf_counter() - start
            self.seconds[part] += whole - self._inner.pop()
            if self._inner:
                self._inner[-1] += whole


def wrap_all(spans: Spans, agent: PPO) -> None:
    """Puts the wrappers on."""
    spans.wrap(CausalLMPolicy, "generate_ids", SAMPLING)  # what is left of it beside the two below
    for decoder in decoders():
        spans.wrap(decoder, "__init__", PREFILL)
        spans.wrap(decoder, "step", STEPS)
    names = ("reset", "step", "step_sequence", "start_sequence")
    methods = {(definer(type(layer), name), name) for layer in layers(agent.vector_env) for name in names}
    for owner, name in sorted(methods, key=str):
        spans.wrap(owner, name, ENVIRONMENT)
    for name in ("start_terminal", "dense_step", "start_dense_sequence"):
        spans.wrap(RewardSet, name, REWARDS)
    for name in ("sequence_log_probs", "paired_sequence_log_probs", "reference_sequence_log_probs"):
        spans.wrap(definer(CausalLMPolicy, name), name, REFERENCE)
    spans.wrap(ClippedAgent, "targets", OLD)
    spans.wrap(ClippedAgent, "loss", FORWARD)
    spans.wrap(Tensor, "backward", BACKWARD)
    spans.wrap(torch.nn.utils, "clip_grad_norm_", OPTIMISER)
    spans.wrap(definer(type(agent.optimizer), "step"), "step", OPTIMISER)
    spans.wrap(OnlineAgent, "update", MINIBATCH)
    spans.wrap(OnlineAgent, "collect_rollouts", BOOKKEEPING)
    for name in ("record", "record_mean", "dump"):
        spans.wrap(Logger, name, LOGGING)
    spans.wrap_function(importlib.import_module("textgym.agents.common.rollout_logs").record_rollout, LOGGING)
    spans.wrap(definer(PPO, "dump_logs"), "dump_logs", LOGGING)


def decoders() -> list[type]:
    """The classes that make the next token's logits with a cache, one step a token."""
    found = {}
    for module in pkgutil.iter_modules(textgym.agents.common.__path__, "textgym.agents.common."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) and name.endswith("Decoder") and "step" in vars(value) and not getattr(value, "_is_protocol", False):
                found[value] = name
    if not found:
        raise SystemExit("There is no decoder to be found in textgym.agents.common: the profile of sampling needs one.")
    return list(found)


def make_agent(device: str, folder: str) -> PPO:
    """Returns the agent that is profiled."""
    policy = SHAPE.policy(PROMPT_TOKENS + NEW_TOKENS, device)
    words = SHAPE.vocab_size - FIRST_WORD
    prompts = [" ".join(f"w{FIRST_WORD + (37 * i + j) % words}" for j in range(PROMPT_TOKENS)) for i in range(100)]
    envs = gym.make_vec(
        "TextGen-v0", num_envs=ROWS, prompts=prompts, tokenizer=policy.tokenizer, reward=lengths_of_texts,
        max_prompt_tokens=PROMPT_TOKENS, max_new_tokens=NEW_TOKENS,
    )  # fmt: skip
    agent = PPO(policy, envs, 1e-5, n_epochs=1, num_generations=GENERATIONS, seed=0)
    agent.set_logger(configure(folder, ["csv", "tensorboard"]))
    return agent


def lengths_of_texts(completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward: the characters of a completion."""
    return [float(len(text)) for text in completions]


def profile(agent: PPO, repeats: int, wait: Callable[[], None]) -> tuple[dict[str, float], float, float]:
    """Median milliseconds of each part, of a whole wrapped iteration, and of one without the wrappers."""

    def iteration() -> float:
        wait()
        start = time.perf_counter()
        agent.learn(1, reset_num_timesteps=False)
        wait()
        return 1000 * (time.perf_counter() - start)

    rounds: list[dict[str, float]] = []
    wrapped, bare = [], []
    for repeat in range(repeats + 1):
        alone = iteration()
        spans = Spans(wait)
        wrap_all(spans, agent)
        try:
            with spans.span(REST):
                whole = iteration()
        finally:
            spans.restore()
        if repeat:  # the first round warms up
            bare.append(alone)
            wrapped.append(whole)
            rounds.append({part: 1000 * spans.seconds[part] for part in PARTS})
    return {part: statistics.median(found[part] for found in rounds) for part in PARTS}, statistics.median(wrapped), statistics.median(bare)


def work() -> dict[str, list[Work]]:
    """The calls that cannot be left out of each part; nothing where there are none."""
    prompts = ROWS // GENERATIONS
    prefill, *steps = SHAPE.decoding(ROWS, prompts, PROMPT_TOKENS, NEW_TOKENS)
    scoring = SHAPE.scoring(ROWS, prompts, PROMPT_TOKENS, NEW_TOKENS)
    backward = Work(2 * scoring.flops, 2 * scoring.bytes)  # of each product one for the inputs and one for the weights
    return {
        PREFILL: [prefill],
        STEPS: steps,
        REFERENCE: [scoring],
        OLD: [scoring],
        FORWARD: [scoring],
        BACKWARD: [backward],
        OPTIMISER: [SHAPE.optimiser_step()],
    }


def products(machine: Machine) -> dict[str, float]:
    """Milliseconds of the products of each part at their own sizes, the attention left out."""
    prompts = ROWS // GENERATIONS
    inputs = prompts * PROMPT_TOKENS + ROWS * (NEW_TOKENS - 1)
    forward = products_of_call(machine, inputs, ROWS * NEW_TOKENS)
    return {
        PREFILL: products_of_call(machine, prompts * PROMPT_TOKENS, prompts),
        STEPS: (NEW_TOKENS - 1) * products_of_call(machine, ROWS, ROWS),
        REFERENCE: forward,
        OLD: forward,
        FORWARD: forward,
        BACKWARD: products_of_call(machine, inputs, ROWS * NEW_TOKENS, backward=True),
    }


def products_of_call(machine: Machine, tokens: int, predicted: int, backward: bool = False) -> float:
    """Milliseconds of the products of one call of the model, or of its backward pass."""
    width = SHAPE.width
    sizes = [(tokens, width, size * width) for size in (3, 1, 4)] + [(tokens, 4 * width, width)]
    each = [(SHAPE.layers, size) for size in sizes] + [(1, (predicted, width, SHAPE.vocab_size))]
    if backward:  # of (m, k) × (k, n): (m, n) × (n, k) and (k, m) × (m, n)
        each = [(count, size) for count, (m, k, n) in each for size in ((m, n, k), (k, m, n))]
    return 1000 * sum(count * machine.fastest_product(*size) for count, size in each)


def main() -> int:
    options = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        agent = make_agent(options.device, folder)
        machine = Machine(agent.policy.device)
        milliseconds, whole, bare = profile(agent, options.repeats, machine.wait)
        agent.logger.close()
    floor = {part: 1000 * machine.seconds(calls) for part, calls in work().items()}
    own = products(machine)
    total = sum(milliseconds.values())
    print(f"{'':36}{'ms':>9}{'share':>8}{'floor, ms':>11}{'x floor':>9}{'own products, ms':>18}")
    for part in PARTS:
        taken = milliseconds[part]
        cells = f"{floor[part]:11.2f}{taken / floor[part]:9.1f}" if part in floor else " " * 20
        print(f"{part:36}{taken:9.2f}{taken / total:8.1%}{cells}" + (f"{own[part]:18.2f}" if part in own else ""))
    lowest = sum(floor.values())
    print(f"{'sum':36}{total:9.2f}{1:8.0%}{lowest:11.2f}{total / lowest:9.1f}{sum(own.values()):18.2f}")
    print(f"a wrapped iteration {whole:.1f} ms; without the wrappers {bare:.1f} ms, {1000 * ROWS / bare:,.0f} completions/s", end="")
    print(f" (at the floor {1000 * ROWS / lowest:,.0f}); products {machine.flops / 1e9:,.0f} GFLOP/s")
    share = sum(milliseconds[part] for part in OVERHEAD) / total
    print(f"{', '.join(OVERHEAD)}: {share:.1%} of an iteration, wanted under {MOST_OVERHEAD:.0%}")
    document = {"setting": common.setting(agent.policy.device), "machine": machine.to_json(), "milliseconds": milliseconds, "floor": floor}
    more = {"own products": own, "wrapped iteration": whole, "iteration": bare, "overhead": share}
    common.write(options.out, document | more)
    return 0 if share < MOST_OVERHEAD else 1


def parser() -> argparse.ArgumentParser:
    return common.parser(__doc__, device="auto", repeats=7)


if __name__ == "__main__":
    sys.exit(main())
