"""Feedback → reward model → reinforcement learning: a reward is learned from comparisons and then maximised; the true one keeps watch.

The annotator compares film reviews of the bundled model and is wrong now and then. The reward model sees its comparisons only. The policy
is trained on the reward model, and what that was worth is measured by the reward that the annotator had in mind.
"""

import gymnasium as gym
import numpy as np

import textgym  # noqa: F401  (registers the environments)
from textgym.agents import RLOO, CausalLMPolicy, RewardModel, RewardModelTrainer
from textgym.bundled import bundled_model_path, bundled_prompts, true_reward
from textgym.feedback import SyntheticAnnotator

MAX_NEW_TOKENS = 24


def true_mean(policy: CausalLMPolicy, prompts: list[str]) -> float:
    """The mean true reward of fresh samples."""
    texts = policy.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, num_generations=4, seed=7).texts
    return float(np.mean(true_reward([prompt for prompt in prompts for _ in range(4)], texts)))


def main() -> None:
    policy = CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu")
    prompts = [row["prompt"] for row in bundled_prompts("train")]
    held_out_prompts = [row["prompt"] for row in bundled_prompts("eval")]

    annotator = SyntheticAnnotator("film-review-true", temperature=0.25, seed=0)

    def compared(texts: list[str], times: int) -> list:
        repeated = [text for text in texts for _ in range(times)]
        first, second = (policy.generate(repeated, max_new_tokens=MAX_NEW_TOKENS, seed=seed).texts for seed in (1, 2))
        # Now and then both are the same, from which nothing is learned.
        pairs = [pair for pair in zip(repeated, first, second, strict=True) if pair[1] != pair[2]]
        return annotator.compare(*zip(*pairs, strict=True))

    feedback, held_out = compared(prompts, 8), compared(held_out_prompts, 4)
    print("prompt:  ", feedback[0].prompt)
    print("chosen:  ", feedback[0].chosen)
    print("rejected:", feedback[0].rejected)

    reward_model = RewardModel.from_policy(policy)
    trainer = RewardModelTrainer(reward_model, feedback, 1e-3, n_epochs=3, batch_size=32, seed=0).learn()
    print(f"\nOn {len(held_out)} comparisons of prompts that it has not seen:")
    print(trainer.evaluate(held_out))

    reference_texts = policy.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, seed=3).texts
    reward_model.normalise(prompts, reference_texts)

    before = true_mean(policy, held_out_prompts)
    envs = gym.make_vec(
        "TextGen-v0", num_envs=64, prompts=prompts, tokenizer=policy.tokenizer, reward=reward_model, max_new_tokens=MAX_NEW_TOKENS
    )
    RLOO(policy, envs, 5e-4, beta=0.2, num_generations=4, seed=0).learn(30_000)
    print(f"\ntrue reward of the policy on held-out prompts: {before:.2f} before, {true_mean(policy, held_out_prompts):.2f} after")


if __name__ == "__main__":
    main()
