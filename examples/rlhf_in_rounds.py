"""Learning from comparisons in rounds: ask about what the policy writes, fit a reward model, improve the policy, and ask again.

Somebody prefers one completion to another by a rule that neither the policy nor the reward model sees. One round with 1,500 comparisons and
three rounds with 500 each cost the same. With a KL term as weak as here the policy leaves the texts that the first comparisons were about,
and finds what only the reward model likes; the later rounds ask about what the policy has come to write.
"""

import tempfile
from pathlib import Path

from textgym.agents import RLHF, CausalLMPolicy, compare_policies
from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.feedback import SyntheticAnnotator

COMPARISONS, NEW_TOKENS = 1_500, 24


def learn(rounds, timesteps, folder):
    """Learns in `rounds` rounds, which generate `timesteps` tokens together; returns what became of it."""
    rlhf = RLHF(
        CausalLMPolicy.from_pretrained(bundled_model_path()),
        [row["prompt"] for row in bundled_prompts("train")],
        SyntheticAnnotator("film-review-true", temperature=0.25, seed=0),
        folder,
        num_pairs=COMPARISONS // rounds,
        timesteps_per_round=timesteps // rounds,
        max_new_tokens=NEW_TOKENS,
        agent_options={"learning_rate": 5e-4, "beta": 0.02},
        reward_model_options={"learning_rate": 1e-3, "n_epochs": 3, "batch_size": 32},
    )
    for one in rlhf.run(rounds):
        right = one.reward_model["accuracy"]["mean"]
        print(f"  round {one.number}: {one.comparisons} comparisons, reward model right in {right:.0%} of held-out ones")
    return rlhf


def main(timesteps: int = 45_000) -> None:
    held_out = [row["prompt"] for row in bundled_prompts("eval")]
    with tempfile.TemporaryDirectory() as folder:
        for rounds in (1, 3):
            print(f"{rounds} round{'s' if rounds > 1 else ''} of {COMPARISONS // rounds} comparisons")
            rlhf = learn(rounds, timesteps, Path(folder) / str(rounds))
            report = compare_policies(
                rlhf.policy, held_out, rlhf.agent.reference, true_reward="film-review-true", max_new_tokens=NEW_TOKENS, num_generations=4
            )
            print(f"  against the policy at the start, by the rule: {report.win_rates['true_reward']}")
            print(f"  for instance: {held_out[0]}{report.samples[0]['A']['completion']}")


if __name__ == "__main__":
    main()
