"""Every causal LM class of transformers, with a tiny random model: what is sampled, scored and acted is what it says, or it is refused.

Right means: `generate`, `score` and acting on a growing batch of two rows of different lengths agree with transformers' plain pass over
each row alone, to 1e-4 nats.
"""

import warnings

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from textgym.agents import CausalLMPolicy

# What is said to every configuration; `...` in a class's own settings takes a name out.
BASE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
# What is set afterwards wherever a configuration has a number of that name.
ALSO = {"n_embd": 32, "n_layer": 2, "n_head": 4, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
        "head_dim": 8, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "chunk_size": 8, "mamba_chunk_size": 8, "sliding_window": 6, "attention_chunk_size": 6}  # fmt: skip
NEEDED = ("head_dim", "num_experts_per_tok", "n_routed_experts", "num_local_experts", "num_experts")  # of these, also where it has none
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
          "num_key_value_heads": 4}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
          "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
GEMMA_4 = {"num_kv_shared_layers": 0, "layer_types": MIXED, "vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8,
           "global_head_dim": 8, "head_dim": 8}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 16,
          "depth": 1, "num_heads": 4, "out_hidden_size": 32, "embed_dim": 32}  # fmt: skip
SMALL_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                "head_dim": 16, "patch_size": 16}  # fmt: skip
WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_layers": 1,
           "decoder_attention_heads": 4, "decoder_ffn_dim": 32}  # fmt: skip
BYTES = {"hidden_size": 32, "hidden_size_global": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64,
         "num_hidden_layers": 1, "vocab_size": 60, "cross_attn_k": 1}  # fmt: skip
DECODER = {"is_decoder": True}
OWN = {
    "axk1": {**LATENT, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "bailing_hybrid": {**LATENT, "layer_types": ["linear_attention", "full_attention"], "n_group": 2, "topk_group": 1},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "blt": {"patch_in_forward": False, "cross_attn_k": 1, "encoder_config": BYTES, "decoder_config": BYTES, "global_config": BYTES,
            "patcher_config": BYTES,
            "encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": MIXED,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in MIXED},
    },
    "dbrx": {"d_model": 32, "n_layers": 2, "n_heads": 4, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots1": {"n_shared_experts": 1},
    "emu3": {"text_config": BASE, "vocabulary_map": {"<image>": 4},
             "vq_config": {"codebook_size": 16, "embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1],
                           "num_res_blocks": 1, "attn_resolutions": [2], "hidden_size": 32, "num_attention_heads": 2}},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma3": {"text_config": {**BASE, "head_dim": 8, "sliding_window": 6}, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma3n_text": {**GEMMA_4, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4": {"text_config": {**BASE, **GEMMA_4}, "vision_config": SMALL_VISION, "audio_config": None},
    "gemma4_text": GEMMA_4,
    "gemma4_unified": {"text_config": {**BASE, **GEMMA_4}, "audio_config": None,
                       "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 8}},
    "gemma4_unified_assistant": {"text_config": {**BASE, **GEMMA_4}},
    "gemma4_unified_text": GEMMA_4,
    "git": {"vision_config": VISION},
    "gemma4_assistant": {"text_config": {**BASE, **GEMMA_4}},
    "got_ocr2": {"text_config": {**BASE, "model_type": "qwen2"},
                 "vision_config": {**VISION, "output_channels": 16, "global_attn_indexes": [0], "mlp_dim": 32}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6, "num_layers": 2},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LATENT, "num_experts_per_token": 2, "linear_head_dim": 8, "linear_num_heads": 4,
                    "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "minicpm3": {**LATENT, "head_dim": 8},
    "mllama": {"text_config": {**BASE, "cross_attention_layers": [1]},
               "vision_config": {**VISION, "num_global_layers": 1, "attention_heads": 4, "intermediate_layers_indices": [0],
                                 "vision_output_dim": 64}},
    "moss_transcribe_diarize": {"text_config": {**BASE, "model_type": "qwen3"}, "audio_config": WHISPER},
    "nemotron_h": {"num_hidden_layers": ..., "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 8,
                   "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
    "phi4_multimodal": {"audio_config": {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 4,
                                         "ext_pw_out_channel": 32, "nemo_conv_channels": 32},
                        "vision_config": {**VISION, "crop_size": 32}},
    "prophetnet": {"num_hidden_layers": ..., "num_encoder_layers": 1, "num_decoder_layers": 2},
    "qwen4_exp_text": {name: value for name, value in LINEAR.items() if name != "layer_types"},
    "reformer": {"num_hidden_layers": ..., "is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_shape": [8, 8],
                 "axial_pos_embds_dim": [16, 16], "local_attn_chunk_length": 8, "attention_head_size": 8, "feed_forward_size": 32},
    "roc_bert": {"is_decoder": True, "pronunciation_vocab_size": 16, "shape_vocab_size": 16, "shape_embed_dim": 8,
                 "pronunciation_embed_dim": 8},
    "xlnet": {"max_position_embeddings": ..., "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
    "xmod": {"is_decoder": True, "languages": ["en"], "default_language": "en"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2, "num_key_value_heads": 4,
              "attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_d_state": 8,
               "chunk_size": 8, "num_mem_blocks": 1, "attention_head_dim": 16, "num_key_value_heads": 4, "hybrid_layer_ids": [1]},
    **dict.fromkeys(("axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "hy_v4",
                     "longcat_flash", "youtu"), LATENT),
    **dict.fromkeys(("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), LINEAR),
    **dict.fromkeys(("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
                     "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"), DECODER),
}  # fmt: skip

# Classes that cannot be had in tiny form, and what says so; the rest of them are held to one of the two outcomes.
NOT_MADE = {
    "Gemma3nForConditionalGeneration": "timm",
    "Gemma4AssistantForCausalLM": "hidden_size_per_layer_input must be 0",
    "Gemma4UnifiedAssistantForCausalLM": "layer types",
    "MusicgenForCausalLM": "has no attribute 'dropout'",
    "MusicgenMelodyForCausalLM": "has no attribute 'dropout'",
}
REFUSED = {
    "CpmAntForCausalLM": "must be causal",
    "ProphetNetForCausalLM": "must be causal",
    "XLMWithLMHeadModel": "must be causal",
    "XLNetLMHeadModel": "must be causal",
}


def one_kind_per_class():
    """Returns {class name: configuration's name}; of several the one with settings of its own, or for text alone."""
    found = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name not in found or kind in OWN or kind.endswith("_text"):
            found[name] = kind
    return found


KINDS = one_kind_per_class()


def tiny_model(kind):
    own = OWN.get(kind, {})
    config = AutoConfig.for_model(kind, **{name: value for name, value in {**BASE, **own}.items() if value is not ...})
    for name, value in ALSO.items():
        present = vars(config).get(name, ...)
        if name not in own and (type(present) is int or (present is None and name in NEEDED)):
            setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def plain(policy, row):
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :, : policy.vocab_size]
    return logits.float().log_softmax(-1)


def largest_difference(policy):
    prompts = [[5], [7, 8, 9, 10, 11, 12, 0, 13, 14, 6, 5]]  # 0 is the padding token, a token as any other
    generated = policy.generate(prompts, 8, seed=1, num_generations=2)
    scored = policy.score(generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths).log_probs
    differences = []
    for i, completion in enumerate(generated.completion_ids):
        prompt = prompts[i // 2]
        right = plain(policy, prompt + completion)[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion)[:, None])[:, 0]
        differences += [float((found[i, : len(completion)] - right).abs().max()) for found in (generated.log_probs, scored)]
    rows = [[5], [7, 8, 9, 10, 11, 12, 0, 13, 14]]
    for tokens in ((4, 9), (8, 3), (0, 7)):
        ids, mask = np.zeros((2, 16), np.int64), np.zeros((2, 16), np.int8)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        found = policy.log_probs({"input_ids": ids, "attention_mask": mask}, np.array(tokens))
        right = [float(plain(policy, row)[-1, token]) for row, token in zip(rows, tokens, strict=True)]
        differences.append(float(np.abs(found - right).max()))
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
    return max(differences)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_policy_is_right_or_refused(name, tokenizer):
    if name in NOT_MADE:
        with pytest.raises(Exception, match=NOT_MADE[name]):
            tiny_model(KINDS[name])
        return
    model = tiny_model(KINDS[name])
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"`model` .*{REFUSED[name]}|{REFUSED[name]}"):
            CausalLMPolicy(model, tokenizer, device="cpu")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert largest_difference(CausalLMPolicy(model, tokenizer, device="cpu")) < 1e-4


def test_the_exceptions_exist():
    assert (NOT_MADE.keys() | REFUSED.keys()) <= KINDS.keys()
