"""Fixtures that all tests share: the device, an offline tokenizer, and tiny random models of the three families."""

import os

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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


def tiny_model(
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


@pytest.fixture(params=MODEL_TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    """Runs a test for learned positions (GPT-2), rotary ones with grouped heads (Llama) and partly rotary ones (GPT-NeoX)."""
    return str(request.param)


@pytest.fixture
def model(model_type: str, tokenizer: PreTrainedTokenizerFast, device: str) -> PreTrainedModel:
    """A tiny random model of each family, with three outputs more than the tokenizer has tokens."""
    return tiny_model(model_type, len(tokenizer) + 3).to(device)
