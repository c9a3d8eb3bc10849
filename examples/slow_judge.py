"""A judge that has to be waited for: the same training with a plain function and with an async one. Runs offline in half a minute.

python examples/slow_judge.py
"""

import asyncio
import time

import gymnasium as gym

import textgym  # noqa: F401  (registers TextGen-v0)
from textgym.agents import RLOO, CausalLMPolicy, evaluate_policy
from textgym.bundled import bundled_model_path, bundled_prompts

SECONDS_PER_ANSWER = 0.3  # of a stand-in for a service


def verdict(text):
    return float("wonderful" in text) - float("weak" in text)


def plain_judge(completions):
    """Every batch is waited for before anything else happens."""
    time.sleep(SECONDS_PER_ANSWER)
    return [verdict(text) for text in completions]


async def judge(completions):
    """One request per completion, all at once; meanwhile the next completions are sampled."""

    async def ask(text):
        await asyncio.sleep(SECONDS_PER_ANSWER)
        return verdict(text)

    return await asyncio.gather(*(ask(text) for text in completions))


def train(reward, timesteps):
    """Returns the seconds of a training, and the mean verdict on held-out prompts after it."""
    policy = CausalLMPolicy.from_pretrained(bundled_model_path())
    envs = gym.make_vec("TextGen-v0", num_envs=64, reward=reward)
    held_out = gym.make_vec("TextGen-v0", num_envs=50, reward=reward, prompts=bundled_prompts("eval"))
    # Eight walks of 64 completions make a rollout: seven of its eight waits fall together with sampling.
    agent = RLOO(policy, envs, 1e-3, num_generations=4, rollout_size=512, seed=0)
    start = time.perf_counter()
    agent.learn(timesteps)
    return time.perf_counter() - start, evaluate_policy(policy, held_out, agent.reference).reward_mean


def main(timesteps=40_000):
    for name, reward in (("plain", plain_judge), ("async", judge)):
        seconds, verdicts = train(reward, timesteps)
        print(f"{name}: {seconds:.1f} s, mean verdict {verdicts:.3f} after training")


if __name__ == "__main__":
    main()
