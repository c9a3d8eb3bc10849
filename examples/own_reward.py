"""Your own reward: three functions, weighted, one of them paid after every sentence. Runs offline in a second, without torch.

python examples/own_reward.py
"""

import gymnasium as gym

import textgym  # noqa: F401  (registers TextGen-v0)
from textgym.rewards import RepetitionPenalty, segment_level

PROMPTS = [
    {"prompt": "The film", "wanted": "music"},  # further columns reach the functions that name them
    {"prompt": "I saw this film", "wanted": "ending"},
]


def mentions(completions, wanted, **kwargs):
    """1 where the completion has the word that the prompt's row wants."""
    return [float(word in text.split()) for text, word in zip(completions, wanted, strict=True)]


@segment_level("sentence")
def short_sentences(segments):
    """1 for a sentence of at most five words, less the longer it is; paid at the token that ends the sentence."""
    return [min(1.0, 5 / max(1, len(text.split()))) for text in segments]


def main():
    env = gym.make(
        "TextGen-v0",
        prompts=PROMPTS,
        reward=[mentions, short_sentences, RepetitionPenalty(ngram_size=1)],
        reward_weights=[2.0, 1.0, 1.0],
        max_new_tokens=16,
    )
    tokenizer = env.unwrapped.tokenizer
    completion = " was slow and the music was wonderful. the story was weak."

    env.reset(options={"prompt_index": 0})
    for token in [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]:
        _, reward, terminated, _, info = env.step(token)
        print(f"{tokenizer.decode([token])!r:14} {reward:6.3f}")
        if terminated:
            break
    print(f"\n{info['prompt']} ...{info['completion']}  ({info['finish_reason']})")
    for name, value in info["rewards"].items():
        print(f"  {name:20} {value:6.3f}")


if __name__ == "__main__":
    main()
