"""Sampled tokens per second, beside transformers' `generate`; all take turns in one process.

    python benchmarks/rollout_tokens.py [--cases NAME ...] [--device auto] [--repeats 7] [--out result.json]

The questions, each with one function per candidate:

- "gpt2" and "llama": random models of about a million parameters (V = 512), 64 prompts of 16 tokens, 32 new ones each.
- "gpt2, early ends" and "llama, early ends": the same with up to 64 new tokens behind prompts of 8 to 16; each token is the last with a
  probability near 1/32.
- "gpt2 124M, long tail": GPT-2's own size (V = 50,257), a queue of four batches of prompts of 16 tokens, up to 64 new tokens; each token
  is the last with a probability near 1/16, so that most completions are short and a few are long. 16 rows at a time on a CPU, 512
  elsewhere: textgym fills the place of a completion that has ended, `generate` begins a batch when all of the one before have ended.

Only tokens that belong to a completion count. All are asked for the same plain distribution (temperature 1, no top-k). transformers appears
with its growing cache, its static cache, and its static cache with a compiled forward (which needs a C++ compiler on a CPU; compilation is
left out); textgym also returns the log-probs of what it drew, transformers does not here.

It prints the median tokens per second and the ratio to the best of transformers: at least 1.4 (the small models, full length) and 1.3
(the long tail) on a CPU, 10 on a GPU.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common
import torch
import transformers
from stable_baselines3.common.utils import get_device
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    CompileConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from textgym.agents import CausalLMPolicy

COMPILED = "transformers, static cache, compiled"


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        model: "gpt2", "llama" or "gpt2 124M".
        prompts: how many, in batches.
        prompt_tokens: of the shortest and the longest prompt.
        new_tokens: at most.
        hazard: the share of the vocabulary that ends a completion, as 1 in so many; 0 for none.
        wanted: the ratio on a CPU that is asked for; 0 for none.
    """

    model: str
    batches: int
    prompt_tokens: tuple[int, int]
    new_tokens: int
    hazard: int
    wanted: float


CASES = {
    "gpt2": Case("gpt2", 1, (16, 16), 32, 0, 1.4),
    "llama": Case("llama", 1, (16, 16), 32, 0, 1.4),
    "gpt2, early ends": Case("gpt2", 1, (8, 16), 64, 32, 0),
    "llama, early ends": Case("llama", 1, (8, 16), 64, 32, 0),
    "gpt2 124M, long tail": Case("gpt2 124M", 4, (16, 16), 64, 16, 1.3),
}
ON_GPU = 10.0


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of so many words; the benchmark never makes text of it."""
    words = {f"w{i}": i for i in range(vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), eos_token="w0")


def make_model(kind: str) -> PreTrainedModel:
    """Returns a random model: four layers of width 128, or GPT-2's own size."""
    torch.manual_seed(0)
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2 124M":
        return GPT2LMHeadModel(GPT2Config(**ends))
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=128, n_embd=128, n_layer=4, n_head=4, **ends))
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=128, **sizes, **ends))


def real_tokens(ids: Tensor, ends: tuple[int, ...]) -> int:
    """Counts the tokens up to each row's first end token."""
    if not ends:
        return ids.numel()
    ended = torch.isin(ids, torch.tensor(ends, device=ids.device)).cumsum(1)
    before = ended.roll(1, 1)
    before[:, 0] = 0
    return int((before == 0).sum())


def candidates(case: Case, policy: CausalLMPolicy, prompt_ids: Tensor, lengths: Tensor) -> dict[str, Callable[[], int]]:
    """Returns one function per candidate, which completes the prompts and returns the tokens it made."""
    model, width = policy.model, prompt_ids.shape[1]
    mask = (torch.arange(width, device=policy.device) >= width - lengths[:, None]).long()
    ends = tuple(range(0, policy.vocab_size, case.hazard)) if case.hazard else ()
    rows = len(prompt_ids) // case.batches

    def ours() -> int:
        generation = policy.generate_ids(prompt_ids, lengths, case.new_tokens, eos_token_ids=ends, max_batch_size=rows)
        return int(generation.lengths.sum())

    def generate(cache: str | None, compiled: bool = False) -> int:
        compilation = CompileConfig(mode=None, dynamic=False) if compiled else None
        if compilation is not None:
            compilation._compile_all_devices = True  # transformers compiles for accelerators only, unless told
        found = 0
        for start in range(0, len(prompt_ids), rows):
            out = model.generate(
                input_ids=prompt_ids[start : start + rows],
                attention_mask=mask[start : start + rows],
                max_new_tokens=case.new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=list(ends) or None,
                pad_token_id=1,
                cache_implementation=cache,
                compile_config=compilation,
                disable_compile=not compiled,
            )
            found += real_tokens(out[:, width:], ends)
        return found

    return {
        "textgym": ours,
        "transformers, growing cache": lambda: generate(None),
        "transformers, static cache": lambda: generate("static"),
        COMPILED: lambda: generate("static", compiled=True),
    }


def measure(name: str, case: Case, device: torch.device, repeats: int) -> dict[str, float]:
    """Returns the median tokens per second of each candidate, and the ratio to the best of transformers."""
    model = make_model(case.model)
    policy = CausalLMPolicy(model, make_tokenizer(model.config.vocab_size), device=device, seed=0)
    rows = 64 if case.model != "gpt2 124M" else 16 if policy.device.type == "cpu" else 512
    generator = torch.Generator().manual_seed(0)
    shortest, longest = case.prompt_tokens
    prompt_ids = torch.randint(1, policy.vocab_size, (rows * case.batches, longest), generator=generator)
    lengths = torch.randint(shortest, longest + 1, (len(prompt_ids),), generator=generator)
    runs = candidates(case, policy, prompt_ids.to(policy.device), lengths.to(policy.device))
    try:
        runs[COMPILED]()
    except Exception as error:  # what goes wrong depends on the machine's compilers
        print(f"{name}: left out {COMPILED}: {type(error).__name__}")
        del runs[COMPILED]
    rates = common.alternate({each: common.per_second(run, policy.device) for each, run in runs.items()}, repeats)
    rates["ratio to the best of transformers"] = rates["textgym"] / max(rate for each, rate in rates.items() if "transformers" in each)
    return rates


def main() -> None:
    parser = common.parser(__doc__, device="auto", repeats=7)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME", help="some of the questions")
    arguments: argparse.Namespace = parser.parse_args()
    device = get_device(arguments.device)
    transformers.logging.set_verbosity_error()
    results = {}
    for name in arguments.cases:
        results[name] = rates = measure(name, CASES[name], device, arguments.repeats)
        print(name)
        for each, value in rates.items():
            wanted = f"    wanted on a CPU: {CASES[name].wanted}" if CASES[name].wanted else ""
            print(f"    {each:<40}{value:>10,.2f}{wanted}" if "ratio" in each else f"    {each:<40}{value:>10,.0f} tokens/s")
    common.write(arguments.out, {"setting": common.setting(device), "wanted on a GPU": ON_GPU, "tokens per second": results})


if __name__ == "__main__":
    main()
