"""Your own model: any transformers causal LM with its tokenizer, here a small Llama made on the spot."""

import gymnasium as gym
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import textgym  # noqa: F401  (registers the ids)
from textgym.agents import REINFORCE, CausalLMPolicy
from textgym.bundled import bundled_tokenizer_path


def mentions_film(completions: list[str], **columns: object) -> list[float]:
    """Pays 1 for a text with the word film in it."""
    return [float("film" in text.split()) for text in completions]


def main(timesteps: int = 60_000) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bundled_tokenizer_path())
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    policy = CausalLMPolicy(model, tokenizer)  # from disk: CausalLMPolicy.from_pretrained("path")
    envs = gym.make_vec(
        "TextGen-v0", num_envs=64, prompts=["the", "my friend", "we saw"], tokenizer=tokenizer, reward=mentions_film, max_new_tokens=12
    )
    agent = REINFORCE(policy, envs, 3e-3, beta=0.01, baseline="leave_one_out", num_generations=4, seed=0)

    def texts_with_film() -> float:
        texts = policy.generate(["the"], max_new_tokens=12, num_generations=200, seed=1).texts
        return sum(mentions_film(texts)) / len(texts)

    print(f"texts that mention a film: {texts_with_film():.0%} before,", end=" ")
    agent.learn(timesteps)
    print(f"{texts_with_film():.0%} after")


if __name__ == "__main__":
    main()
