"""Your own reward wrapper, in vector form and in single form, and what `textgym.step_sequence` makes of both.

An agent built on such an environment learns from the wrapped reward: `REINFORCE(policy, PaidTokens(envs))`.

python examples/own_reward_wrapper.py
"""

import gymnasium as gym
import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorRewardWrapper

import textgym

PRICE = 0.05


class PaidTokens(VectorRewardWrapper):
    """For `gym.make_vec`: every token costs something."""

    def rewards(self, rewards):
        """Called once per step with the rewards of all rows."""
        return rewards - PRICE


class PaidTokensSingle(gym.RewardWrapper):
    """The same for `gym.make`."""

    def reward(self, reward):
        """Called once per step."""
        return float(reward) - PRICE


def step_by_step(envs, actions, lengths):
    """What `step_sequence` means: step each row until its tokens are sent or its episode ends."""
    rewards, active = np.zeros(actions.shape), np.ones(envs.num_envs, dtype=bool)
    for t in range(actions.shape[1]):
        _, step_rewards, terminated, truncated, _ = envs.step(actions[:, t])
        rewards[active, t] = step_rewards[active]
        active &= ~(terminated | truncated) & (t + 1 < lengths)
    return rewards


def main() -> None:
    settings = {"reward": "film-review-true", "max_new_tokens": 12}
    vector = PaidTokens(gym.make_vec("TextGen-v0", num_envs=4, **settings))
    single = SyncVectorEnv([lambda: PaidTokensSingle(gym.make("TextGen-v0", **settings))] * 4)

    tokenizer = vector.unwrapped.tokenizer
    texts = [" was wonderful.", " was slow and the music was weak.", " was good.", " had a good story."]
    completions = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    lengths = np.array([min(len(ids), 12) for ids in completions])
    actions = np.array([(ids + [0] * 12)[:12] for ids in completions])

    for name, envs in (("vector form", vector), ("single form", single)):
        envs.reset(seed=0)
        looped = step_by_step(envs, actions, lengths)
        envs.reset(seed=0)
        result = textgym.step_sequence(envs, actions, lengths)
        print(f"{name}: returns {', '.join(f'{value:.3f}' for value in result.rewards.sum(1))}", end=": ")
        print("equal to the step loop" if np.allclose(result.rewards, looped, atol=1e-6) else "NOT equal to the step loop")
    for info, length in zip(result.infos, result.lengths_used, strict=True):
        print(f"  {info['prompt']} ...{info['completion']}  {length} tokens, reward {info['rewards']['film-review-true']:.3f}")


if __name__ == "__main__":
    main()
