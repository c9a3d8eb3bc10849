"""Fixtures that all tests share: the device, an offline tokenizer, tiny random models of the three families, and the pages of docs/."""

import contextlib
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)

MODEL_TYPES = ("gpt2", "llama", "gpt_neox")


@pytest.fixture(scope="session")
def device() -> str:
    """Where tests run models; set TEXTGYM_TEST_DEVICE=cuda to run them on a GPU."""
    return os.environ.get("TEXTGYM_TEST_DEVICE", "cpu")


def character_tokenizer(characters: str = "abcdefghijklmnopqrstuvwxyz .,!?'0123456789\n") -> PreTrainedTokenizerFast:
    """One token per character; ids 0, 1, 2 are <pad>, <bos>, <eos>. It adds no special tokens to a text."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def make_tiny_model(
    model_type: str, vocab_size: int, seed: int = 0, scale: float = 0.4, positions: int = 128, dropout: float = 0.0
) -> PreTrainedModel:
    """A random two-layer model of width 32. The weights are large, so that its distributions are far from uniform."""
    if model_type == "gpt2":
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=positions,
            n_embd=32,
            n_layer=2,
            n_head=4,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
        model: PreTrainedModel = GPT2LMHeadModel(config)
    elif model_type == "llama":
        config = LlamaConfig(
            vocab_size=vocab_size,
            max_position_embeddings=positions,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)
    else:
        config = GPTNeoXConfig(
            vocab_size=vocab_size,
            max_position_embeddings=positions,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            attention_dropout=dropout,
            hidden_dropout=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = GPTNeoXForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, scale, generator=generator)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """See `character_tokenizer`."""
    return character_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words carry their space, a text has one more before its first word, and what has no piece is spelt in bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abemoti"]
    merges = [("t", "i"), ("m", "e"), ("ti", "me"), ("▁", "a"), ("▁", "time"), ("▁", "to")]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *map("".join, merges)])}
    merges.insert(0, ("t", "o"))
    vocabulary["to"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(params=MODEL_TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    """Runs a test for learned positions (GPT-2), rotary ones with grouped heads (Llama) and partly rotary ones (GPT-NeoX)."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """The function `make_tiny_model`, for tests that need other sizes."""
    return make_tiny_model


@pytest.fixture
def model(model_type: str, tokenizer: PreTrainedTokenizerFast, device: str) -> PreTrainedModel:
    """A tiny random model of each family, with three outputs more than the tokenizer has tokens."""
    return make_tiny_model(model_type, len(tokenizer) + 3).to(device)


class TabularPolicy:
    """A numpy policy (textgym.types.TokenPolicy): random logits that are a function of the tokens so far, without any optional method.

    `calls` and `rows` count what it was asked for.
    """

    def __init__(self, seed: int, vocab_size: int = 12, temperature: float = 1.0) -> None:
        self.seed, self.vocab_size, self.temperature = seed, vocab_size, temperature
        self.calls = self.rows = 0

    def distribution(self, prefix: Sequence[int]) -> np.ndarray:
        """Log-probs of all tokens after `prefix`."""
        logits = np.random.default_rng([self.seed, *prefix]).normal(size=self.vocab_size) / self.temperature
        return logits - np.log(np.exp(logits).sum())

    def prefixes(self, observations: Mapping[str, np.ndarray]) -> list[list[int]]:
        """The tokens that each observation shows."""
        both = zip(observations["input_ids"], observations["attention_mask"], strict=True)
        return [ids[mask.astype(bool)].tolist() for ids, mask in both]

    def log_probs(self, observations: Mapping[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """See `TokenPolicy`."""
        self.calls, self.rows = self.calls + 1, self.rows + len(actions)
        return np.array([self.distribution(prefix)[action] for prefix, action in zip(self.prefixes(observations), actions, strict=True)])


class SequencePolicy(TabularPolicy):
    """A tabular policy with every optional method; `sequence_calls` counts whole passes."""

    sequence_calls = 0

    def _whole(self, prompt_ids: Any, prompt_lengths: Any, actions: Any, lengths: Any, value: Any) -> np.ndarray:
        self.sequence_calls += 1
        result = np.zeros(actions.shape)
        for i, prompt_length in enumerate(prompt_lengths):
            prefix = prompt_ids[i, len(prompt_ids[i]) - prompt_length :].tolist()
            for t in range(lengths[i]):
                result[i, t] = value([*prefix, *actions[i, :t].tolist()], actions[i, t])
        return result

    def sequence_log_probs(self, prompt_ids: Any, prompt_lengths: Any, actions: Any, lengths: Any) -> np.ndarray:
        """See `TokenPolicy`."""
        return self._whole(prompt_ids, prompt_lengths, actions, lengths, lambda prefix, action: self.distribution(prefix)[action])

    def paired_log_probs(self, reference: Any, observations: Any, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `TokenPolicy`: the reference at this policy's temperature."""
        return self.log_probs(observations, actions), self._tempered(reference).log_probs(observations, actions)

    def paired_sequence_log_probs(self, reference: Any, *sequences: Any) -> tuple[np.ndarray, np.ndarray]:
        """See `TokenPolicy`: the reference at this policy's temperature."""
        return self.sequence_log_probs(*sequences), self._tempered(reference).sequence_log_probs(*sequences)

    def _tempered(self, reference: Any) -> "SequencePolicy":
        return SequencePolicy(reference.seed, reference.vocab_size, self.temperature)

    def _exact(self, reference: Any, prefix: Any) -> float:
        own, other = self.distribution(prefix), self._tempered(reference).distribution(prefix)
        return float(np.sum(np.exp(own) * (own - other)))

    def full_kl(self, reference: Any, observations: Any) -> np.ndarray:
        """See `TokenPolicy`."""
        return np.array([self._exact(reference, prefix) for prefix in self.prefixes(observations)])

    def sequence_full_kl(self, reference: Any, *sequences: Any) -> np.ndarray:
        """See `TokenPolicy`."""
        return self._whole(*sequences, lambda prefix, _: self._exact(reference, prefix))


@pytest.fixture(scope="session")
def tabular_policy() -> type[TabularPolicy]:
    """The class of numpy policies that have `log_probs` only."""
    return TabularPolicy


@pytest.fixture(scope="session")
def sequence_policy() -> type[SequencePolicy]:
    """The class of numpy policies that have every optional method of the protocol."""
    return SequencePolicy


class DocsPage:
    """A page of docs/ whose Python runs as it is printed."""

    _BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    _PRINTED = re.compile(r"^\s*print\(.*\)\s+# (.*)$", re.MULTILINE)

    def __init__(self, name: str) -> None:
        self.path = Path(__file__).parents[1] / "docs" / name
        self.text = self.path.read_text(encoding="utf-8")
        self.snippets: list[str] = self._BLOCK.findall(self.text)

    def printed(self, snippet: str) -> list[str]:
        """What the comments after the `print`s of a snippet say."""
        found: list[str] = self._PRINTED.findall(snippet)
        return found

    def run(self) -> dict[str, Any]:
        """Runs the snippets one after the other, each of which must print what it says; returns the names that are there in the end."""
        names: dict[str, Any] = {}
        assert self.snippets
        for snippet in self.snippets:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(snippet, str(self.path), "exec"), names)
            assert output.getvalue().splitlines() == self.printed(snippet), snippet
        return names


@pytest.fixture(scope="session")
def docs_page() -> type[DocsPage]:
    """The class of pages: `docs_page("rewards.md").run()`."""
    return DocsPage
