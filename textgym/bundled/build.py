"""Makes everything that ships in `textgym/bundled/data`: tokenizer, prompts, language model, reward model and a manifest of hashes.

    python -m textgym.bundled.build --seed 0 --out textgym/bundled/data

All text comes from the grammar of this package, all randomness from the seed: on one machine and one thread two builds are bit-identical.
Takes four to five minutes on one CPU core.
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from textgym.bundled.build_reward_model import compare, measure, score_all, shift_scores, train_reward_model
from textgym.bundled.grammar import PUNCTUATION, sample_review, to_text, vocabulary
from textgym.bundled.true_reward import judge, true_reward

EOS, PAD, UNK = "<eos>", "<pad>", "<unk>"
PROMPT_WORDS = (2, 8)  # shortest and longest prompt
POSITIONS = 192  # of both models: prompt and completion together
WHOLE_REVIEW = 48  # tokens: completions for the reward model's comparisons come to their end
EPISODE = 24  # tokens: completions whose mean score is zero
MODEL_BATCH = 16  # rows of POSITIONS tokens per optimiser step of the language model


@dataclass(frozen=True)
class Scale:
    """How much is built. The defaults are what ships; tests build a reduced version.

    Attributes:
        train_prompts: prompts to learn from.
        eval_prompts: held-out prompts; none of them is a train prompt.
        model_steps: optimiser steps of the language model.
        reward_pairs: comparisons the reward model is trained on.
        reward_epochs: passes over them.
        eval_pairs: held-out comparisons its accuracy is measured on.
    """

    train_prompts: int = 200
    eval_prompts: int = 50
    model_steps: int = 1500
    reward_pairs: int = 8000
    reward_epochs: int = 8
    eval_pairs: int = 2000


def build_tokenizer() -> Tokenizer:
    """Returns a word-level tokenizer over the grammar's words.

    Words carry their leading space (`" film"`), punctuation has none, so that ids decode by plain concatenation and the text of a prompt
    followed by the text of its completion is the text of both. Every id sequence without special tokens survives decoding and encoding.
    """
    tokens = [EOS, PAD, UNK] + [word if word in PUNCTUATION else " " + word for word in vocabulary()]
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNK))
    spaced_out = [normalizers.Replace(f" {mark}", mark) for mark in sorted(PUNCTUATION)]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Prepend(" "), *spaced_out]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[.,!?]| ?[^\s.,!?]+"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([EOS, PAD, UNK])
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> Any:
    """Returns the tokenizer as transformers' object."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNK, padding_side="left", model_max_length=POSITIONS
    )


def sample_prompt(rng: random.Random) -> tuple[str, str]:
    """Samples a review and cuts it within its first sentence: returns the beginning and the rest, which starts with a space or a mark."""
    words = sample_review(rng)
    first_stop = next(position for position, word in enumerate(words) if word in PUNCTUATION and word != ",")
    cut = rng.randint(PROMPT_WORDS[0], min(PROMPT_WORDS[1], first_stop - 1))
    if words[cut - 1] == ",":
        cut -= 1
    prompt, review = to_text(words[:cut]), to_text(words)
    return prompt, review[len(prompt) :]


def build_prompts(rng: random.Random, counts: Sequence[int]) -> list[list[dict[str, str]]]:
    """Returns one list of rows `{"prompt", "reference"}` per count; no prompt occurs twice in all of them, and none has an opinion yet."""
    rows: dict[str, str] = {}
    while len(rows) < sum(counts):
        prompt, reference = sample_prompt(rng)
        if judge(prompt).sentiment == 0:
            rows.setdefault(prompt, reference)
    table = [{"prompt": prompt, "reference": reference} for prompt, reference in rows.items()]
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [table[end - count : end] for end, count in zip(ends, counts, strict=True)]


def write_json_lines(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def training_rows(tokenizer: Tokenizer, rng: random.Random, rows: int, length: int) -> npt.NDArray[np.int64]:
    """Returns (rows, length) ids: reviews one after the other, each closed by EOS; every row begins with the beginning of a review."""
    eos = tokenizer.get_vocab()[EOS]
    table = np.empty((rows, length), dtype=np.int64)
    for row in table:
        ids: list[int] = []
        while len(ids) < length:
            ids += [*tokenizer.encode(to_text(sample_review(rng))).ids, eos]
        row[:] = ids[:length]
    return table


def train_model(tokenizer: Tokenizer, rng: random.Random, steps: int) -> Any:
    """Trains the language model on fresh reviews: next-token cross-entropy, AdamW, cosine schedule."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    eos, pad = tokenizer.get_vocab()[EOS], tokenizer.get_vocab()[PAD]
    shape: dict[str, Any] = {"n_positions": POSITIONS, "n_embd": 80, "n_layer": 2, "n_head": 4}
    no_dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=tokenizer.get_vocab_size(), bos_token_id=eos, eos_token_id=eos, pad_token_id=pad, **shape, **no_dropout)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=min(0.1, 2 / steps + 0.05))
    for step in range(steps):
        ids = torch.from_numpy(training_rows(tokenizer, rng, MODEL_BATCH, POSITIONS))
        logits = model(input_ids=ids).logits[:, :-1]  # (rows, POSITIONS - 1, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"language model: step {step + 1}/{steps}, {loss.item():.3f} nats per token", flush=True)
    return model.eval()


def sample_completions(model: Any, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Samples one completion per prompt from the model's own distribution, decoded without special tokens."""
    import torch

    eos, pad = tokenizer.get_vocab()[EOS], tokenizer.get_vocab()[PAD]
    plain: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "do_sample": True, "pad_token_id": pad, "eos_token_id": eos}
    texts = []
    for start in range(0, len(prompts), 256):
        encoded = [tokenizer.encode(prompt).ids for prompt in prompts[start : start + 256]]
        width = max(map(len, encoded))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **plain)
        texts += tokenizer.decode_batch(output[:, width:].tolist(), skip_special_tokens=True)
    return texts


def build(out: Path, seed: int, scale: Scale) -> dict[str, Any]:
    """Builds everything into the folder `out` and returns the manifest, which it writes there too."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # sums split over threads would round differently from machine to machine
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    train, held_out = build_prompts(random.Random(f"{seed} prompts"), (scale.train_prompts, scale.eval_prompts))
    write_json_lines(train, out / "prompts-train.jsonl")
    write_json_lines(held_out, out / "prompts-eval.jsonl")

    torch.manual_seed(seed)
    model = train_model(tokenizer, random.Random(f"{seed} reviews"), scale.model_steps)
    save(model, tokenizer, out / "model")

    torch.manual_seed(seed + 1)
    prompts = [row["prompt"] for row in train]
    reward_model, measured = build_reward_model(model, tokenizer, prompts, seed, scale)
    save(reward_model, tokenizer, out / "reward-model")
    measured["true_reward_of_references"] = float(np.mean(true_reward(prompts, [row["reference"] for row in train])))

    manifest = {"seed": seed, "scale": vars(scale), "measured": measured, "files": file_hashes(out)}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def build_reward_model(model: Any, tokenizer: Tokenizer, prompts: Sequence[str], seed: int, scale: Scale) -> tuple[Any, dict[str, float]]:
    """Trains the reward model on comparisons of the model's own completions and measures both models.

    Scores are shifted to mean zero on the model's completions of `prompts`.
    """
    beginnings = build_prompts(random.Random(f"{seed} comparisons"), (scale.reward_pairs + scale.eval_pairs,))[0]
    asked = [row["prompt"] for row in beginnings]
    sides = [sample_completions(model, tokenizer, asked, WHOLE_REVIEW) for _ in range(2)]
    comparisons, held_out = compare(asked, sides, np.random.default_rng(seed)).split(scale.reward_pairs)
    reward_model = train_reward_model(tokenizer, comparisons, scale.reward_epochs, POSITIONS)

    asked = [*prompts] * 5
    completions = sample_completions(model, tokenizer, asked, EPISODE)
    reviews = [prompt + completion for prompt, completion in zip(asked, completions, strict=True)]
    shift_scores(reward_model, -float(np.mean(score_all(reward_model, tokenizer, reviews))))
    scores = score_all(reward_model, tokenizer, reviews)
    true = true_reward(asked, completions)
    measured = {f"reward_model_{name}": value for name, value in measure(reward_model, tokenizer, held_out).items()}
    measured |= {"score_mean": float(np.mean(scores)), "score_std": float(np.std(scores))}
    return reward_model, measured | {"true_reward_mean": float(np.mean(true)), "true_reward_std": float(np.std(true))}


def save(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Saves a model and the tokenizer into one folder, as `from_pretrained` reads it."""
    model.save_pretrained(folder)
    wrap_tokenizer(tokenizer).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def file_hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file under `folder` but the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m textgym.bundled.build", description="Builds the bundled model, prompts and rewards.")
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder to write (default: the package's data)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    manifest = build(options.out, options.seed, Scale())
    for name, value in manifest["measured"].items():
        print(f"{name:36} {value:7.3f}")
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 1e6:.2f} MB in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
