"""Fine-grained rewards: praise for every sentence against words that come again, with a weight that changes on the way.

python examples/fine_grained_reward.py
"""

import gymnasium as gym

import textgym  # noqa: F401  (registers the ids)
from textgym.agents import PPO, CausalLMPolicy, evaluate_policy
from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.rewards import FineGrainedReward, LexiconReward, Objective

TIMESTEPS = 24_000  # tokens
WORDS = {
    "good": 1,
    "great": 2,
    "excellent": 2,
    "wonderful": 2,
    "brilliant": 2,
    "beautiful": 2,
    "bad": -1,
    "weak": -1,
    "dull": -2,
    "awful": -2,
}


def variety(completions, segments):
    """Half a point off for every word of the sentence that stands earlier in the completion."""
    scores = []
    for text, sentence in zip(completions, segments, strict=True):
        before = text[: len(text) - len(sentence)].split()
        scores.append(-0.5 * sum(word in before for word in sentence.split()))
    return scores


def objectives():
    return FineGrainedReward(
        [
            Objective(LexiconReward(WORDS, normalise="mean"), "sentence", weight=1.0, name="praise", sees="segment"),
            Objective(variety, "sentence", weight=0.0),
        ]
    )


def main(timesteps: int = TIMESTEPS) -> None:
    policy = CausalLMPolicy.from_pretrained(bundled_model_path())
    envs = gym.make_vec("TextGen-v0", num_envs=64, reward=objectives())
    held_out = gym.make_vec("TextGen-v0", num_envs=64, prompts=bundled_prompts("eval"), reward=objectives())
    agent = PPO(policy, envs, learning_rate=1e-3, beta=0.1, seed=0)

    def report(when):
        infos = evaluate_policy(policy, held_out, agent.reference, episodes=128).infos
        means = {name: sum(info["rewards"][name] for info in infos) / len(infos) for name in ("praise", "variety")}
        print(f"{when:18} praise {means['praise']:5.2f}  variety {means['variety']:5.2f}   {infos[0]['prompt']}{infos[0]['completion']}")

    report("before")
    agent.learn(timesteps // 2)
    report("praise alone")
    envs.unwrapped.set_reward_weights({"variety": 1.0})  # in a callback's `_on_rollout_start` it can follow a schedule
    agent.learn(timesteps // 2, reset_num_timesteps=False)
    report("and variety")


if __name__ == "__main__":
    main()
