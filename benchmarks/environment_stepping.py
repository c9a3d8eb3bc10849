"""How fast the environment steps, beside Gymnasium's `CartPole-v1`: all in one process, the candidates taking turns.

    python benchmarks/environment_stepping.py [--out result.json]

The setting: L = 32 + 64 columns, V = 512, a plain Python reward, episodes that end by length, so every 64th step scores and resets all
rows. It prints steps per second (a step of N rows counts as N) and three ratios, each with what it should be:

- the native batched environment against Gymnasium's native `CartPole-v1` of as many rows: at least 0.5;
- the native batched environment against a `SyncVectorEnv` of as many single ones: at least 20;
- one `TextGenEnv` against one `CartPole-v1`, both as `gym.make` gives them: at least 0.5.
"""

import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import gymnasium as gym
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import textgym  # noqa: F401

VOCAB_SIZE, MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 512, 32, 64
NUM_PROMPTS = 100
FIRST_WORD = 2  # the tokens before are the unknown and the end token, which no candidate ever sends

RATIOS = {
    "native / CartPole-v1 native": ("TextGen-v0 native", "CartPole-v1 native", 0.5),
    "native / sync": ("TextGen-v0 native", "TextGen-v0 sync", 20.0),
    "single / CartPole-v1 single": ("TextGen-v0 single", "CartPole-v1 single", 0.5),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of `VOCAB_SIZE` words."""
    words = ["<unknown>", "<end>", *(f"w{i}" for i in range(FIRST_WORD, VOCAB_SIZE))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def reward(completions: list[str], **columns: Any) -> list[float]:
    """A plain Python reward: the characters of a completion."""
    return [float(len(text)) for text in completions]


def text_arguments() -> dict[str, Any]:
    """Returns the arguments of all text environments."""
    rng = np.random.default_rng(0)
    prompts = [
        " ".join(f"w{i}" for i in rng.integers(FIRST_WORD, VOCAB_SIZE, rng.integers(4, MAX_PROMPT_TOKENS + 1))) for _ in range(NUM_PROMPTS)
    ]
    sizes = {"max_prompt_tokens": MAX_PROMPT_TOKENS, "max_new_tokens": MAX_NEW_TOKENS}
    return {"prompts": prompts, "tokenizer": make_tokenizer(), "reward": reward, **sizes}


def batch_runner(envs: Any, num_actions: int) -> Callable[[int], float]:
    """Returns a function that takes some steps of all rows and returns the seconds they took, the choice of actions left out."""
    envs.reset(seed=0)
    rng = np.random.default_rng(0)

    def run(steps: int) -> float:
        actions = rng.integers(FIRST_WORD if num_actions == VOCAB_SIZE else 0, num_actions, (steps, envs.num_envs))
        start = time.perf_counter()
        for action in actions:
            envs.step(action)
        return time.perf_counter() - start

    return run


def single_runner(env: Any, num_actions: int) -> Callable[[int], float]:
    """Returns the same for a single environment, which is reset whenever an episode is over."""
    env.reset(seed=0)
    rng = np.random.default_rng(0)

    def run(steps: int) -> float:
        actions = rng.integers(FIRST_WORD if num_actions == VOCAB_SIZE else 0, num_actions, steps)
        start = time.perf_counter()
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return time.perf_counter() - start

    return run


def measure(num_envs: int, rounds: int, scale: float) -> dict[str, float]:
    """Returns the median steps per second of each candidate over some rounds, in each of which all take their turn."""
    text = text_arguments()
    sync = gym.make_vec("TextGen-v0", num_envs, vectorization_mode="sync", **text)
    period = MAX_NEW_TOKENS + 1  # an episode and the step that resets it: every measurement is a multiple of it
    candidates = {
        "TextGen-v0 native": (batch_runner(gym.make_vec("TextGen-v0", num_envs, **text), VOCAB_SIZE), num_envs, 20),
        "CartPole-v1 native": (batch_runner(gym.make_vec("CartPole-v1", num_envs), 2), num_envs, 20),
        "TextGen-v0 sync": (batch_runner(sync, VOCAB_SIZE), num_envs, 2),
        "TextGen-v0 single": (single_runner(gym.make("TextGen-v0", **text), VOCAB_SIZE), 1, 100),
        "CartPole-v1 single": (single_runner(gym.make("CartPole-v1"), 2), 1, 100),
    }

    def rate(run: Callable[[int], float], rows: int, periods: int) -> float:
        steps = max(1, round(periods * scale)) * period
        return rows * steps / run(steps)

    return common.alternate({name: partial(rate, *candidate) for name, candidate in candidates.items()}, rounds)


def main() -> None:
    """Measures, prints the tables and writes the JSON file."""
    parser = common.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--num-envs", type=int, default=256, help="rows of the vector environments")
    parser.add_argument("--rounds", type=int, default=9, help="rounds whose median counts")
    parser.add_argument("--scale", type=float, default=1.0, help="steps per round, relative to the usual number")
    arguments = parser.parse_args()

    rates = measure(arguments.num_envs, arguments.rounds, arguments.scale)
    print(f"{'':28}{'steps/s':>14}")
    for name, rate in rates.items():
        print(f"{name:28}{rate:14,.0f}")
    print(f"\n{'':36}{'ratio':>8}{'at least':>10}")
    ratios = {}
    for name, (ours, theirs, floor) in RATIOS.items():
        ratios[name] = {"ratio": rates[ours] / rates[theirs], "floor": floor}
        print(f"{name:36}{ratios[name]['ratio']:8.2f}{floor:10.1f}")
    setting = {"num_envs": arguments.num_envs, "rounds": arguments.rounds, "L": [MAX_PROMPT_TOKENS, MAX_NEW_TOKENS], "V": VOCAB_SIZE}
    versions = {"python": platform.python_version(), "numpy": np.__version__, "gymnasium": gym.__version__}
    common.write(arguments.out, {"setting": setting, "versions": versions, "steps_per_second": rates, "ratios": ratios})


if __name__ == "__main__":
    main()
