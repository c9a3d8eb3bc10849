"""Training from Python: the bundled tiny model learns to write film reviews that the bundled reward model likes."""

import gymnasium as gym
from stable_baselines3.common.utils import LinearSchedule

import textgym  # noqa: F401  (registers the ids)
from textgym.agents import PPO, CausalLMPolicy, Evaluation, evaluate_policy
from textgym.bundled import bundled_model_path, bundled_prompts

TIMESTEPS = 40_000  # tokens


def main(timesteps: int = TIMESTEPS) -> None:
    policy = CausalLMPolicy.from_pretrained(bundled_model_path())
    envs = gym.make_vec("TextGen-v0", num_envs=64)
    held_out = gym.make_vec("TextGen-v0", num_envs=50, prompts=bundled_prompts("eval"))
    agent = PPO(
        policy,
        envs,
        LinearSchedule(1e-3, 0.0, 1.0),
        beta=0.1,
        seed=0,
        evaluation=Evaluation(held_out, interval=5),
    )

    before = evaluate_policy(policy, held_out, agent.reference)
    agent.learn(timesteps)
    after = evaluate_policy(policy, held_out, agent.reference)

    print(f"reward on held-out prompts {before.reward_mean:.2f} -> {after.reward_mean:.2f}, KL {after.kl_mean:.1f} nats per text")
    for old, new in list(zip(before.infos, after.infos, strict=True))[:3]:
        print(f"  {old['prompt']!r}\n    before: {old['completion']}\n    after:  {new['completion']}")
    # agent.save("runs/ppo"); agent = PPO.load("runs/ppo", env=envs); agent.learn(more, reset_num_timesteps=False)


if __name__ == "__main__":
    main()
