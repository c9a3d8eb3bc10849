"""From preferences to a better policy, without a reward model and without sampling during training: direct preference optimisation.

Of two completions of the bundled model the one with the higher true reward is preferred; DPO trains a policy on such pairs. The trained
policy is then what it also is, a reward model: it orders completions that it never saw.
"""

from itertools import combinations

import numpy as np

from textgym.agents import DPO, CausalLMPolicy
from textgym.bundled import bundled_model_path, bundled_prompts, true_reward

PAIRS, NEW_TOKENS = 2000, 24


def complete(policy, prompts, per_prompt, seed):
    """Samples completions of each prompt; returns prompts and completions row by row, and the rewards as (prompts, per_prompt)."""
    generation = policy.generate(prompts, NEW_TOKENS, num_generations=per_prompt, seed=seed)
    rows = [prompt for prompt in prompts for _ in range(per_prompt)]
    return rows, generation, np.reshape(true_reward(rows, generation.texts), (-1, per_prompt))


def main() -> None:
    policy = CausalLMPolicy.from_pretrained(bundled_model_path())
    train, held_out = ([row["prompt"] for row in bundled_prompts(part)] for part in ("train", "eval"))

    rows, generation, rewards = complete(policy, (train * PAIRS)[:PAIRS], 2, seed=0)
    pairs = [
        {"prompt": rows[2 * i], "chosen": generation.texts[2 * i + better], "rejected": generation.texts[2 * i + 1 - better]}
        for i, better in enumerate(rewards.argmax(1))
        if rewards[i, 0] != rewards[i, 1]
    ]
    print(f"{len(pairs)} pairs, for instance", *(f"  {name:9}{text}" for name, text in pairs[0].items()), sep="\n")

    before = complete(policy, held_out, 4, seed=1)[2].mean()
    agent = DPO(policy, pairs, learning_rate=5e-4, beta=0.5, n_epochs=2, batch_size=32, seed=0)
    agent.learn()
    print(f"true reward on held-out prompts: {before:.3f} before, {complete(policy, held_out, 4, seed=1)[2].mean():.3f} after")

    # The implicit reward, β log π/π_ref, in the form that `TextGen-v0(reward=...)` takes, on fresh completions of the reference.
    rows, generation, true = complete(agent.reference, held_out, 4, seed=2)
    implicit = np.reshape(agent.implicit_reward()(prompts=rows, completion_ids=generation.completion_ids), true.shape)
    signs = [np.sign(table[:, i] - table[:, j]) for i, j in combinations(range(4), 2) for table in (true, implicit)]
    one, other = np.concatenate(signs[::2]), np.concatenate(signs[1::2])
    print(f"the implicit reward orders {(one == other)[one != 0].mean():.0%} of new pairs as the true reward does")


if __name__ == "__main__":
    main()
