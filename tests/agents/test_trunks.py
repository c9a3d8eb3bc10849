"""The package's own trunks compute what transformers' forward computes, and less of it."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from textgym.agents import CausalLMPolicy
from textgym.agents.common.layout import lay_out
from textgym.agents.common.trunks import find_trunk
from textgym.agents.common.trunks.plans import make_plan
from textgym.agents.common.value_heads import ValueModel

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
KINDS = {
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=None),
    "gpt2, exact gelu": lambda v: GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=2, n_positions=128, activation_function="gelu"),
    "llama": lambda v: LlamaConfig(vocab_size=v, num_key_value_heads=4, **SIZES),
    "llama, grouped, biased": lambda v: LlamaConfig(vocab_size=v, num_key_value_heads=2, attention_bias=True, mlp_bias=True, **SIZES),
    "llama 3 positions": lambda v: LlamaConfig(
        vocab_size=v,
        num_key_value_heads=2,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        **SIZES,
    ),
    "mistral": lambda v: MistralConfig(vocab_size=v, num_key_value_heads=2, sliding_window=None, head_dim=8, **SIZES),
    "qwen2": lambda v: Qwen2Config(vocab_size=v, num_key_value_heads=2, **SIZES),
    "qwen3": lambda v: Qwen3Config(vocab_size=v, num_key_value_heads=2, head_dim=16, **SIZES),
}
PROMPTS = ["abc", "hello there", "a", "the cat sat on the mat."]


def make_model(kind: str, vocab_size: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model with logits that differ; norms and biases away from 1 and 0, so that one that is left out is seen."""
    torch.manual_seed(0)
    config = KINDS[kind](vocab_size)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=KINDS)
def policy(request, tokenizer, device):
    return CausalLMPolicy(make_model(request.param, len(tokenizer)), tokenizer, device=device, seed=0)


def through_transformers(policy: CausalLMPolicy) -> CausalLMPolicy:
    """The same policy, run by transformers' own forward."""
    other = policy.reference()
    other.requires_grad_(True)
    other.frozen = False
    other.backbone._fast_trunk = None
    return other


def ragged(policy, repeats: int):
    """Completions of very different lengths, `repeats` of each prompt."""
    generated = policy.generate(PROMPTS, 20, num_generations=repeats, seed=1)
    lengths = torch.randint(1, 21, generated.lengths.shape, generator=torch.Generator().manual_seed(2)).to(generated.lengths.device)
    return generated.prompt_ids, generated.prompt_lengths, generated.ids, lengths


def score(policy, rows):
    """Log-probs and entropies, and the gradients of a function of both."""
    policy.zero_grad()
    scores = policy.score(*rows, entropy=True, hidden=True)
    weights = torch.linspace(-1, 1, scores.log_probs.numel(), device=policy.device).view_as(scores.log_probs)
    (scores.log_probs * weights + 0.3 * scores.entropy).sum().backward()
    return scores, {name: parameter.grad.clone() for name, parameter in policy.model.named_parameters()}


@pytest.mark.parametrize("repeats", [1, 5])
def test_scores_and_gradients_are_those_of_transformers(policy, repeats):
    assert policy.backbone.fast_trunk is not None
    rows = ragged(policy, repeats)
    scores, gradients = score(policy, rows)
    expected, expected_gradients = score(through_transformers(policy), rows)
    for name in ("log_probs", "entropy", "hidden"):
        torch.testing.assert_close(getattr(scores, name), getattr(expected, name), atol=2e-5, rtol=1e-4)
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(gradients[name] / scale, gradient / scale, atol=2e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8, "temperature": 1.3}])
@pytest.mark.parametrize("size", [None, 3])
def test_completions_are_those_of_transformers(policy, settings, size):
    generated = policy.generate(PROMPTS, 24, num_generations=3, seed=3, max_batch_size=size, **settings)
    expected = through_transformers(policy).generate(PROMPTS, 24, num_generations=3, seed=3, **settings)
    assert torch.equal(generated.ids, expected.ids)
    torch.testing.assert_close(generated.log_probs, expected.log_probs, atol=5e-5, rtol=0)


def test_greedy_completions_are_those_of_generate(policy):
    generated = policy.generate(["hello there"], 24, temperature=0)
    ids = generated.prompt_ids
    expected = policy.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0)
    length = int(generated.lengths[0])
    assert generated.completion_ids[0] == expected[0, ids.shape[1] : ids.shape[1] + length].tolist()


def test_a_separate_critic_too(policy):
    rows = ragged(policy, 3)
    critic = ValueModel.from_policy(policy)
    torch.nn.init.normal_(critic.head.output.weight)
    assert critic._fast_trunk is not None
    values = critic(*rows)
    critic._fast_trunk = None
    torch.testing.assert_close(values, critic(*rows), atol=2e-5, rtol=1e-4)


def test_a_prompt_is_run_once_and_padding_never(tokenizer, device):
    policy = CausalLMPolicy(make_model("llama", len(tokenizer)), tokenizer, device=device)
    prompt_ids, prompt_lengths, ids, lengths = ragged(policy, 5)
    plan = make_plan(lay_out(prompt_ids, prompt_lengths, ids, lengths), torch.float32)
    # The last token of a completion predicts nothing that is scored, so it is no input.
    assert len(plan.ids) == sum(map(len, PROMPTS)) + int((lengths - 1).sum())
    alone = make_plan(lay_out(prompt_ids[::5], prompt_lengths[::5], ids[::5], lengths[::5]), torch.float32)
    assert len(alone.ids) == int((prompt_lengths[::5] + lengths[::5] - 1).sum())
    # Prompts that are alike in their ids, but not in their lengths, are different prompts.
    twice = torch.tensor([[3, 3, 3], [3, 3, 3]], device=device)
    two = make_plan(lay_out(twice, torch.tensor([3, 2], device=device), ids[:2], lengths[:2]), torch.float32)
    assert len(two.ids) >= 5 + int((lengths[:2] - 1).sum())


def test_single_tokens_behind_one_prompt(policy):
    rows = ragged(policy, 4)
    rows = (*rows[:3], torch.ones_like(rows[3]))
    torch.testing.assert_close(policy.score(*rows).log_probs, through_transformers(policy).score(*rows).log_probs, atol=2e-5, rtol=0)


def test_bfloat16(tokenizer, device):
    policy = CausalLMPolicy(make_model("llama, grouped, biased", len(tokenizer), torch.bfloat16), tokenizer, device=device)
    assert policy.backbone.fast_trunk is not None
    rows = ragged(policy, 3)
    scores, expected = policy.score(*rows).log_probs, through_transformers(policy).score(*rows).log_probs
    assert (scores - expected).abs().mean() < 0.05


def test_gradient_checkpointing_changes_no_gradient(tokenizer, device):
    policy = CausalLMPolicy(make_model("gpt2", len(tokenizer)), tokenizer, device=device)
    rows = ragged(policy, 4)
    expected = score(policy, rows)[1]
    calls = []
    run_layer = policy.backbone.fast_trunk.run_layer
    policy.backbone.fast_trunk.run_layer = lambda *arguments: calls.append(0) or run_layer(*arguments)
    policy.model.base_model.gradient_checkpointing = True  # what `gradient_checkpointing_enable` sets, by its name of the day
    found = score(policy, rows)[1]
    assert len(calls) == 6, "each of the three layers is run again in the backward pass"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_lora_adapters_work_inside(tokenizer, device):
    peft = pytest.importorskip("peft")
    for kind, targets in (("gpt2", ["c_attn", "c_fc"]), ("llama", ["q_proj", "up_proj"])):
        base = make_model(kind, len(tokenizer))
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=kind == "gpt2"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
        policy = CausalLMPolicy(model, tokenizer, device=device)
        reference = policy.reference(adapter=False)
        assert policy.backbone.fast_trunk is not None and reference.backbone.fast_trunk is not None
        rows = ragged(policy, 3)
        adapted, plain = policy.score(*rows).log_probs, reference.score(*rows).log_probs
        assert (adapted - plain).abs().max() > 0.01
        for one, found in ((policy, adapted), (reference, plain)):
            one.backbone._fast_trunk = None
            torch.testing.assert_close(found, one.score(*rows).log_probs, atol=5e-5, rtol=0)
        generated = policy.generate(PROMPTS, 8, seed=0)
        assert policy.backbone.fast_trunk is None
        policy.backbone._fast_trunk = find_trunk(base.base_model)
        assert policy.backbone.fast_trunk is not None
        assert torch.equal(policy.generate(PROMPTS, 8, seed=0).ids, generated.ids)


@pytest.mark.parametrize(
    "change",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"scale_attn_weights": False},
        {"attn_implementation": "eager"},
    ],
)
def test_unusual_settings_are_left_to_transformers(change, tokenizer):
    config = KINDS["gpt2"](len(tokenizer))
    attention = change.get("attn_implementation", "sdpa")
    for name, value in change.items():
        if name != "attn_implementation":
            setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    assert find_trunk(model.base_model) is None
    assert CausalLMPolicy(model, tokenizer, device="cpu").generate(PROMPTS, 3, seed=0).ids.shape == (4, 3)


def test_sliding_windows_and_lengths_that_turn_positions_are_left_to_transformers(tokenizer):
    windowed = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=8, **SIZES)
    assert find_trunk(AutoModelForCausalLM.from_config(windowed).base_model) is None
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, rope_parameters=rope, **SIZES)
    assert find_trunk(AutoModelForCausalLM.from_config(dynamic).base_model) is None


def test_a_hook_is_heard(policy):
    """A hook on a module that would be passed by sends everything through transformers, as long as it is there."""
    rows = ragged(policy, 2)
    expected = policy.score(*rows).log_probs
    base = policy.model.base_model
    layer = (base.h if hasattr(base, "h") else base.layers)[1]
    heard = []
    handle = layer.register_forward_hook(lambda *arguments: heard.append(1))
    assert policy.backbone.fast_trunk is None
    torch.testing.assert_close(policy.score(*rows).log_probs, expected, atol=2e-5, rtol=0)
    policy.generate(PROMPTS, 2, seed=0)
    assert len(heard) > 1
    handle.remove()
    assert policy.backbone.fast_trunk is not None


def test_a_model_that_computes_something_else_is_found_out(tokenizer):
    model = make_model("llama", len(tokenizer))
    model.base_model.layers[0].self_attn.scaling = 0.1  # what no configuration says
    assert find_trunk(model.base_model) is None
