"""Tokens per second of a rollout, beside transformers' `generate` and beside a model without a cache; all take turns in one process.

    python benchmarks/rollout_tokens.py [--device auto] [--repeats 7] [--out result.json]

The setting: 64 prompts of 8 to 32 tokens, up to 64 new ones, V = 512, random models of about a million parameters. Two cases: every
completion runs to its full length; and completions end early, each token being the last with a probability near 1/32. Only tokens that
belong to a completion count. transformers appears with the faster of its growing and its static cache, both asked for the same plain
distribution (temperature 1, no top-k). textgym also returns the log-probs of what it drew; transformers does not here.

It prints the median tokens per second and the ratios to transformers (should be at least 1.2) and to the run without a cache.
"""

from collections.abc import Callable
from typing import Any

import common
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from textgym.agents import CausalLMPolicy

VOCAB_SIZE, BATCH_SIZE, PROMPT_TOKENS, NEW_TOKENS = 512, 64, 16, 32
ENDS = {"full length": (), "early ends": tuple(range(0, VOCAB_SIZE, 32))}
FLOOR = 1.2
WITHOUT_CACHE = "without a cache"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of `VOCAB_SIZE` words; the benchmark never makes text of it."""
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), eos_token="w0")


def make_model(kind: str) -> PreTrainedModel:
    """Returns a random model of about a million parameters: four layers of width 128."""
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_positions=128, n_embd=128, n_layer=4, n_head=4, **ends))
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=128, **sizes, **ends))


def real_tokens(ids: Tensor, ends: tuple[int, ...]) -> int:
    """Counts the tokens up to each row's first end token."""
    if not ends:
        return ids.numel()
    ended = torch.isin(ids, torch.tensor(ends, device=ids.device)).cumsum(1)
    before = ended.roll(1, 1)
    before[:, 0] = 0
    return int((before == 0).sum())


def candidates(policy: CausalLMPolicy, prompt_ids: Tensor, lengths: Tensor, ends: tuple[int, ...]) -> dict[str, Callable[[], int]]:
    """Returns one function per candidate, which completes the prompts and returns the tokens it made."""
    model = policy.model
    mask = (torch.arange(PROMPT_TOKENS, device=policy.device) >= PROMPT_TOKENS - lengths[:, None]).long()

    def ours() -> int:
        return int(policy.generate_ids(prompt_ids, lengths, NEW_TOKENS, eos_token_ids=ends).lengths.sum())

    def generate(cache: str | None) -> int:
        out = model.generate(
            input_ids=prompt_ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=list(ends) or None,
            pad_token_id=1,
            cache_implementation=cache,
        )
        return real_tokens(out[:, PROMPT_TOKENS:], ends)

    @torch.no_grad()
    def without_cache() -> int:
        ids, seen = prompt_ids, mask
        for _ in range(NEW_TOKENS):
            positions = (seen.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=seen, position_ids=positions, use_cache=False, logits_to_keep=1).logits[:, -1]
            ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1)), 1)
            seen = torch.cat((seen, torch.ones_like(seen[:, :1])), 1)
        return real_tokens(ids[:, PROMPT_TOKENS:], ends)

    return {
        "textgym": ours,
        "transformers, growing cache": lambda: generate(None),
        "transformers, static cache": lambda: generate("static"),
        WITHOUT_CACHE: without_cache,
    }


def main() -> None:
    arguments = common.parser(__doc__, device="auto", repeats=7).parse_args()
    transformers.logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(0)
    prompt_ids = torch.randint(1, VOCAB_SIZE, (BATCH_SIZE, PROMPT_TOKENS), generator=generator)
    lengths = torch.randint(8, PROMPT_TOKENS + 1, (BATCH_SIZE,), generator=generator)
    results: dict[str, dict[str, float]] = {}
    for kind in ("gpt2", "llama"):
        policy = CausalLMPolicy(make_model(kind), make_tokenizer(), device=arguments.device, seed=0)
        for case, ends in ENDS.items():
            runs = candidates(policy, prompt_ids.to(policy.device), lengths.to(policy.device), ends)
            measures = {name: common.per_second(run, policy.device) for name, run in runs.items()}
            rates = common.alternate(measures, arguments.repeats, once={WITHOUT_CACHE})
            other = max(rate for name, rate in rates.items() if name.startswith("transformers"))
            rates["ratio to transformers"] = rates["textgym"] / other
            rates["ratio to no cache"] = rates["textgym"] / rates[WITHOUT_CACHE]
            results[f"{kind}, {case}"] = rates
            print(f"{kind}, {case}")
            for name, value in rates.items():
                print(f"    {name:<32}{value:>12,.2f}" if "ratio" in name else f"    {name:<32}{value:>12,.0f} tokens/s")
    common.write(arguments.out, {"setting": common.setting(policy.device), "floor": FLOOR, "tokens per second": results})


if __name__ == "__main__":
    main()
