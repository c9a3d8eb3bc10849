"""What a policy assumes of a model is tried when it is made: heads that scale, positions, windows, caches, tables and rotary turns."""

import copy
import warnings

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from textgym.agents import KTO, CausalLMPolicy
from textgym.agents.common import trial
from textgym.agents.common.layout import lay_out

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 0, 13, 14]]  # 0 is the padding token, a token as any other


def make(kind, tokenizer, **settings):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**SIZES, **settings})).eval()


def randomise(model, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, scale, generator=generator)
    return model


def plain(policy, prompt, completion):
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, :, : policy.vocab_size]
    return logits.float().log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion)[:, None])[:, 0]


def rows_of(prompts, completions):
    ids = torch.tensor([[0] * (max(map(len, prompts)) - len(row)) + row for row in prompts])
    steps = max(map(len, completions))
    padded = torch.tensor([row + [0] * (steps - len(row)) for row in completions])
    return ids, torch.tensor([len(row) for row in prompts]), padded, torch.tensor([len(row) for row in completions])


def check_generation(policy, atol=1e-4):
    generated = policy.generate(PROMPTS, 8, seed=1, num_generations=2)
    scored = policy.score(generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths).log_probs
    torch.testing.assert_close(scored, generated.log_probs, atol=atol, rtol=0)
    for i, completion in enumerate(generated.completion_ids):
        torch.testing.assert_close(generated.log_probs[i, : len(completion)], plain(policy, PROMPTS[i // 2], completion), atol=atol, rtol=0)


SCALED = {
    "cohere": {},
    "cohere2": {"head_dim": 8},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 7.0},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "nanochat": {"head_dim": 8},
    "minicpm3": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
                 "num_key_value_heads": 4, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("weights", ["new", "zero", "trained"])
@pytest.mark.parametrize("kind", SCALED)
def test_what_a_model_does_behind_its_head_does_not_depend_on_its_weights(kind, weights, tokenizer):
    model = make(kind, tokenizer, **SCALED[kind])
    if weights == "zero":
        with torch.no_grad():
            model.get_output_embeddings().weight.zero_()
    elif weights == "trained":
        randomise(model)
        with torch.no_grad():
            model.get_input_embeddings().weight[0] = 0.0
    policy = CausalLMPolicy(model, tokenizer, device="cpu")
    randomise(model, 0.5)  # trained weights, loaded after the policy was made
    prompt, completion = [1, 4, 5], [6, 7, 2]
    scores = policy.score(*rows_of([prompt], [completion])).log_probs[0]
    torch.testing.assert_close(scores, plain(policy, prompt, completion), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("weights", ["random", "zero"])
def test_positions_that_begin_behind_the_padding_id(weights, tokenizer):
    model = randomise(make("roberta", tokenizer, is_decoder=True))
    if weights == "zero":  # so far nothing looks at anything
        with torch.no_grad():
            for layer in model.roberta.encoder.layer:
                layer.attention.output.dense.weight.zero_()
            model.roberta.embeddings.position_embeddings.weight.zero_()
    policy = CausalLMPolicy(model, tokenizer, device="cpu")
    randomise(model)
    with pytest.warns(UserWarning, match=r"RobertaForCausalLM gives other log-probs with a cache than in a plain pass: .* right and slow"):
        check_generation(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        check_generation(policy)


def test_a_window_that_no_cache_knows_of_is_kept_when_acting(tokenizer):
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=len(tokenizer), hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=256, max_position_embeddings=512, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    policy = CausalLMPolicy(randomise(AutoModelForCausalLM.from_config(config)), tokenizer, device="cpu")
    rows = [[5, 6], [7 + i % 30 for i in range(300)]]
    for _ in range(3):
        ids, mask = np.zeros((2, 320), np.int64), np.zeros((2, 320), np.int8)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        found = policy.log_probs({"input_ids": ids, "attention_mask": mask}, np.array([9, 9]))
        np.testing.assert_allclose(found, [plain(policy, row, [9]).item() for row in rows], atol=1e-4)
        rows = [[*row, 9] for row in rows]


@pytest.mark.parametrize("kind", ["bert", "xlm", "cpmant"])
def test_models_that_are_not_causal_are_refused(kind, tokenizer):
    settings = {} if kind == "cpmant" else {"n_heads": 4, "n_layers": 2, "emb_dim": 32} if kind == "xlm" else {}
    with pytest.raises(ValueError, match=r"`model` must be causal, but in .* later tokens change the log-probs of earlier ones"):
        CausalLMPolicy(randomise(make(kind, tokenizer, **settings)), tokenizer, device="cpu")


TABLES = {
    "opt": (32, {"ffn_dim": 64, "max_position_embeddings": 32, "word_embed_proj_dim": 32}),
    "ctrl": (32, {"n_embd": 32, "dff": 64, "n_positions": 32, "n_layer": 2, "n_head": 4}),
    "codegen": (32, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_ctx": 32, "rotary_dim": 4}),
    "gptj": (32, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4}),
    "xglm": (32, {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 32}),
    "roberta": (31, {"is_decoder": True, "max_position_embeddings": 32}),  # the first position is that behind the padding id, 0
    "bart": (32, {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_position_embeddings": 32}),
    "llama": (None, {}),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_positions_are_found_wherever_they_are(kind, tokenizer):
    limit, settings = TABLES[kind]
    settings = {name: value for name, value in {**SIZES, **settings}.items() if name in settings or kind in ("llama", "roberta", "opt")}
    config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), "pad_token_id": 0, **settings})
    policy = CausalLMPolicy(AutoModelForCausalLM.from_config(config), tokenizer, device="cpu")
    assert policy.backbone.max_positions == limit
    if limit is not None:
        with pytest.raises(ValueError, match=rf"Generation needs {limit + 1} positions .* but the model has {limit}"):
            policy.generate([[5] * 20], limit - 19)


def test_a_short_table_whose_first_entries_are_not_for_tokens_is_found(tokenizer):
    policy = CausalLMPolicy(make("roberta", tokenizer, is_decoder=True, max_position_embeddings=11), tokenizer, device="cpu")
    assert policy.backbone.max_positions == 10
    with pytest.raises(ValueError, match=r"Generation needs 12 positions .* but the model has 10"):
        policy.generate([[5] * 3], 9)


def test_kto_leaves_out_mismatched_pairs_that_do_not_fit(tokenizer):
    policy = CausalLMPolicy(make("opt", tokenizer, **TABLES["opt"][1]), tokenizer, device="cpu")
    examples = [
        {"prompt": "a" * 25, "completion": "good", "label": True},
        {"prompt": "a", "completion": "b" * 25, "label": False},
    ]
    assert KTO(policy, examples, seed=0).learn().num_timesteps > 0


def test_beyond_the_trained_positions_one_warning(tokenizer):
    policy = CausalLMPolicy(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **{**SIZES, "max_position_embeddings": 16})), tokenizer,
                            device="cpu")  # fmt: skip
    with pytest.warns(UserWarning, match=r"needs 20 positions .* but the model was trained on 0 to 15") as heard:
        policy.generate([[5] * 10], 10)
        policy.generate([[5] * 10], 10)
    assert len(heard) == 1


def rotary(kind, tokenizer):
    rope = {"rope_type": kind, "rope_theta": 1e4}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}
        config = Phi3Config(
            vocab_size=len(tokenizer), **SIZES, original_max_position_embeddings=16, rope_parameters=rope, attn_implementation="sdpa"
        )
        return CausalLMPolicy(randomise(Phi3ForCausalLM(config)), tokenizer, device="cpu")
    config = LlamaConfig(vocab_size=len(tokenizer), **{**SIZES, "max_position_embeddings": 16}, rope_parameters=rope | {"factor": 4.0})
    return CausalLMPolicy(randomise(LlamaForCausalLM(config)), tokenizer, device="cpu")


@pytest.mark.filterwarnings("ignore:.*needs .* positions", "ignore:.*does not read a row", "ignore:.*rotary frequencies")
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_frequencies_of_a_row_do_not_depend_on_its_neighbours(kind, tokenizer):
    policy = rotary(kind, tokenizer)
    short, long = ([1, 4, 5], [6, 7, 2]), ([1] + [4, 5] * 12, [6, 7, 2])
    # Every state is read as if its row ended there, which is what an environment asks for one token at a time.
    right = [[plain_state(policy, prompt + completion[:t])[completion[t]] for t in range(3)] for prompt, completion in (short, long)]
    for _ in range(2):  # also after a call that was longer
        both = policy.score(*rows_of([short[0], long[0]], [short[1], long[1]])).log_probs
        torch.testing.assert_close(both, torch.tensor(right), atol=1e-4, rtol=0)
    crossing = policy.generate([[5] * 12, [7, 8]], 10, seed=0)
    scored = policy.score(crossing.prompt_ids, crossing.prompt_lengths, crossing.ids, crossing.lengths).log_probs
    torch.testing.assert_close(scored, crossing.log_probs, atol=1e-4, rtol=0)
    row = crossing.completion_ids[0]
    expected = [plain_state(policy, [5] * 12 + row[:t])[token] for t, token in enumerate(row)]
    torch.testing.assert_close(scored[0, : len(row)], torch.tensor(expected), atol=1e-4, rtol=0)


def plain_state(policy, ids):
    fresh = copy.deepcopy(policy.model)  # transformers keeps the frequencies of the longest call so far
    with torch.no_grad():
        fresh(input_ids=torch.tensor([[1]]))
        return fresh(input_ids=torch.tensor([ids])).logits[0, -1, : policy.vocab_size].log_softmax(-1).tolist()


def test_nothing_is_left_behind(tokenizer):
    model = randomise(make("mistral", tokenizer, sliding_window=6))
    before, state = copy.deepcopy(model), torch.get_rng_state()
    trial._outcomes.clear()
    policy = CausalLMPolicy(model, tokenizer, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    for module, old in zip(model.modules(), before.modules(), strict=True):
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert vars(module).keys() == vars(old).keys()
    for parameter, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, old) and parameter.grad is None and parameter.requires_grad
    assert policy._acting._cache is None


def test_what_was_found_is_taken_over(tokenizer, tmp_path, monkeypatch):
    tried = []
    original = trial._tried
    monkeypatch.setattr(trial, "_tried", lambda backbone: (tried.append(backbone), original(backbone))[1])
    trial._outcomes.clear()
    policy = CausalLMPolicy(make("mistral", tokenizer, sliding_window=6), tokenizer, device="cpu")
    assert len(tried) == 1
    assert policy.reference().backbone.ways == policy.backbone.ways
    policy.save_pretrained(tmp_path)
    assert CausalLMPolicy.from_pretrained(tmp_path, device="cpu").backbone.ways == policy.backbone.ways
    assert len(tried) == 1
    CausalLMPolicy(make("mistral", tokenizer, sliding_window=None), tokenizer, device="cpu")
    assert len(tried) == 2


def test_a_hook_of_the_users_is_tried_anew_and_heard(tokenizer):
    model = randomise(
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=2))
    )
    model.transformer.h[0].register_forward_hook(lambda module, inputs, output: output * 1.5)
    check_generation(CausalLMPolicy(model, tokenizer, device="cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_half_precision_loses_no_way(kind, dtype, tokenizer):
    policy = CausalLMPolicy(randomise(make(kind, tokenizer)).to(dtype), tokenizer, device="cpu")
    assert policy.backbone.ways.decoding == "ready-made masks" and policy.backbone.dense_mask
    assert (policy.backbone.fast_trunk is not None) == (kind == "llama")


def test_rows_are_read_as_alone_in_every_batching(tokenizer):
    policy = CausalLMPolicy(randomise(make("mistral", tokenizer, sliding_window=6)), tokenizer, device="cpu")
    rows = rows_of([[5], [7, 8, 9], [4, 3, 6]], [[6, 7], [9], [8, 2]])
    layout = lay_out(*rows)
    expected = policy.backbone.predictors(layout)[0]
    for batching in ("by length", "alone"):
        policy.backbone.ways = policy.backbone.ways.__class__(batching=batching, decoding="padding", dense_mask=False)
        policy.backbone.forget_warnings()
        with pytest.warns(UserWarning, match="does not read a row beside"):
            torch.testing.assert_close(policy.backbone.predictors(layout)[0], expected, atol=1e-5, rtol=1e-5)
