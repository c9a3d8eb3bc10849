import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from textgym.agents import CausalLMPolicy, Sampling
from textgym.agents.common import decode_loop
from textgym.agents.common.cached_decoder import CachedDecoder
from textgym.agents.common.sampling import unpack_kept
from textgym.agents.common.trunk_decoder import TrunkDecoder

PROMPTS = ["abc", "hello there", "a", "the cat sat on the mat."]


@pytest.fixture
def policy(model, tokenizer, device):
    return CausalLMPolicy(model, tokenizer, device=device)


@pytest.fixture
def ending_policy(model, tokenizer, device):
    """A policy whose completions end early: a third of all characters end one."""
    return CausalLMPolicy(model, tokenizer, device=device, eos_token_ids=list(range(2, tokenizer.vocab_size, 3)))


def plain_log_probs(policy, generated, temperature=1.0):
    """Row by row, without padding or cache, through transformers' own forward."""
    result = torch.zeros(generated.ids.shape)
    for i, (p, n) in enumerate(zip(generated.prompt_lengths.tolist(), generated.lengths.tolist(), strict=True)):
        row = torch.cat((generated.prompt_ids[i, generated.prompt_ids.shape[1] - p :], generated.ids[i, :n]))
        with torch.no_grad():
            logits = policy.model(row[None]).logits[0, :, : policy.vocab_size] / temperature
        result[i, :n] = logits[p - 1 : -1].log_softmax(-1).gather(-1, row[p:, None])[:, 0].cpu()
    return result


def test_cached_decoding_equals_a_plain_forward(policy):
    generated = policy.generate(PROMPTS, 24, seed=3, num_generations=3)
    torch.testing.assert_close(generated.log_probs.cpu(), plain_log_probs(policy, generated), atol=1e-4, rtol=0)
    # The test is worth something only if positions and context matter: the distributions are far from uniform.
    assert generated.log_probs[generated.completion_mask].std() > 0.5


def test_left_padded_and_right_padded_forwards_agree_with_generation(policy, device):
    generated = policy.generate(PROMPTS, 12, seed=3)
    ids = torch.cat((generated.prompt_ids, generated.ids), 1)
    mask = torch.cat((torch.arange(generated.prompt_ids.shape[1], device=device).flip(0) < generated.prompt_lengths[:, None],
                      generated.completion_mask), 1)  # fmt: skip
    width = generated.prompt_ids.shape[1]
    with torch.no_grad():
        left = policy.model(ids, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    left = left[:, width - 1 : -1, : policy.vocab_size].log_softmax(-1).gather(-1, generated.ids[..., None])[..., 0]
    scores = policy.score(generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths)
    chosen = generated.completion_mask
    torch.testing.assert_close(left[chosen], generated.log_probs[chosen], atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.log_probs[chosen], left[chosen], atol=1e-4, rtol=0)


def chi_square(counts, probs):
    """The statistic in standard deviations from its mean, cells with an expectation below 5 put together."""
    expected = probs.double() * counts.sum()
    small = expected < 5
    cells = torch.cat((counts[~small].double(), counts[small].sum()[None].double()))
    means = torch.cat((expected[~small], expected[small].sum()[None]))
    cells, means = cells[means > 0], means[means > 0]
    statistic = ((cells - means) ** 2 / means).sum()
    freedom = len(cells) - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.03, "temperature": 1.4}])
@torch.no_grad()
def test_frequencies_are_those_of_the_scored_distribution(model, tokenizer, device, settings):
    policy = CausalLMPolicy(model, tokenizer, device=device, **settings)
    samples = 4000
    generated = policy.generate(["hello"], 2, seed=3, num_generations=samples)
    vocabulary = torch.arange(policy.vocab_size, device=device)
    prompt = generated.prompt_ids[:1].expand(policy.vocab_size, -1)
    ones = torch.ones_like(vocabulary)
    lengths = generated.prompt_lengths[:1].expand(policy.vocab_size)
    kept = None if generated.kept is None else generated.kept[:1, :1].expand(policy.vocab_size, -1, -1)
    first = policy.score(prompt, lengths, vocabulary[:, None], ones, keep=kept).log_probs[:, 0]
    inside = torch.ones_like(first, dtype=torch.bool) if kept is None else unpack_kept(kept[0, 0], policy.vocab_size)
    assert first[inside].exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    counts = torch.bincount(generated.ids[:, 0], minlength=policy.vocab_size)
    assert counts[~inside].sum() == 0
    assert abs(chi_square(counts, first.exp() * inside)) < 5
    # The second token, after the most frequent first one: the cache is in play.
    common = int(counts.argmax())
    rows = (generated.ids[:, 0] == common) & (generated.lengths == 2)
    pairs = torch.stack((torch.full_like(vocabulary, common), vocabulary), 1)
    kept = None if generated.kept is None else generated.kept[rows][:1].expand(policy.vocab_size, -1, -1)
    second = policy.score(prompt, lengths, pairs, 2 * ones, keep=kept).log_probs[:, 1]
    inside = torch.ones_like(second, dtype=torch.bool) if kept is None else unpack_kept(kept[0, 1], policy.vocab_size)
    counts = torch.bincount(generated.ids[rows, 1], minlength=policy.vocab_size)
    assert abs(chi_square(counts, second.exp() * inside)) < 5


def test_same_seed_same_bits_and_no_global_randomness(policy):
    before = torch.get_rng_state()
    first, second = (policy.generate(PROMPTS, 16, seed=5, num_generations=2) for _ in range(2))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.log_probs, second.log_probs)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(policy.generate(PROMPTS, 16, seed=6, num_generations=2).ids, first.ids)
    policy.seed(1)
    own = [policy.generate(PROMPTS, 8).ids for _ in range(2)]
    policy.seed(1)
    assert torch.equal(policy.generate(PROMPTS, 8).ids, own[0])
    assert not torch.equal(own[0], own[1])


def test_nothing_is_inherited_from_the_generation_config(policy):
    expected = policy.generate(PROMPTS, 12, seed=1).ids
    config = policy.model.generation_config
    config.top_k, config.temperature, config.repetition_penalty, config.do_sample, config.max_new_tokens = 1, 0.1, 5.0, False, 3
    assert torch.equal(policy.generate(PROMPTS, 12, seed=1).ids, expected)


def test_greedy_is_transformers_greedy(policy):
    policy.model.generation_config.eos_token_id = policy.eos_token_ids[0]
    generated = policy.generate(["hello there"], 20, temperature=0)
    # The extra outputs of the model are no tokens; the fixture's weights never make them the most probable here.
    expected = policy.model.generate(
        generated.prompt_ids, attention_mask=torch.ones_like(generated.prompt_ids), do_sample=False, max_new_tokens=20, pad_token_id=0,
        suppress_tokens=[policy.vocab_size, policy.vocab_size + 1, policy.vocab_size + 2],
    )[0, generated.prompt_ids.shape[1] :]  # fmt: skip
    assert generated.completion_ids[0] == expected.tolist()
    scores = policy.score(generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths)
    torch.testing.assert_close(scores.log_probs, generated.log_probs, atol=1e-4, rtol=0)


@contextlib.contextmanager
def sizes_of_passes(policy):
    """Collects how many tokens each pass of the model takes in."""
    sizes = []
    hook = policy.model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].numel()))
    yield sizes
    hook.remove()


def test_rows_are_prompt_major_and_the_prompt_is_run_once(policy):
    repeated = policy.generate([prompt for prompt in PROMPTS for _ in range(3)], 10, seed=2)
    with sizes_of_passes(policy) as sizes:
        generated = policy.generate(PROMPTS, 10, seed=2, num_generations=3)
    assert torch.equal(generated.ids, repeated.ids)
    assert torch.equal(generated.prompt_ids, repeated.prompt_ids)
    assert generated.prompt_lengths.tolist() == [len(prompt) for prompt in PROMPTS for _ in range(3)]
    assert sum(map(len, PROMPTS)) <= sizes[0] <= len(PROMPTS) * max(map(len, PROMPTS))
    # Every later step is one token wide.
    assert max(sizes[1:]) <= 3 * len(PROMPTS)


def test_eos_ends_a_row(policy):
    generated = policy.generate(PROMPTS, 40, seed=0, num_generations=16)
    eos = policy.eos_token_ids[0]
    lengths = generated.lengths.tolist()
    assert min(lengths) < max(lengths) == 40
    for row, length, reason in zip(generated.ids.tolist(), lengths, generated.finish_reasons, strict=True):
        assert eos not in row[: length - 1]
        assert (row[length - 1] == eos) == (reason == "eos")
        assert length == 40 or reason == "eos"
        assert set(row[length:]) <= {policy.fill_token_id}
    assert generated.log_probs[~generated.completion_mask].abs().sum() == 0
    assert generated.texts == [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in generated.completion_ids]


def test_several_end_tokens(model, tokenizer, device):
    ends = tokenizer.convert_tokens_to_ids(["e", "t", "<eos>"])
    policy = CausalLMPolicy(model, tokenizer, device=device, eos_token_ids=ends)
    generated = policy.generate(PROMPTS, 30, seed=0, num_generations=8)
    assert {ids[-1] for ids in generated.completion_ids if len(ids) < 30} >= set(ends[:1])
    assert all(not set(ids[:-1]) & set(ends) for ids in generated.completion_ids)


def test_dropping_finished_rows_changes_nothing(ending_policy, monkeypatch):
    policy = ending_policy
    dropped = policy.generate(PROMPTS, 40, seed=0, num_generations=16, top_p=0.95)
    monkeypatch.setattr(decode_loop, "ENDED_WORTH_DROPPING", 2)
    with sizes_of_passes(policy) as sizes:
        whole = policy.generate(PROMPTS, 40, seed=0, num_generations=16, top_p=0.95)
    assert set(sizes[1:]) == {64}
    assert torch.equal(whole.ids, dropped.ids)
    assert torch.equal(whole.lengths, dropped.lengths)
    assert torch.equal(whole.kept, dropped.kept)
    torch.testing.assert_close(whole.log_probs, dropped.log_probs, atol=1e-5, rtol=0)


def test_finished_rows_are_dropped(ending_policy):
    with sizes_of_passes(ending_policy) as sizes:
        generated = ending_policy.generate(PROMPTS, 100, seed=0, num_generations=16)
    batches = sizes[1:]
    assert len(batches) == int(generated.lengths.max()) - 1 < 99
    # Three quarters of the rows in the batch always run: rows done are at most 4/3 of the steps that count.
    assert sum(batches) <= 4 / 3 * int(generated.lengths.sum())
    assert batches[-1] <= 4


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 0.9, "temperature": 0.8}, {"min_new_tokens": 5}, {"stop_strings": "e"}, {"mask": 2}, {"mask": 1}]
)
@pytest.mark.parametrize("size", [1, 5, 20, 63])
def test_waiting_rows_take_the_places_of_finished_ones(ending_policy, size, settings):
    """Which rows are in the batch together is of no consequence."""
    policy = ending_policy
    settings = dict(settings)
    if "mask" in settings:
        legal = torch.rand(len(PROMPTS), policy.vocab_size, generator=torch.Generator().manual_seed(0)) < 0.7
        legal[:, policy.eos_token_ids[0]] = True
        settings["action_mask"] = legal if settings.pop("mask") == 2 else legal[0]
    expected = policy.generate(PROMPTS, 40, seed=0, num_generations=16, **settings)
    with sizes_of_passes(policy) as sizes:
        found = policy.generate(PROMPTS, 40, seed=0, num_generations=16, max_batch_size=size, **settings)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.stopped, expected.stopped)
    assert (found.kept is None) == (expected.kept is None)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=4e-5, rtol=0)
    if expected.kept is not None:
        assert (found.kept != expected.kept).any(-1).float().mean() < 0.01, "rounding at the edge of a set, rarely"
    longest_prefill = len(PROMPTS) * max(map(len, PROMPTS))
    assert max(sizes) <= max(size, longest_prefill)
    if policy.backbone.fast_trunk is not None and size == 5:
        # Full of running rows almost to the end.
        steps = sum(1 for one in sizes if one <= size)
        assert steps * size < 1.8 * int(expected.lengths.sum()) + 40 * size


def test_waiting_rows_behind_a_mask_that_follows_rows(ending_policy, tokenizer, device):
    policy = ending_policy
    arguments = {"num_generations": 8, "seed": 0, "action_mask": policy.reference().kept_mask(Sampling(top_p=0.6))}
    expected = policy.generate(PROMPTS, 20, **arguments)
    found = policy.generate(PROMPTS, 20, max_batch_size=6, **arguments)
    assert torch.equal(found.ids, expected.ids)


def test_extra_padding_changes_nothing(policy, device):
    prompt_ids, lengths = policy.encode_prompts(PROMPTS)
    expected = policy.generate((prompt_ids, lengths), 10, seed=4)
    junk = torch.randint(0, 10_000_000, (len(PROMPTS), 9), device=device)
    wide = policy.generate((torch.cat((junk, prompt_ids), 1), lengths), 10, seed=4)
    assert torch.equal(wide.ids, expected.ids)
    assert torch.equal(wide.log_probs, expected.log_probs)


def test_min_new_tokens_leaves_eos_out_of_the_distribution(ending_policy):
    policy = ending_policy
    generated = policy.generate(PROMPTS, 30, seed=0, num_generations=16, min_new_tokens=12)
    ends = torch.tensor(policy.eos_token_ids, device=policy.device)
    assert not torch.isin(generated.ids[:, :12], ends).any()
    assert generated.lengths.min() == 13
    scores = policy.score(generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths, keep=generated.kept)
    torch.testing.assert_close(scores.log_probs, generated.log_probs, atol=1e-4, rtol=0)
    plain = policy.score(generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths)
    # EOS was taken out before, so what is left is more probable than the model alone says.
    assert (scores.log_probs - plain.log_probs)[:, :12].mean() > 1e-4


def test_stop_strings_end_a_row_with_the_token_that_completes_one(policy):
    free = policy.generate(PROMPTS, 40, seed=0, num_generations=8)
    stops = [free.texts[0][3:5], free.texts[1][7:8]]
    generated = policy.generate(PROMPTS, 40, seed=0, num_generations=8, stop_strings=stops)
    assert "stop" in generated.finish_reasons
    for ids, text, whole, reason in zip(
        generated.completion_ids, generated.texts, free.completion_ids, generated.finish_reasons, strict=True
    ):
        assert ids == whole[: len(ids)]
        assert any(stop in text for stop in stops) == (reason == "stop")
        assert not any(stop in policy.decode_texts([()], [ids[:-1]])[0] for stop in stops)
    one = policy.generate(PROMPTS, 40, seed=0, num_generations=8, stop_strings=stops[1])
    assert one.finish_reasons.count("stop") > 0


def test_an_action_mask_is_sampled_and_scored(ending_policy, device):
    policy = ending_policy
    legal = torch.zeros(len(PROMPTS), policy.vocab_size, dtype=torch.bool, device=device)
    for row in range(len(PROMPTS)):
        legal[row, 3 + row :: 4] = True
    generated = policy.generate(PROMPTS, 12, seed=0, num_generations=4, action_mask=legal)
    assert generated.lengths.min() < generated.lengths.max(), "some rows are dropped before others end"
    allowed = legal.repeat_interleave(4, 0)
    assert allowed.gather(1, generated.ids)[generated.completion_mask].all()
    assert torch.equal(unpack_kept(generated.kept, policy.vocab_size)[:, 0], allowed)
    scores = policy.score(generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths, keep=generated.kept)
    torch.testing.assert_close(scores.log_probs, generated.log_probs, atol=1e-4, rtol=0)
    shared = policy.generate(PROMPTS, 12, seed=0, action_mask=legal[0])
    assert legal[0][shared.ids[shared.completion_mask]].all()


def test_a_masker_follows_the_rows(ending_policy, tokenizer, device):
    policy = ending_policy
    other = CausalLMPolicy(policy.model.__class__(policy.model.config), tokenizer, device=device)
    other.load_state_dict({name: tensor.flip(0) if tensor.ndim > 1 else tensor for name, tensor in policy.state_dict().items()})
    sampling = Sampling(top_p=0.6)
    generated = policy.generate(PROMPTS, 40, seed=0, num_generations=8, action_mask=other.kept_mask(sampling))
    assert generated.lengths.min() < 20, "rows must have been dropped for this test to mean anything"
    kept_by_other = other.score(
        generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths, sampling=sampling, return_keep=True
    ).kept
    same = (kept_by_other == generated.kept).all(-1)[generated.completion_mask].float().mean()
    assert same > 0.99, "sets may differ by rounding at their edge, rarely"
    scores = policy.score(generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths, keep=generated.kept)
    torch.testing.assert_close(scores.log_probs, generated.log_probs, atol=1e-4, rtol=0)


def test_a_mask_without_legal_tokens_is_an_error(policy, device):
    eos_only = torch.zeros(policy.vocab_size, dtype=torch.bool, device=device)
    eos_only[policy.eos_token_ids[0]] = True
    assert policy.generate(PROMPTS, 5, action_mask=eos_only).lengths.tolist() == [1] * 4
    with pytest.raises(ValueError, match=r"`action_mask` .* left a row without any legal token"):
        policy.generate(PROMPTS, 5, action_mask=eos_only, min_new_tokens=2)
    with pytest.raises(ValueError, match=r"`action_mask` must have the shape \(V,\)"):
        policy.generate(PROMPTS, 5, action_mask=eos_only[:-1])


class _ReadsBack(TorchDispatchMode):
    """Counts what makes the host wait for an accelerator: values read back, and results whose shape depends on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITS or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class _LateAnswers:
    """In place of pinned memory and an event: the answer comes three polls after the question."""

    def __init__(self):
        self.polls = 0

    def record(self):
        self.polls = 0

    def query(self):
        self.polls += 1
        return self.polls >= 3


@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8}])
def test_nothing_in_the_loop_waits_for_the_device(ending_policy, monkeypatch, settings):
    policy = ending_policy
    expected = policy.generate(PROMPTS, 100, seed=0, num_generations=2, min_new_tokens=2, **settings)

    def asynchronous(self, device):
        self._answer, self._event = None, _LateAnswers()

    monkeypatch.setattr(decode_loop._FinishWatch, "__init__", asynchronous)
    mode = _ReadsBack()
    steps = []
    decoder = CachedDecoder if policy.backbone.fast_trunk is None else TrunkDecoder
    choose, step = decode_loop._DecodeLoop._choose, decoder.step

    def watched(function):
        def call(*args):
            steps.append(function)
            with mode:
                return function(*args)

        return call

    monkeypatch.setattr(decode_loop._DecodeLoop, "_choose", watched(choose))
    monkeypatch.setattr(decoder, "step", watched(step))
    generated = policy.generate(PROMPTS, 100, seed=0, num_generations=2, min_new_tokens=2, **settings)
    assert mode.found == []
    assert torch.equal(generated.ids, expected.ids)
    # The late answer still ends the loop, a few steps after the longest row.
    longest = int(generated.lengths.max())
    assert longest <= steps.count(choose) <= longest + 6


@pytest.mark.parametrize("size", [None, 3])
def test_late_answers_never_take_a_step_too_many(policy, monkeypatch, size):
    """Where completions run to their full length, there is no room in the cache behind it."""
    arguments = {"seed": 0, "num_generations": 2, "max_batch_size": size}
    policy.eos_token_ids = ()
    expected = policy.generate(PROMPTS, 9, **arguments)

    def asynchronous(self, device):
        self._answer, self._event = None, _LateAnswers()

    monkeypatch.setattr(decode_loop._FinishWatch, "__init__", asynchronous)
    assert torch.equal(policy.generate(PROMPTS, 9, **arguments).ids, expected.ids)
    assert expected.lengths.tolist() == [9] * 8


def test_ended_rows_stay_within_the_positions_there_are(tiny_model, model_type, tokenizer, device, monkeypatch):
    """A row that has ended stays in the batch while younger ones go on: its place must not run out of a table of positions."""
    monkeypatch.setattr(decode_loop, "ENDED_WORTH_DROPPING", 0.9)
    model = tiny_model(model_type, len(tokenizer))
    width = max(map(len, PROMPTS))
    limit = int(model.config.max_position_embeddings)
    policy = CausalLMPolicy(model, tokenizer, device=device, eos_token_ids=tokenizer.convert_tokens_to_ids(["e"]))
    steps = limit - width
    expected = policy.generate(PROMPTS, steps, seed=0, num_generations=8)
    found = policy.generate(PROMPTS, steps, seed=0, num_generations=8, max_batch_size=10)
    assert torch.equal(found.ids, expected.ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_on_cuda(policy, monkeypatch):
    if policy.device.type != "cuda":
        pytest.skip("the models are on the CPU")

    def guarded(function):
        def call(*args):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    policy.generate(PROMPTS, 4, seed=0)
    decoder = CachedDecoder if policy.backbone.fast_trunk is None else TrunkDecoder
    for owner, name in ((decode_loop._DecodeLoop, "_choose"), (decoder, "step"), (decode_loop._FinishWatch, "ended")):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    policy.generate(PROMPTS, 20, seed=0, top_p=0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"num_generations": 0}, "`num_generations` must be at least 1, got 0"),
        ({"min_new_tokens": 50}, "`min_new_tokens` must be between 0 and `max_new_tokens`"),
        ({"temperature": -1.0}, "`temperature`"),
        ({"top_p": 2.0}, "`top_p`"),
        ({"seed": 0, "generator": torch.Generator()}, "`seed` or `generator`"),
        ({"prompts": "hello"}, "`prompts` must be a list of prompts, got one string"),
        ({"prompts": []}, "`prompts` must hold at least one prompt"),
        ({"prompts": [[3, 4], []]}, "none in the rows"),
        ({"prompts": [[3, 46]]}, "ids from 0 to 45"),
        ({"prompts": (torch.ones(2, 3), torch.tensor([3]))}, r"left-padded ids \(B, P\) and lengths"),
        ({"prompts": (torch.ones(2, 3), torch.tensor([3, 0]))}, "lengths must be from 1 to P = 3"),
    ],
)
def test_wrong_arguments_are_refused(policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        policy.generate(**{"prompts": PROMPTS, **arguments})


def test_learned_positions_run_out_with_a_clear_message(policy):
    if policy.backbone.max_positions is None:
        with pytest.warns(UserWarning, match=r"needs 153 positions .* but the model was trained on 0 to 127"):
            assert policy.generate(PROMPTS, 130, temperature=0).ids.shape == (4, 130)
        return
    with pytest.raises(ValueError, match=r"needs 153 positions .* but the model has 128"):
        policy.generate(PROMPTS, 130)


def test_broken_weights_are_named(policy):
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(ValueError, match="`model` gave logits that are not finite"):
        policy.generate(PROMPTS, 5)
