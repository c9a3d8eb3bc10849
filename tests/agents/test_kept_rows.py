"""Captured steps and their buffers that serve one decode loop after the other; by a recorder for the CPU."""

import contextlib
import copy
import gc
import itertools
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch

from textgym.agents import CausalLMPolicy, Sampling
from textgym.agents.common import kept_rows
from textgym.agents.common.buckets import bucket
from textgym.agents.common.captured_decoder import CapturedDecoder
from textgym.agents.common.decoders import make_decoder

PROMPTS = ["abc", "hello there", "a", "the cat sat on the mat."]
TRUNKS = ("gpt2", "llama")


@pytest.fixture(params=TRUNKS)
def policy(request, tiny_model, tokenizer):
    """Whose completions all run to the end."""
    policy = CausalLMPolicy(tiny_model(request.param, len(tokenizer) + 3), tokenizer, device="cpu")
    policy.eos_token_ids = ()
    return policy


@pytest.fixture(params=TRUNKS)
def ending_policy(request, tiny_model, tokenizer):
    """A third of all characters end a completion."""
    ends = list(range(2, tokenizer.vocab_size, 3))
    return CausalLMPolicy(tiny_model(request.param, len(tokenizer) + 3), tokenizer, device="cpu", eos_token_ids=ends)


def kept(policy):
    return policy.backbone.kept_rows._kept


def disturb(policy, scale=0.1):
    """Changes the weights in place, as an optimiser does."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("count", "parts", "least", "expected"), [
    (1, 2, 1, 1), (2, 2, 1, 2), (3, 2, 1, 3), (4, 2, 1, 4), (5, 2, 1, 6), (7, 2, 1, 8), (9, 2, 1, 12), (129, 2, 1, 192), (193, 2, 1, 256),
    (5, 4, 1, 5), (9, 4, 1, 10), (129, 4, 1, 160), (256, 4, 1, 256), (1, 4, 64, 64), (64, 4, 64, 64), (65, 4, 64, 80), (300, 4, 64, 320),
])  # fmt: skip
def test_buckets(count, parts, least, expected):
    assert bucket(count, parts, least) == expected
    assert bucket(expected, parts, least) == expected


def test_the_second_call_captures_nothing(policy, captures):
    first, captured = captures.check(policy, PROMPTS, 30, seed=0, num_generations=4)
    assert captured == 1
    assert len(kept(policy)) == 1
    second, captured = captures.check(policy, PROMPTS, 30, seed=1, num_generations=4)
    assert captured == 0
    assert not torch.equal(first.ids, second.ids)


def test_sizes_of_one_bucket_share(policy, captures):
    assert captures.check(policy, PROMPTS[:1], 30, seed=0, num_generations=9)[1] == 1
    assert captures.check(policy, PROMPTS[:1], 20, seed=0, num_generations=10)[1] == 0
    assert captures.check(policy, PROMPTS[1:], 33, seed=0, num_generations=3)[1] == 0
    assert kept(policy)[0]._table.shape[2:5:2] == (10, 64)
    # A smaller bucket is a captured step more on the same buffers.
    assert captures.check(policy, PROMPTS[1:], 33, seed=0)[1] == 1
    assert captures.check(policy, PROMPTS[1:], 33, seed=0)[1] == 0
    assert len(kept(policy)) == 1


def test_more_rows_get_larger_buffers_in_the_place_of_the_smaller_ones(policy, captures):
    assert captures.check(policy, PROMPTS, 20, seed=0)[1] == 1
    assert captures.check(policy, PROMPTS, 20, seed=0, num_generations=4)[1] == 1
    assert [rows.rows for rows in kept(policy)] == [16]
    assert captures.check(policy, PROMPTS, 20, seed=0)[1] == 1
    assert captures.check(policy, PROMPTS, 20, seed=0)[1] == 0


def test_rows_that_fill_up_a_bucket_change_nothing(policy, captures):
    captures.check(policy, PROMPTS, 40, seed=0, num_generations=6)
    captures.check(policy, PROMPTS[:1], 40, seed=3, num_generations=13)
    rows = kept(policy)[0]
    assert rows.rows == 24
    assert rows.count == 13
    assert rows.size_for(13) == 16
    for buffer in (rows._table, rows._logits, rows._bias):
        assert buffer.isfinite().all()
    assert rows._logits[13:16].abs().sum() > 0, "they have run along"


@pytest.mark.parametrize("settings", [{}, {"max_batch_size": 5}, {"max_batch_size": 20, "top_p": 0.9}, {"max_batch_size": 21}])
def test_rows_that_leave_and_come_change_buckets(ending_policy, captures, settings):
    policy = ending_policy
    sizes = set()
    for seed in (0, 1, 0, 1, 0):
        expected, captured = captures.check(policy, PROMPTS, 60, seed=seed, num_generations=16, **settings)
        assert int(expected.lengths.min()) < int(expected.lengths.max()) - 5
        sizes |= {(rows.columns, size) for rows in kept(policy) for size in rows._steps}
    assert captured == 0
    assert len({size for _, size in sizes}) > 3
    if settings:
        assert len({columns for columns, _ in sizes}) > 1, "rows have moved into longer buffers"
    for columns in [rows.columns for rows in kept(policy)]:
        # These buffers were made on the way, in inference mode; a loop begins outside of it.
        captures.check(policy, PROMPTS, columns - max(map(len, PROMPTS)), seed=0)


def test_rows_are_dropped_exactly_when_fewer_are_run(ending_policy, captures, monkeypatch):
    """Between two steps without a change of buckets nothing is moved."""
    moves = []
    select = CapturedDecoder.select

    def watched(decoder, rows):
        before = decoder._rows.size_for(decoder._rows.count)
        select(decoder, rows)
        moves.append((before, decoder._rows.size_for(len(rows))))

    monkeypatch.setattr(CapturedDecoder, "select", watched)
    ending_policy.generate(PROMPTS, 60, seed=0, num_generations=16)
    assert len(moves) > 4
    assert all(after < before for before, after in moves)
    for (_, after), (before, _) in itertools.pairwise(moves):
        assert after == before


def test_captures_for_one_loop_are_made_for_halves(ending_policy, captures, monkeypatch):
    """They must be worth it."""
    moves = []
    select = CapturedDecoder.select

    def watched(decoder, rows):
        moves.append((decoder._rows.count, len(rows)))
        select(decoder, rows)

    monkeypatch.setattr(CapturedDecoder, "select", watched)
    ending_policy.model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output)
    captures.check(ending_policy, PROMPTS, 60, seed=0, num_generations=16)
    assert len(moves) > 2
    assert all(2 * after <= before for before, after in moves)


def test_the_optimiser_changes_what_kept_steps_compute(policy, captures):
    before, _ = captures.check(policy, PROMPTS, 30, seed=0)
    for _ in range(2):
        disturb(policy)
        after, captured = captures.check(policy, PROMPTS, 30, seed=0)
        assert captured == 0
        assert not torch.equal(before.ids, after.ids)
        before = after


def assign(policy):
    policy.model.load_state_dict({name: 0.8 * tensor for name, tensor in policy.model.state_dict().items()}, assign=True)


def replace_data(policy):
    for parameter in policy.model.parameters():
        parameter.data = 0.8 * parameter.data


def replace_one_module(policy):
    norm = next(module for module in policy.model.modules() if "Norm" in type(module).__name__)
    norm.weight = torch.nn.Parameter(2 * norm.weight.detach())


def replace_an_activation(policy):
    for module in policy.model.modules():
        for name in ("act", "act_fn"):
            if hasattr(module, name):
                setattr(module, name, torch.nn.Tanh())


def change_a_number(policy):
    for module in policy.model.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 10.0)


@pytest.mark.parametrize(
    "change",
    [lambda policy: policy.model.to(torch.float64), assign, replace_data, replace_one_module, replace_an_activation, change_a_number],
)
def test_other_parameters_and_modules_are_captured_anew(policy, captures, change):
    captures.check(policy, PROMPTS, 30, seed=0)
    old = weakref.ref(kept(policy)[0])
    change(policy)
    assert policy.backbone.fast_trunk is not None
    _, captured = captures.check(policy, PROMPTS, 30, seed=0)
    assert captured == 1
    assert captures.check(policy, PROMPTS, 30, seed=0)[1] == 0
    assert old() is None


class Squares(torch.nn.Parameter):
    """A tensor whose products are its own affair."""


class Projection(torch.nn.Linear):
    """A user's."""


def override(model):
    model.lm_head.forward = lambda states: states


@pytest.mark.parametrize(
    "change",
    [
        override,
        lambda model: model.lm_head.register_forward_pre_hook(lambda module, inputs: None),
        lambda model: model.lm_head.register_forward_hook(lambda module, inputs, output: None),
        lambda model: setattr(model.lm_head, "weight", Squares(model.lm_head.weight.detach())),
        lambda model: setattr(model, "lm_head", Projection(32, 49, bias=False)),
        lambda model: torch.nn.utils.parametrizations.weight_norm(model.lm_head),
    ],
)
def test_what_python_decides_is_not_kept(policy, change):
    assert kept_rows.fingerprint(policy.model) == kept_rows.fingerprint(policy.model) is not None
    change(policy.model)
    assert kept_rows.fingerprint(policy.model) is None


def test_hooks_on_all_modules_are_hooks_too(policy):
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert kept_rows.fingerprint(policy.model) is None
    finally:
        hook.remove()
    assert kept_rows.fingerprint(policy.model) is not None


def test_a_failure_is_remembered_until_all_is_cleared():
    kept = kept_rows.KeptRows()
    kept.failed = True
    kept.clear()
    assert not kept.failed


def test_a_hook_is_a_part_of_the_model(policy, captures):
    """A step with hooks is captured for one loop only, since they may do something else in the next."""
    first, _ = captures.check(policy, PROMPTS, 30, seed=0)
    scale = [0.5]
    hook = policy.model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * scale[0])
    with_hook, captured = captures.check(policy, PROMPTS, 30, seed=0)
    assert captured == 1
    scale[0] = 2.0
    other, captured = captures.check(policy, PROMPTS, 30, seed=0)
    assert captured == 1
    hook.remove()
    last, _ = captures.check(policy, PROMPTS, 30, seed=0)
    assert torch.equal(first.ids, last.ids)
    assert not torch.equal(first.ids, with_hook.ids)
    assert not torch.equal(with_hook.ids, other.ids)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("kind", TRUNKS)
def test_adapters_may_be_switched_and_merged(tiny_model, tokenizer, captures, kind):
    peft = pytest.importorskip("peft")
    targets, turned = (["c_attn", "c_fc"], True) if kind == "gpt2" else (["q_proj", "up_proj"], False)
    base = tiny_model(kind, len(tokenizer))
    policy = CausalLMPolicy(base, tokenizer, device="cpu")
    policy.eos_token_ids = ()
    captures.check(policy, PROMPTS, 30, seed=0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=turned))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=turned))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    adapted = CausalLMPolicy(model, tokenizer, device="cpu")
    reference = CausalLMPolicy(model, tokenizer, device="cpu").reference(adapter=False)
    adapted.eos_token_ids = reference.eos_token_ids = ()

    def layers(change):
        for module in model.modules():
            if hasattr(module, "lora_A"):
                change(module)

    found = []
    for change in (
        lambda: None,
        lambda: model.set_adapter("other"),
        lambda: layers(lambda layer: layer.scale_layer(2.0)),
        lambda: layers(lambda layer: layer.merge()),
        lambda: model.set_adapter("default"),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: disturb(adapted),
        lambda: layers(lambda layer: layer.scaling.update(default=3.0)),
    ):
        change()
        found += [captures.check(one, PROMPTS, 20, seed=0)[0].ids for one in (adapted, policy)]
        for _ in range(3):  # in the first one the reference unmerges what is merged, and keeps nothing
            numbers = [captures.check(one, PROMPTS, 20, seed=0)[1] for one in (reference, adapted, policy)]
        assert numbers == [0, 0, 0], "what is left alone is kept"
    assert len({tuple(ids.flatten().tolist()) for ids in found}) >= 6, "the changes show"
    model.unload()
    captures.check(policy, PROMPTS, 30, seed=0)
    assert captures.check(policy, PROMPTS, 30, seed=0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_what_else_decides_the_way_of_adapters(tiny_model, tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    model = peft.get_peft_model(tiny_model("llama", len(tokenizer)), config).eval()
    before = kept_rows.fingerprint(model)
    assert before == kept_rows.fingerprint(model) is not None
    model.train()
    assert kept_rows.fingerprint(model) != before
    model.eval()
    assert kept_rows.fingerprint(model) == before
    for module in model.modules():
        module.cast_input_dtype_enabled = False
    assert kept_rows.fingerprint(model) != before
    layer = next(module for module in model.modules() if hasattr(module, "lora_variant"))
    layer.lora_variant["default"] = object()
    assert kept_rows.fingerprint(model) is None


def test_steps_under_autocast_last_for_one_loop(policy, captures):
    """Autocast computes with copies of the weights that are gone, or old, by the next one."""
    half = CausalLMPolicy(policy.model, policy.tokenizer, device="cpu", autocast="bfloat16")
    half.eos_token_ids = ()
    captures.check(policy, PROMPTS, 30, seed=0)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            _, captured = captures.check(policy, PROMPTS, 12, seed=0, tolerance=0.2, temperature=0)
        assert captured == 1
        assert captures.check(half, PROMPTS, 12, seed=0, tolerance=0.2, temperature=0)[1] == 1
        disturb(policy)
    policy.generate(PROMPTS, 12, seed=0, action_mask=half.kept_mask(Sampling(top_p=0.6)))
    assert kept(policy)
    assert not kept(half), "its decoder was made outside of its autocast"


def test_two_decoders_at_a_time_share_nothing(policy, captures):
    ids, lengths = policy.encode_prompts(PROMPTS)
    index = torch.arange(4)
    tokens = torch.randint(3, 40, (2, 12, 4), generator=torch.Generator().manual_seed(0))

    def run():
        with torch.no_grad():
            decoders = [make_decoder(policy.backbone, ids, lengths, index, 20) for _ in range(2)]
            logits = [[decoder.step(tokens[i, t]).clone() for i, decoder in enumerate(decoders)] for t in range(12)]
        return decoders, torch.stack([torch.stack(pair) for pair in logits])

    for _ in range(2):
        decoders, found = run()
        assert decoders[0]._rows is not decoders[1]._rows
        assert not kept(policy)
        del decoders
        assert len(kept(policy)) == 2
        with captures.off():
            torch.testing.assert_close(found, run()[1], atol=1e-4, rtol=1e-4)
    assert captures.captured == 2, "those of the first round have served again"


def test_a_row_may_stay_long_after_its_end(policy, captures):
    """Younger ones go on beside it: its position must not run out of a table."""
    ids, lengths = policy.encode_prompts(PROMPTS)
    steps = policy.backbone.config.max_position_embeddings - ids.shape[1]
    tokens = torch.randint(3, 40, (2 * steps - 2, 5), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def run():
        decoder = make_decoder(policy.backbone, ids, lengths, torch.arange(4), steps)
        for row in tokens[: steps - 1]:
            decoder.step(row[:4])
        decoder.admit(ids[:1], lengths[:1], torch.zeros(1, dtype=torch.int64))
        return torch.stack([decoder.step(row)[4].clone() for row in tokens[steps - 1 :]])

    for _ in range(2):
        found = run()
        with captures.off():
            torch.testing.assert_close(found, run(), atol=1e-4, rtol=1e-4)


def test_buffers_that_rows_have_left_are_free(policy, captures):
    ids, lengths = policy.encode_prompts(PROMPTS)
    with torch.no_grad():
        decoder = make_decoder(policy.backbone, ids, lengths, torch.arange(4), 40)
        first = decoder._rows
        decoder.admit(ids[:1], lengths[:1], torch.zeros(1, dtype=torch.int64))
    assert decoder._rows is not first
    assert kept(policy) == [first]


def test_a_mask_by_the_same_model(policy, captures):
    """Its decoder lives beside the loop's, and outside of inference mode."""
    mask = policy.kept_mask(Sampling(top_p=0.6))
    numbers = []
    for _ in range(3):
        captures.check(policy, PROMPTS, 20, seed=0)
        numbers.append(captures.check(policy, PROMPTS, 20, seed=0, action_mask=mask)[1])
    assert numbers == [1, 0, 0]


def test_several_batches_use_the_same_buffers(policy, captures):
    mask = policy.reference().kept_mask(Sampling(top_p=0.6))
    _, captured = captures.check(policy, PROMPTS, 20, seed=0, num_generations=6, max_batch_size=6, action_mask=mask)
    assert captured == 2, "one of the policy, one of the mask"


def test_memory_is_bounded(policy, captures, monkeypatch):
    lengths = (20, 50, 62, 78, 90)
    for length in lengths:
        assert captures.check(policy, PROMPTS, length, seed=0)[1] == 1
    assert [rows.columns for rows in kept(policy)] == [80, 96, 112, 128]
    captures.check(policy, PROMPTS, 50, seed=0)
    captures.check(policy, PROMPTS, 20, seed=0)
    assert [rows.columns for rows in kept(policy)] == [112, 128, 80, 64], "the one that was not used for longest has gone"
    limit = kept(policy)[-1].num_bytes + kept(policy)[-2].num_bytes
    monkeypatch.setattr(kept_rows, "memory_for_buffers", lambda device: limit)
    captures.check(policy, PROMPTS, 50, seed=0)
    assert [rows.columns for rows in kept(policy)] == [64, 80]
    monkeypatch.setattr(kept_rows, "memory_for_buffers", lambda device: limit // 2 - 1)
    for _ in range(2):
        assert captures.check(policy, PROMPTS, 90, seed=0)[1] == 1
    assert [rows.columns for rows in kept(policy)] == [64, 80], "what alone is too large drives nothing out"


def test_numbers_that_are_not_finite_stay_behind(policy, captures):
    captures.check(policy, PROMPTS, 30, seed=0)
    weight = next(parameter for parameter in policy.parameters() if parameter.ndim == 1)
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0] = torch.nan
    # No exception is held on to, and with it the decoder.
    with contextlib.suppress(ValueError):
        policy.generate(PROMPTS, 40, seed=0)
    assert len(kept(policy)) == 1
    assert kept(policy)[0]._table.isnan().any()
    with torch.no_grad():
        weight.copy_(before)
    assert captures.check(policy, PROMPTS, 20, seed=0)[1] == 0


def test_what_kept_buffers_hold_is_of_no_consequence(ending_policy, captures):
    """Nor where rows move into them on the way."""
    settings = {"seed": 0, "num_generations": 16, "max_batch_size": 20}
    for _ in range(3):
        captures.check(ending_policy, PROMPTS, 60, **settings)
        assert len(kept(ending_policy)) > 1
        for rows in kept(ending_policy):
            for buffer in (rows._table, rows._logits, rows._bias):
                buffer.fill_(torch.nan)


def test_longer_tables_of_positions_leave_kept_steps_right(policy, captures):
    captures.check(policy, PROMPTS, 20, seed=0)
    policy.backbone.fast_trunk.prepare(120)
    captures.check(policy, PROMPTS, 100, seed=0)
    assert captures.check(policy, PROMPTS, 20, seed=0)[1] == 0


def test_copies_have_none(policy, captures):
    captures.check(policy, PROMPTS, 30, seed=0)
    reference = policy.reference()
    assert not kept(reference)
    assert len(kept(policy)) == 1
    assert len(pickle.loads(pickle.dumps(policy.backbone.kept_rows))) == 0
    assert len(copy.copy(policy.backbone.kept_rows)) == 0
    expected, captured = captures.check(reference, PROMPTS, 30, seed=0)
    assert captured == 1
    disturb(policy)
    assert torch.equal(captures.check(reference, PROMPTS, 30, seed=0)[0].ids, expected.ids)


def test_buffers_end_with_the_model(policy, captures):
    """At once: a garbage collection may be long in coming, and they are large."""
    gc.collect()
    gc.disable()
    try:
        captures.check(policy, PROMPTS, 30, seed=0, num_generations=2)
        alive = weakref.ref(kept(policy)[0])
        policy.backbone = None
        assert alive() is None
    finally:
        gc.enable()


def test_without_captures_nothing_is_kept(policy):
    policy.generate(PROMPTS, 30, seed=0)
    assert not kept(policy)


def test_a_gpu_keeps_a_share_of_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80))
    assert kept_rows.memory_for_buffers(torch.device("cuda")) == 10
    assert kept_rows.memory_for_buffers(torch.device("cpu")) == 2**30
