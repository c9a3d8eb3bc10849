"""The small language model that agents are certified with. Importing this module loads torch and transformers."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from textgym.exact.tree import TokenTree


def tiny_lm(tree: TokenTree, *, width: int = 32, layers: int = 2, seed: int = 0) -> GPT2LMHeadModel:
    """Returns a GPT-2 over the vocabulary of `tree` whose untrained distribution is far from uniform: it is its own reference.

    Args:
        tree: gives the vocabulary, EOS and the longest sequence.
        width: of the residual stream, a multiple of 16 (heads of 16).
        layers: transformer blocks.
        seed: of the weights; torch's global generator is left as it was.
    """
    config = GPT2Config(
        vocab_size=tree.vocab_size,
        n_positions=tree.max_prompt_tokens + tree.horizon,
        n_embd=width,
        n_layer=layers,
        n_head=width // 16,
        bos_token_id=None,
        eos_token_id=tree.eos_token_id,
        # Ten times GPT-2's own: the logits at the start have a standard deviation near 1.
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    model.eval()
    return model
