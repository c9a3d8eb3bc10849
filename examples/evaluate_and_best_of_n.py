"""Who writes better, and is the reward being hacked? Best-of-n and two trainings of the bundled model, against the model itself.

Best-of-n needs no training: of n samples the one with the highest reward is kept. Rejection sampling trains on such samples and then needs
one. RLOO without a KL penalty maximises the reward model without restraint. Each is measured on held-out prompts by the reward model that
it was made with, and by the true reward, which only this script knows.

python examples/evaluate_and_best_of_n.py
"""

import gymnasium as gym

import textgym  # noqa: F401  (registers TextGen-v0)
from textgym.agents import RLOO, BestOfN, CausalLMPolicy, RejectionSampling, compare_policies
from textgym.bundled import bundled_model_path, bundled_prompts

NEW_TOKENS = 24


def load():
    return CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu")


def main(timesteps=25_000):
    start, held_out = load(), bundled_prompts("eval")
    candidates = {f"best of {n}": BestOfN(start, "film-review", n) for n in (4, 16)}

    filtered = RejectionSampling(load(), bundled_prompts(), "film-review", 1e-3, n=8, max_new_tokens=NEW_TOKENS, seed=0)
    filtered.learn(rounds=2)
    candidates["rejection sampling"] = filtered.policy

    envs = gym.make_vec("TextGen-v0", num_envs=64, max_new_tokens=NEW_TOKENS)
    unrestrained = RLOO(load(), envs, num_generations=4, beta=0.0, learning_rate=5e-4, seed=0)
    unrestrained.learn(timesteps)
    candidates["RLOO without KL"] = unrestrained.policy

    for name, policy in candidates.items():
        report = compare_policies(
            policy,
            held_out,
            start,
            reward="film-review",
            true_reward="film-review-true",
            reference=start,
            max_new_tokens=NEW_TOKENS,
            num_generations=2,
            names=(name, "start"),
        )
        hacking = report.over_optimisation
        print(f"{name}: {report.win_rates['true_reward'].rate:.0%} against the start by the true reward; {hacking.verdict}")
    print()
    print(report)  # of the last one in full


if __name__ == "__main__":
    main()
