import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from stable_baselines3.common.base_class import BaseAlgorithm
from transformers import AutoModelForCausalLM, AutoTokenizer

from textgym.agents import CausalLMPolicy, Sampling, ValueModel
from textgym.types import TokenPolicy

# peft reads an attribute of transformers under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPTS = ["abc", "hello there", "a", "the cat sat on the mat."]


@pytest.fixture
def policy(model, tokenizer, device):
    return CausalLMPolicy(model, tokenizer, device=device)


def perturb(policy, scale=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def arrays(generated):
    rows = generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths
    return tuple(tensor.cpu().numpy() for tensor in rows)


def observations(generated, t):
    """What an environment shows after t tokens of each completion."""
    prompt_ids, prompt_lengths, ids, _ = arrays(generated)
    prompt = np.arange(prompt_ids.shape[1])[::-1] < prompt_lengths[:, None]
    shown = np.broadcast_to(np.arange(ids.shape[1]) < t, ids.shape)
    return {
        "input_ids": np.concatenate((prompt_ids, np.where(shown, ids, 0)), 1),
        "attention_mask": np.concatenate((prompt, shown), 1).astype(np.int8),
    }


def test_the_parts_are_the_users_own(policy, model, tokenizer):
    assert policy.model is model
    assert policy.tokenizer is tokenizer
    assert (policy.vocab_size, policy.eos_token_ids, policy.fill_token_id) == (46, (2,), 0)
    assert policy.hidden_size == 32
    assert policy.sampling == Sampling()
    assert isinstance(policy, TokenPolicy)
    assert {name.split(".")[0] for name, _ in policy.named_parameters()} == {"model"}


class Idle(BaseAlgorithm):
    """An algorithm of Stable-Baselines3 that only holds a policy."""

    def _setup_model(self): ...

    def learn(self, total_timesteps, **_):
        return self


def test_it_can_stand_as_the_policy_of_a_stable_baselines3_algorithm(policy):
    agent = Idle(CausalLMPolicy, None, 1e-3, device=policy.device)
    agent.policy = policy
    observation = observations(policy.generate(PROMPTS, 1, seed=0), 0)
    actions, _ = agent.predict(observation, deterministic=True)
    assert actions.shape == (4,)
    policy.set_training_mode(True)
    assert not any(module.training for module in policy.modules())
    sequences = arrays(policy.generate(PROMPTS, 5, seed=0))
    expected = policy.sequence_log_probs(*sequences)
    before = copy.deepcopy(agent.get_parameters())
    perturb(policy)
    assert not np.array_equal(policy.sequence_log_probs(*sequences), expected)
    agent.set_parameters(before)
    np.testing.assert_array_equal(policy.sequence_log_probs(*sequences), expected)


# --- saving and loading


def test_what_is_saved_is_read_by_transformers_and_back(policy, tmp_path, device):
    expected = policy.generate(PROMPTS, 12, seed=0)
    policy.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".txt", ".jinja"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path).to(device)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == policy.vocab_size
    with torch.no_grad():
        ids = expected.prompt_ids[3:4]
        torch.testing.assert_close(model(ids).logits, policy.model(ids).logits)
    for settings in ({}, {"temperature": 1.0}):
        loaded = CausalLMPolicy.from_pretrained(tmp_path, device=device, **settings)
        assert torch.equal(loaded.generate(PROMPTS, 12, seed=0).ids, expected.ids)
        assert loaded.generate(PROMPTS, 12, seed=0).texts == expected.texts
    assert CausalLMPolicy.from_pretrained(str(tmp_path), device=device, top_k=3).sampling.top_k == 3
    halved = CausalLMPolicy.from_pretrained(tmp_path, device=device, dtype=torch.bfloat16)
    assert next(halved.parameters()).dtype == torch.bfloat16
    halved.save_pretrained(tmp_path / "half")
    stored = CausalLMPolicy.from_pretrained(tmp_path / "half", device=device, dtype="checkpoint")
    assert next(stored.parameters()).dtype == torch.bfloat16
    assert next(CausalLMPolicy.from_pretrained(tmp_path / "half", device=device).parameters()).dtype == torch.float32


def test_paths_without_a_model_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"`path`: there is no folder '\./no/such/folder'"):
        CausalLMPolicy.from_pretrained("./no/such/folder")
    with pytest.raises(ValueError, match="no causal language model with its tokenizer could be loaded from"):
        CausalLMPolicy.from_pretrained(tmp_path)


def test_importing_the_agents_loads_no_torch():
    code = "import sys, textgym.agents; assert 'torch' not in sys.modules; assert 'CausalLMPolicy' in dir(textgym.agents)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_unknown_names_of_the_package_are_named():
    import textgym.agents

    with pytest.raises(AttributeError, match="has no attribute 'PP0'"):
        textgym.agents.PP0  # noqa: B018


# --- tokenizers


@pytest.mark.parametrize("pad", [None, "<eos>", "q"])
def test_nothing_depends_on_the_pad_token(model, tokenizer, device, pad):
    other = copy.deepcopy(tokenizer)
    other.pad_token = pad
    policy, changed = CausalLMPolicy(model, tokenizer, device=device), CausalLMPolicy(model, other, device=device)
    first, second = (one.generate(PROMPTS, 20, seed=0, num_generations=4) for one in (policy, changed))
    assert first.completion_ids == second.completion_ids
    assert torch.equal(first.log_probs, second.log_probs)
    np.testing.assert_array_equal(policy.sequence_log_probs(*arrays(first)), changed.sequence_log_probs(*arrays(second)))
    assert changed.fill_token_id == {None: 2, "<eos>": 2, "q": other.convert_tokens_to_ids("q")}[pad]


def test_a_tokenizer_without_an_end_needs_one(model, tokenizer, device):
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    with pytest.raises(ValueError, match="`eos_token_ids` must name at least one token"):
        CausalLMPolicy(model, other, device=device)
    assert CausalLMPolicy(model, other, device=device, eos_token_ids=[5, 9]).eos_token_ids == (5, 9)


def test_all_forms_of_prompts_are_the_same_prompts(policy, tokenizer):
    expected = policy.generate(PROMPTS, 8, seed=0)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    pair = policy.encode_prompts(PROMPTS)
    for prompts in (ids, [np.array(row) for row in ids], pair, tuple(tensor.cpu().numpy() for tensor in pair), observations(expected, 0)):
        assert torch.equal(policy.generate(prompts, 8, seed=0).ids, expected.ids)
    single = {key: value[1] for key, value in observations(expected, 0).items()}
    assert policy.generate(single, 8, seed=0).prompt_lengths.tolist() == [11]
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    chat = CausalLMPolicy(policy.model, other, device=policy.device)
    assert torch.equal(chat.encode_prompts([[{"role": "user", "content": "abc"}], "hi"])[0][0], chat.encode_prompts(["abc?"])[0][0])


# --- references


def test_a_reference_is_frozen_where_the_policy_was(policy):
    generated = policy.generate(PROMPTS, 10, seed=0)
    reference = policy.reference()
    before = reference.sequence_log_probs(*arrays(generated))
    perturb(policy)
    np.testing.assert_array_equal(reference.sequence_log_probs(*arrays(generated)), before)
    assert np.abs(policy.sequence_log_probs(*arrays(generated)) - before).max() > 0.01
    assert reference.frozen
    assert not policy.frozen
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert reference.sampling == policy.sampling
    assert reference.tokenizer is policy.tokenizer or len(reference.tokenizer) == len(policy.tokenizer)


@pytest.fixture
def lora(model, tokenizer, device):
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    # GPT-2's layers hold their weights the other way round, which peft finds out and warns about.
    config.fan_in_fan_out = type(model).__name__.startswith("GPT2")
    return CausalLMPolicy(get_peft_model(model, config), tokenizer, device=device)


def test_a_reference_may_be_the_model_without_its_adapter(lora, device):
    base = CausalLMPolicy(copy.deepcopy(lora.model).unload(), lora.tokenizer, device=device)
    reference = lora.reference(adapter=False)
    assert lora.is_adapter
    assert next(iter(reference.parameters())) is next(iter(lora.parameters())), "nothing is copied"
    generated = lora.generate(PROMPTS, 12, seed=0)
    expected = base.sequence_log_probs(*arrays(generated))
    np.testing.assert_allclose(reference.sequence_log_probs(*arrays(generated)), expected, atol=1e-5)
    own = lora.sequence_log_probs(*arrays(generated))
    assert np.abs(own - expected).max() > 0.1
    # The law of one distribution holds with the adapter on, dropout in it or not, and after the reference was used.
    np.testing.assert_allclose(own, generated.log_probs.cpu().numpy(), atol=1e-4)
    assert torch.equal(lora.generate(PROMPTS, 12, seed=0).ids, generated.ids)
    assert torch.equal(reference.generate(PROMPTS, 12, seed=0).ids, base.generate(PROMPTS, 12, seed=0).ids)
    pair = lora.paired_sequence_log_probs(reference, *arrays(generated))
    np.testing.assert_allclose(pair[0], own, atol=1e-6)
    np.testing.assert_allclose(pair[1], expected, atol=1e-5)


def test_only_the_adapter_is_trained(lora):
    generated = lora.generate(PROMPTS, 8, seed=0)
    rows = generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths
    lora.reference().score(*rows)
    lora.score(*rows).log_probs.sum().backward()
    trained = {name for name, parameter in lora.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def test_a_lora_policy_is_saved_as_its_adapter(model, tokenizer, device, tmp_path):
    base = CausalLMPolicy(model, tokenizer, device=device)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    config.fan_in_fan_out = type(model).__name__.startswith("GPT2")
    policy = CausalLMPolicy.from_pretrained(tmp_path / "base", device=device, lora=config)
    perturb(policy)
    policy.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = CausalLMPolicy.from_pretrained(tmp_path / "adapter", device=device)
    assert isinstance(loaded.model, PeftModel)
    assert torch.equal(loaded.generate(PROMPTS, 10, seed=0).ids, policy.generate(PROMPTS, 10, seed=0).ids)
    assert torch.equal(loaded.reference(adapter=False).generate(PROMPTS, 10, seed=0).ids, base.generate(PROMPTS, 10, seed=0).ids)
    assert any(parameter.requires_grad for parameter in loaded.parameters())


def test_an_adapter_on_a_model_made_in_memory_cannot_be_saved_alone(lora, tmp_path):
    with pytest.raises(ValueError, match="has no name to find it by"):
        lora.save_pretrained(tmp_path)


def test_virtual_tokens_are_refused(model, tokenizer, device):
    prompt_tuning = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="puts virtual tokens before the prompt"):
        CausalLMPolicy(prompt_tuning, tokenizer, device=device)


def test_copies_and_pickles_are_policies_of_their_own(policy):
    generated = policy.generate(PROMPTS, 10, seed=0)
    policy.predict(observations(generated, 0))
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        np.testing.assert_array_equal(other.sequence_log_probs(*arrays(generated)), policy.sequence_log_probs(*arrays(generated)))
        perturb(other)
        assert other.backbone.model is other.model
        assert np.abs(other.sequence_log_probs(*arrays(generated)) - policy.sequence_log_probs(*arrays(generated))).max() > 0.01


# --- the numpy protocol


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 4, "temperature": 1.5}, {"top_p": 0.7}])
def test_the_numpy_protocol_is_one_distribution(model, tokenizer, device, settings):
    policy = CausalLMPolicy(model, tokenizer, device=device, **settings)
    reference = policy.reference()
    perturb(reference.requires_grad_(True), 0.1)
    generated = policy.generate(PROMPTS, 6, seed=0, min_new_tokens=6)
    sequences = arrays(generated)
    whole = policy.sequence_log_probs(*sequences)
    own, other = policy.paired_sequence_log_probs(reference, *sequences)
    exact = policy.sequence_full_kl(reference, *sequences)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(own, whole, atol=1e-5)
    np.testing.assert_allclose(policy.reference_sequence_log_probs(reference, *sequences), other, atol=1e-6)
    for t in range(6):
        state, actions = observations(generated, t), sequences[2][:, t]
        np.testing.assert_allclose(policy.log_probs(state, actions), whole[:, t], atol=1e-4)
        first, second = policy.paired_log_probs(reference, state, actions)
        np.testing.assert_allclose(first, whole[:, t], atol=1e-4)
        np.testing.assert_allclose(second, other[:, t], atol=1e-4)
        np.testing.assert_allclose(policy.full_kl(reference, state), exact[:, t], atol=1e-4)
    # By hand, at the last state: both at the policy's temperature, over the policy's kept set.
    state = observations(generated, 5)
    table = np.stack([policy.log_probs(state, np.full(4, token)) for token in range(policy.vocab_size)], 1)
    reference_table = np.stack([reference.log_probs(state, np.full(4, token)) for token in range(policy.vocab_size)], 1)
    for row in range(4):
        size = {4: 4}.get(policy.sampling.top_k, policy.vocab_size)
        kept = np.argsort(-table[row])[:size]
        if policy.sampling.top_p < 1:
            plain = np.exp(np.sort(logits_of(policy, state, row))[::-1])
            size = int(np.searchsorted(plain.cumsum(), 0.7) + 1)
            kept = np.argsort(-logits_of(policy, state, row))[:size]
        p = softmax(logits_of(policy, state, row)[kept])
        q = softmax(logits_of(reference, state, row)[kept])
        assert policy.full_kl(reference, state)[row] == pytest.approx(np.sum(p * np.log(p / q)), abs=1e-4)
        assert np.sum(np.exp(table[row][kept])) == pytest.approx(1.0, abs=1e-4)
    assert reference_table.shape == table.shape


def logits_of(policy, state, row):
    """Log-probs at the policy's temperature before truncation, by a plain forward of one row."""
    ids = state["input_ids"][row][state["attention_mask"][row].astype(bool)]
    with torch.no_grad():
        logits = policy.model(torch.as_tensor(ids[None], device=policy.device)).logits[0, -1, : policy.vocab_size]
    return (logits / policy.sampling.temperature).log_softmax(-1).double().cpu().numpy()


def softmax(values):
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def test_policies_of_different_kinds_cannot_be_paired(policy, tabular_policy):
    generated = policy.generate(PROMPTS, 3, seed=0)
    with pytest.raises(ValueError, match=r"`reference` must be a CausalLMPolicy .* got TabularPolicy"):
        policy.sequence_full_kl(tabular_policy(0), *arrays(generated))
    other = policy.reference()
    other.backbone.vocab_size = 40
    with pytest.raises(ValueError, match="`reference` has a vocabulary of 40 tokens"):
        policy.paired_sequence_log_probs(other, *arrays(generated))


def test_a_critic_of_a_lora_policy_starts_from_the_model_without_the_adapter(lora):
    critic = ValueModel.from_policy(lora)
    names = [name for name, _ in critic.named_parameters()]
    assert not any("lora" in name for name in names)
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert any("lora_" in name for name, _ in lora.named_parameters()), "the policy keeps its own"
