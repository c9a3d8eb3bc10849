"""Architectures that differ from the three families: in positions, masks, attention, and what happens after the head."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from textgym.agents import CausalLMPolicy
from textgym.agents.common.backbone import Backbone

PROMPTS = ["abc", "hello there", "a", "the cat sat on the mat."]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
ARCHITECTURES = {
    "qwen2": lambda v: Qwen2ForCausalLM(Qwen2Config(vocab_size=v, **SIZES)),
    "qwen3": lambda v: Qwen3ForCausalLM(Qwen3Config(vocab_size=v, **SIZES)),
    "mistral, window of 6": lambda v: MistralForCausalLM(MistralConfig(vocab_size=v, sliding_window=6, **SIZES)),
    "gemma2, window of 6 and capped logits": lambda v: Gemma2ForCausalLM(
        Gemma2Config(vocab_size=v, sliding_window=6, final_logit_softcapping=4.0, **SIZES)
    ),
    "cohere, scaled logits": lambda v: CohereForCausalLM(CohereConfig(vocab_size=v, logit_scale=0.3, **{**SIZES, "pad_token_id": 0})),
    "granite, divided logits": lambda v: GraniteForCausalLM(GraniteConfig(vocab_size=v, logits_scaling=3.0, **SIZES)),
    "bloom, linear biases": lambda v: BloomForCausalLM(
        BloomConfig(vocab_size=v, hidden_size=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    ),
    "opt": lambda v: OPTForCausalLM(
        OPTConfig(vocab_size=v, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
                  word_embed_proj_dim=16, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    ),
    "gptj": lambda v: GPTJForCausalLM(
        GPTJConfig(vocab_size=v, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, bos_token_id=None, eos_token_id=None)
    ),
    "gpt2, eager attention": lambda v: GPT2LMHeadModel(
        GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None,
                   attn_implementation="eager")
    ),
}  # fmt: skip


class _OddHead(GPT2LMHeadModel):
    """Does to its logits what no attribute of its configuration tells."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits - 0.1 * outputs.logits**2
        return outputs


ARCHITECTURES["logits of their own"] = lambda v: _OddHead(
    GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None)
)


@pytest.fixture(params=ARCHITECTURES)
def policy(request, tokenizer, device):
    model = ARCHITECTURES[request.param](len(tokenizer) + 2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return CausalLMPolicy(model, tokenizer, device=device)


def test_generation_scoring_acting_and_a_plain_forward_agree(policy):
    generated = policy.generate(PROMPTS, 20, seed=1, num_generations=2)
    rows = generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths
    scores = policy.score(*rows, hidden=True)
    torch.testing.assert_close(scores.log_probs, generated.log_probs, atol=1e-4, rtol=0)
    assert generated.log_probs[generated.completion_mask].std() > 0.2
    for i in range(8):
        p, n = int(generated.prompt_lengths[i]), int(generated.lengths[i])
        row = torch.cat((generated.prompt_ids[i, generated.prompt_ids.shape[1] - p :], generated.ids[i, :n]))
        with torch.no_grad():
            outputs = policy.model(row[None], output_hidden_states=True)
        expected = outputs.logits[0, p - 1 : -1, : policy.vocab_size].float().log_softmax(-1).gather(-1, row[p:, None])[:, 0]
        torch.testing.assert_close(scores.log_probs[i, :n], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.hidden[i, :n], outputs.hidden_states[-1][0, p - 1 : -1], atol=1e-4, rtol=1e-4)
    # Token by token, as an environment is stepped.
    width = generated.prompt_ids.shape[1]
    ids = torch.cat((generated.prompt_ids, generated.ids), 1).cpu().numpy()
    for t in range(4):
        mask = torch.arange(width).flip(0) < generated.prompt_lengths.cpu()[:, None]
        shown = torch.arange(20).expand(8, -1) < t
        observation = {"input_ids": ids, "attention_mask": torch.cat((mask, shown), 1).numpy()}
        steps = torch.as_tensor(policy.log_probs(observation, ids[:, width + t]))
        alive = generated.lengths.cpu() > t
        torch.testing.assert_close(steps[alive], generated.log_probs[:, t].cpu()[alive], atol=1e-4, rtol=0)


def test_the_scaling_after_the_head_is_found(tokenizer):
    exact = {name: Backbone(make(len(tokenizer)), len(tokenizer)).exact_head for name, make in ARCHITECTURES.items()}
    assert exact == {name: name != "logits of their own" for name in ARCHITECTURES}


def test_windows_and_biases_get_masks_of_their_own(tokenizer):
    dense = {name: Backbone(make(len(tokenizer)), len(tokenizer)).dense_mask for name, make in ARCHITECTURES.items()}
    assert [name for name, value in dense.items() if not value] == [
        "mistral, window of 6",
        "gemma2, window of 6 and capped logits",
        "bloom, linear biases",
    ]


def test_too_few_outputs_are_refused(tiny_model, tokenizer, model_type):
    with pytest.raises(ValueError, match=r"`model` has 45 outputs, fewer than the 46 tokens of `tokenizer`"):
        CausalLMPolicy(tiny_model(model_type, len(tokenizer) - 1), tokenizer)


def test_something_else_than_a_language_model_is_refused(tokenizer):
    with pytest.raises(ValueError, match="`model` must be a transformers causal LM or a peft model around one, got Linear"):
        CausalLMPolicy(torch.nn.Linear(2, 2), tokenizer)
