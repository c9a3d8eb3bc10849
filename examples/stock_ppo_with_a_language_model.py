"""Stable-Baselines3's own PPO trains a language model, held near where it began by the KL wrapper."""

import gymnasium as gym
from stable_baselines3 import PPO

import textgym  # noqa: F401  (registers the ids)
from textgym.agents import CausalLMActorCriticPolicy, CausalLMPolicy, evaluate_policy
from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.vec_env_adapter import as_sb3_vec_env
from textgym.wrappers import ActorCriticAdapter
from textgym.wrappers.vector import KLShaping

TIMESTEPS = 10_000  # tokens


def main(timesteps: int = TIMESTEPS) -> None:
    policy = CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu")
    envs = KLShaping(gym.make_vec("TextGen-v0", num_envs=32), beta=0.1)
    agent = PPO(
        CausalLMActorCriticPolicy,
        as_sb3_vec_env(envs),
        policy_kwargs={"language_model": policy},
        learning_rate=1e-3,
        n_steps=64,
        batch_size=256,
        n_epochs=2,
        gamma=1.0,
        seed=0,
        device="cpu",
    )
    envs.set_policy(ActorCriticAdapter(agent.policy))
    envs.set_reference(ActorCriticAdapter(agent.policy).frozen_copy())

    held_out, reference = gym.make_vec("TextGen-v0", num_envs=50, prompts=bundled_prompts("eval")), policy.reference()
    before = evaluate_policy(policy, held_out, reference)
    agent.learn(timesteps)
    after = evaluate_policy(policy, held_out, reference)
    print(f"reward on held-out prompts {before.reward_mean:.2f} -> {after.reward_mean:.2f}, KL {after.kl_mean:.1f} nats per text")
    policy.save_pretrained("model")  # what transformers reads; `agent.save` writes the agent, as Stable-Baselines3 does


if __name__ == "__main__":
    main()
