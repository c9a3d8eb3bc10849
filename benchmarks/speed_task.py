"""What the scripts that time whole iterations share: a small random model, prompts of one length, a cheap reward, and the clock.

The model is a GPT-2 of 1.1 million parameters (V = 2,048, width 128, 4 layers, 4 heads, 64 positions) without dropout, the prompts have
16 tokens. Its end token is never drawn (its logit is some twenty nats below the others), so every completion runs to its full length, on
every side of a comparison alike, though all sides look out for it.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCAB_SIZE, PROMPT_TOKENS, POSITIONS = 2048, 16, 64
PAD, EOS, FIRST_WORD = 0, 1, 2
NUM_PROMPTS = 256
WARM_UP = 3  # iterations of a run before its clock starts


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of `VOCAB_SIZE` words, with pad and end tokens of their own."""
    words = ["<pad>", "<end>", *(f"w{i}" for i in range(FIRST_WORD, VOCAB_SIZE))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left")


def make_model(seed: int = 0) -> GPT2LMHeadModel:
    """Returns the random model in float32, on the CPU."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB_SIZE, "n_positions": POSITIONS, "n_embd": 128, "n_layer": 4, "n_head": 4}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        # The first feature of every output is about 5, and only the end token minds.
        model.transformer.ln_f.bias[0] = 5.0
        model.transformer.wte.weight[:, 0] = 0.0
        model.transformer.wte.weight[EOS] = 0.0
        model.transformer.wte.weight[EOS, 0] = -4.0
    return model


def make_texts(count: int, words: int, seed: int = 0) -> list[str]:
    """Returns texts of so many random words, which are as many tokens."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in row) for row in rng.integers(FIRST_WORD, VOCAB_SIZE, (count, words))]


def reward(completions: list[str], **columns: Any) -> list[float]:
    """A cheap reward: the share of the digit 7 among the characters."""
    return [text.count("7") / max(len(text), 1) for text in completions]


def make_envs(num_envs: int, new_tokens: int, reward: Callable[..., Any] = reward) -> VectorEnv[Any, Any, Any]:
    """Returns the environment of so many rows, whose prompts have `PROMPT_TOKENS` tokens each."""
    return gym.make_vec(
        "textgym:TextGen-v0",
        num_envs=num_envs,
        prompts=make_texts(NUM_PROMPTS, PROMPT_TOKENS),
        tokenizer=make_tokenizer(),
        reward=reward,
        max_prompt_tokens=PROMPT_TOKENS,
        max_new_tokens=new_tokens,
    )


class IterationClock(BaseCallback):
    """Notes when each iteration begins: of an agent of ours or of Stable-Baselines3, by its callbacks; of others, by `tick`.

    Args:
        device: what to wait for before the clock is read.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.ticks: list[float] = []

    def tick(self) -> None:
        """An iteration is over, or the first begins."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.ticks.append(time.perf_counter())

    def _on_rollout_start(self) -> None:
        self.tick()

    def _on_training_end(self) -> None:
        self.tick()

    def _on_step(self) -> bool:
        return True

    def seconds(self, warm_up: int) -> float:
        """Returns the median seconds of an iteration, the first `warm_up` left out."""
        return statistics.median(np.diff(self.ticks)[warm_up:].tolist())
