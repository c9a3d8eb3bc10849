"""The environment alone: make it, step it, look at it. No agent, no torch."""

import gymnasium as gym

import textgym  # noqa: F401  (registers the ids)


def main() -> None:
    env = gym.make("TextGen-v0", reward="film-review-true", max_new_tokens=12, render_mode="ansi")
    env.action_space.seed(0)
    observation, info = env.reset(seed=0)
    print(f"prompt {info['prompt_index']}, observation {observation['input_ids'].shape}, {env.action_space.n} possible tokens")
    ended = False
    while not ended:
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        ended = terminated or truncated
    print(env.render())
    print(f"{info['prompt']!r} -> {info['completion']!r}, reward {reward:.2f}, ended by {info['finish_reason']}")

    # Many episodes at once: one native batched environment, the same arguments.
    envs = gym.make_vec("TextGen-v0", num_envs=4, reward="film-review-true", max_new_tokens=12)
    envs.action_space.seed(0)
    envs.reset(seed=0)
    for _ in range(12):
        _, rewards, terminated, _, infos = envs.step(envs.action_space.sample())
        for row in terminated.nonzero()[0]:
            print(f"row {row}: {infos['completion'][row]!r}, reward {rewards[row]:.2f}")
    envs.close()


if __name__ == "__main__":
    main()
