"""Other engines sample in the place of the built-in loop: what they give, what they refuse, and that nothing else notices."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CompileConfig

from textgym.agents import PPO, CachedEngine, CausalLMPolicy, GenerationEngine, Sampling, TransformersEngine, scored_generation
from textgym.agents.common.generation import DecodeOptions, Generation
from textgym.agents.common.sampling import unpack_kept

PROMPTS = ["abc", "hello there", "a", "the cat sat on the mat."]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6, "top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.05, "temperature": 1.4},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "min_new_tokens": 4},
    {"temperature": 0, "min_new_tokens": 2},
]


class Recorder:
    """An engine that keeps what it was asked, and passes it on."""

    def __init__(self, inner: GenerationEngine) -> None:
        self.inner, self.options, self.policies = inner, [], []

    def generate(self, policy, prompt_ids, prompt_lengths, options, generator) -> Generation:
        self.options.append(options)
        self.policies.append(policy)
        return self.inner.generate(policy, prompt_ids, prompt_lengths, options, generator)


@pytest.fixture
def policy(model, tokenizer, device):
    """Three ids end a completion, so that most end early; the model has three outputs more than the tokenizer has tokens."""
    return CausalLMPolicy(model, tokenizer, device=device, engine=TransformersEngine(), eos_token_ids=[2, 7, 19])


def both(policy, **arguments):
    """The same call with the policy's engine and with the built-in loop."""
    engine, arguments = policy.engine, {"prompts": PROMPTS, "max_new_tokens": 12, "seed": 3, "num_generations": 3} | arguments
    generated = policy.generate(**arguments)
    policy.engine = CachedEngine()
    expected = policy.generate(**arguments)
    policy.engine = engine
    return generated, expected


def same(generated: Generation, expected: Generation, atol: float = 1e-4) -> None:
    assert torch.equal(generated.ids, expected.ids) and torch.equal(generated.lengths, expected.lengths)
    assert torch.equal(generated.prompt_ids, expected.prompt_ids) and torch.equal(generated.prompt_lengths, expected.prompt_lengths)
    torch.testing.assert_close(generated.log_probs, expected.log_probs, atol=atol, rtol=0)
    assert (generated.kept is None) == (expected.kept is None)
    if expected.kept is not None:
        chosen = expected.completion_mask
        assert torch.equal(generated.kept[chosen], expected.kept[chosen])
    assert generated.finish_reasons == expected.finish_reasons and generated.texts == expected.texts


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_gives_what_the_built_in_loop_gives(policy, settings):
    # Both draw from the same numbers by the same rules; what is left is rounding, far from any boundary with this seed.
    generated, expected = both(policy, **settings)
    same(generated, expected)
    ends = generated.lengths[generated.lengths < 12]
    assert settings.get("temperature") == 0 or (len(ends) and len(ends.unique()) > 1), "rows that end at different places"


def test_log_probs_and_kept_sets_are_those_of_score(model, tokenizer, device):
    policy = CausalLMPolicy(model, tokenizer, device=device, engine=TransformersEngine(), temperature=0.8, top_p=0.8)
    generated = policy.generate(PROMPTS, 10, seed=1)
    with torch.no_grad():
        scores = policy.score(generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths, return_keep=True)
    assert torch.equal(generated.log_probs, scores.log_probs) and torch.equal(generated.kept, scores.kept)
    assert generated.log_probs.dtype == torch.float32
    kept = unpack_kept(generated.kept, policy.vocab_size)[generated.completion_mask]
    assert 1 < kept.sum(-1).float().mean() < policy.vocab_size / 2


def test_a_fixed_mask_is_kept_to_and_scored(policy, device):
    legal = torch.zeros((len(PROMPTS), policy.vocab_size), dtype=torch.bool, device=device)
    for i in range(len(PROMPTS)):
        legal[i, [2, 5 + i, 10 + i, 20 + i]] = True
    generated, expected = both(policy, action_mask=legal, min_new_tokens=3)
    same(generated, expected)
    assert bool(legal.repeat_interleave(3, 0).gather(1, generated.ids)[generated.completion_mask].all())
    same(*both(policy, action_mask=legal[0]))


@pytest.mark.parametrize("settings", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"use_cache": False}])
def test_how_it_is_run_changes_nothing(policy, settings):
    policy.engine = TransformersEngine(**settings)
    same(*both(policy, max_batch_size=5))


@torch.no_grad()
def test_tokens_come_as_often_as_the_model_has_them(task):
    policy = task.policy(engine=TransformersEngine(), temperature=0.7)
    samples = 8000
    generated = policy.generate([task.tree.prompt_texts[0]], 2, seed=0, num_generations=samples)
    prompt = generated.prompt_ids[:1]
    common = generated.ids[:, 0].bincount(minlength=policy.vocab_size).argmax()
    after_it = generated.ids[:, 0] == common
    assert common not in policy.eos_token_ids
    for drawn, context in ((generated.ids[:, 0], prompt), (generated.ids[after_it, 1], torch.cat((prompt, common.view(1, 1)), 1))):
        exact = (policy.model(context).logits[0, -1, : policy.vocab_size] / 0.7).softmax(-1)
        found = drawn.bincount(minlength=policy.vocab_size) / len(drawn)
        # n fair draws are expected within sqrt(V / (2 pi n)); twice that is many standard deviations away.
        bound = 2 * (policy.vocab_size / (2 * torch.pi * len(drawn))) ** 0.5
        assert (found - exact).abs().sum() / 2 < bound
        assert (exact - 1 / policy.vocab_size).abs().sum() / 2 > 3 * bound, "far from uniform, so that the bound says something"


def test_the_seed_decides_and_global_generators_are_left_alone(policy):
    before = torch.get_rng_state()
    first, again = (policy.generate(PROMPTS, 12, seed=5).ids for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(policy.generate(PROMPTS, 12, seed=5).ids, first)
    torch.set_rng_state(before)
    assert not torch.equal(policy.generate(PROMPTS, 12, seed=6).ids, first)


def test_nothing_is_inherited_from_the_generation_config(policy):
    config = policy.model.generation_config
    config.repetition_penalty, config.num_beams, config.eos_token_id, config.bad_words_ids = 5.0, 2, [4, 5, 6], [[8]]
    same(*both(policy))
    assert policy.model.generation_config is config


def test_weights_are_read_at_each_call(policy):
    before = policy.generate(PROMPTS, 12, seed=1)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(-1)
    generated, expected = both(policy, seed=1)
    same(generated, expected)
    assert not torch.equal(generated.ids[::3], before.ids)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for its old name
def test_lora_and_its_reference(tiny_model, tokenizer, device):
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("gpt2", len(tokenizer)), lora)
    policy = CausalLMPolicy(model, tokenizer, device=device, engine=TransformersEngine())
    generated, expected = both(policy)
    same(generated, expected)
    reference, expected_of_reference = both(policy.reference(adapter=False))
    same(reference, expected_of_reference)
    assert not torch.equal(reference.ids, generated.ids)


@pytest.mark.parametrize("name", ["generate", "generate_ids"])
def test_the_policy_asks_its_engine(policy, name):
    policy.engine = engine = Recorder(CachedEngine())
    ids, lengths = policy.encode_prompts(PROMPTS)
    if name == "generate":
        policy.generate((ids, lengths), 5, temperature=0.5, num_generations=2, stop_strings="x")
    else:
        sampling = replace(policy.sampling, temperature=0.5)
        policy.generate_ids(ids, lengths, 5, sampling=sampling, num_generations=2, stop_strings="x")
    (options,) = engine.options
    assert options == DecodeOptions(
        max_new_tokens=5,
        sampling=Sampling(0.5),
        num_generations=2,
        eos_token_ids=(2, 7, 19),
        fill_token_id=policy.fill_token_id,
        stop_strings=("x",),
    )
    assert isinstance(CausalLMPolicy(policy.model, policy.tokenizer, device=policy.device).engine, CachedEngine)


def test_an_agent_learns_with_it_as_with_the_built_in_loop(small_task):
    learned = []
    for inner in (TransformersEngine(), CachedEngine()):
        engine = Recorder(inner)
        agent = PPO(small_task.policy(engine=engine), small_task.envs(), learning_rate=1e-3, seed=1)
        before = torch.cat([p.detach().flatten().clone() for p in agent.policy.model.parameters()])
        agent.learn(1)
        assert engine.policies and all(policy is agent.policy for policy in engine.policies)
        learned.append(torch.cat([p.detach().flatten() for p in agent.policy.model.parameters()]))
        assert not torch.equal(learned[-1], before)
    torch.testing.assert_close(*learned, atol=1e-4, rtol=0)


def test_references_share_the_engine_and_pickles_hold_it(policy):
    class NoCopy(TransformersEngine):
        def __deepcopy__(self, memo):
            raise TypeError("holds a server")

    policy.engine = NoCopy()
    assert policy.reference().engine is policy.engine
    policy.engine = TransformersEngine(cache_implementation="static")
    restored = pickle.loads(pickle.dumps(policy))
    assert restored.engine.generate_settings == {"cache_implementation": "static"}
    same(restored.generate(PROMPTS, 6, seed=2), policy.generate(PROMPTS, 6, seed=2))


def test_a_compiled_model_can_be_copied_and_pickled(tiny_model, tokenizer):
    compiled = CompileConfig(backend="eager", mode=None, fullgraph=False)
    compiled._compile_all_devices = True  # transformers compiles on the CPU only if told so
    engine = TransformersEngine(cache_implementation="static", compile_config=compiled)
    policy = CausalLMPolicy(tiny_model("llama", len(tokenizer)), tokenizer, device="cpu", engine=engine)
    same(*both(policy, max_new_tokens=4))
    assert list(engine._compiled) == [policy.model], "it was compiled"
    reference = policy.reference()
    with torch.no_grad():
        reference.model.get_output_embeddings().weight.mul_(-1)
    same(*both(reference, max_new_tokens=4))
    same(*both(policy, max_new_tokens=4))
    assert pickle.loads(pickle.dumps(policy)).engine._compiled == {}
    assert copy.deepcopy(engine)._compiled == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"epsilon": 0.1}, "`epsilon`"), ({"stop_strings": "x"}, "`stop_strings`"), ({"action_mask": "model"}, "`action_mask`.*PolicyMask")],
)
def test_it_refuses_what_it_cannot_do(policy, arguments, message):
    if "action_mask" in arguments:
        arguments = {"action_mask": policy.kept_mask(Sampling(top_p=0.5))}
    with pytest.raises(ValueError, match=message):
        policy.generate_ids(*policy.encode_prompts(PROMPTS), 4, **arguments)


def test_it_refuses_settings_that_change_what_is_drawn():
    with pytest.raises(ValueError, match=r"`generate_settings` must be among .*got num_beams, top_k"):
        TransformersEngine(top_k=5, num_beams=2, cache_implementation="static")


def test_no_legal_token_and_broken_weights_are_errors(policy):
    only_eos = torch.zeros(policy.vocab_size, dtype=torch.bool)
    only_eos[2] = True
    assert policy.generate(PROMPTS, 4, action_mask=only_eos).lengths.tolist() == [1] * 4
    with pytest.raises(ValueError, match="without any legal token"):
        policy.generate(PROMPTS, 4, action_mask=only_eos, min_new_tokens=1)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        policy.generate(PROMPTS, 4)


class TestScoredGeneration:
    """Ids alone, as another program's engine returns them."""

    @pytest.fixture
    def tiny(self, tiny_model, tokenizer, device):
        return CausalLMPolicy(tiny_model("gpt2", len(tokenizer)), tokenizer, device=device, top_k=3)

    @staticmethod
    def call(policy, rows, lengths, steps=4, **changes):
        options = replace(DecodeOptions(steps, policy.sampling, eos_token_ids=(2,)), **changes)
        prompts = policy.encode_prompts(["ab", "abc"])
        return scored_generation(policy, *prompts, torch.tensor(rows), torch.tensor(lengths), options)

    def test_filler_is_not_read_and_short_tables_are_filled_up(self, tiny):
        generated = self.call(tiny, [[5, 2, 2], [6, 7, 2]], [2, 3], fill_token_id=1)
        assert generated.ids.tolist() == [[5, 2, 1, 1], [6, 7, 2, 1]]
        assert generated.finish_reasons == ["eos", "eos"]
        assert generated.log_probs[0, :2].isfinite().all() and (generated.log_probs[0, 2:] == 0).all()

    def test_a_token_outside_the_truncated_set_counts_as_kept(self, tiny):
        greedy = tiny.generate(["ab", "abc"], 4, temperature=0)
        outside = (~unpack_kept(greedy.kept, tiny.vocab_size)[0, 3]).nonzero().max()
        rows = greedy.ids.clone()
        rows[0, 3] = outside
        generated = self.call(tiny, rows.tolist(), [4, 4])
        kept = unpack_kept(generated.kept, tiny.vocab_size)
        assert kept.sum(-1).tolist() == [[3, 3, 3, 4], [3, 3, 3, 3]] and kept[0, 3, outside]

    def test_stop_strings_are_found(self, tiny):
        eight = tiny.tokenizer.convert_tokens_to_ids("8")
        generated = self.call(tiny, [[5, eight, 0, 0], [6, 7, 8, 9]], [2, 4], stop_strings=("8",))
        assert generated.finish_reasons == ["stop", "length"]

    @pytest.mark.parametrize(
        ("rows", "lengths", "changes", "message"),
        [
            ([[5, 6, 7, 8]], [4], {}, "`ids` must be"),
            ([[5] * 5] * 2, [4, 4], {}, "`ids` must be"),
            ([[5, 6, 7, 999]] * 2, [4, 4], {}, "`ids` must be from 0 to V - 1"),
            ([[5, 2, 7, 8]] * 2, [4, 2], {}, "went on behind EOS"),
            ([[5, 6, 7, 8]] * 2, [4, 3], {}, "cut rows short"),
            ([[5, 6, 7, 8]] * 2, [4, 0], {}, "`lengths` must be from 1 to 4"),
            ([[5, 2, 7, 8]] * 2, [2, 2], {"min_new_tokens": 2}, "`ids` must be legal"),
            ([[5, 2, 7, 8]] * 2, [2, 2], {"epsilon": 0.5}, "`epsilon`"),
        ],
    )
    def test_ids_that_break_the_contract_are_errors(self, tiny, rows, lengths, changes, message):
        with pytest.raises(ValueError, match=message):
            self.call(tiny, rows, lengths, **changes)
