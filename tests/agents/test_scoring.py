import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from textgym.agents import CausalLMPolicy, Sampling, ValueHead
from textgym.agents.common import scoring
from textgym.agents.common.layout import lay_out
from textgym.agents.common.sampling import unpack_kept

PROMPTS = ["abc", "hello there", "a", "the cat sat on the mat."]
SETTINGS = [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.5}, {"min_p": 0.05}]


@pytest.fixture
def policy(model, tokenizer, device):
    return CausalLMPolicy(model, tokenizer, device=device)


@pytest.fixture
def generated(policy):
    return policy.generate(PROMPTS, 20, seed=1, num_generations=4)


def rows_of(generated):
    return generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths


@pytest.mark.parametrize("settings", SETTINGS)
def test_scores_equal_the_log_probs_of_generation(model, tokenizer, device, settings):
    policy = CausalLMPolicy(model, tokenizer, device=device, **settings)
    generated = policy.generate(PROMPTS, 20, seed=1, num_generations=4)
    scores = policy.score(*rows_of(generated), keep=generated.kept, return_keep=True)
    torch.testing.assert_close(scores.log_probs, generated.log_probs, atol=1e-4, rtol=0)
    ratio = torch.exp(scores.log_probs - generated.log_probs)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)
    if generated.kept is not None:
        assert torch.equal(scores.kept, generated.kept)
        # Recomputed sets are those of generation but for rounding at their edges.
        again = policy.score(*rows_of(generated), return_keep=True)
        assert (again.kept == generated.kept).all(-1).float().mean() > 0.98
        unpacked = unpack_kept(again.kept, policy.vocab_size)
        assert unpacked.gather(-1, generated.ids[..., None])[..., 0][generated.completion_mask].all()


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_reference_starts_without_divergence(model, tokenizer, device, settings):
    policy = CausalLMPolicy(model, tokenizer, device=device, **settings)
    generated = policy.generate(PROMPTS, 10, seed=1)
    reference = policy.reference()
    own = policy.score(*rows_of(generated), keep=generated.kept).log_probs
    other = reference.score(*rows_of(generated), keep=generated.kept).log_probs
    torch.testing.assert_close(own, other, atol=1e-6, rtol=0)


def test_dropout_in_the_model_is_off(tiny_model, tokenizer, device, model_type):
    model = tiny_model(model_type, len(tokenizer), dropout=0.5)
    policy = CausalLMPolicy(model, tokenizer, device=device)
    policy.train()
    policy.set_training_mode(True)
    generated = policy.generate(PROMPTS, 12, seed=0)
    model.train()  # a user, or a trainer, that goes past the policy
    scores = policy.score(*rows_of(generated))
    torch.testing.assert_close(scores.log_probs, generated.log_probs, atol=1e-4, rtol=0)
    model.train()
    assert torch.equal(policy.generate(PROMPTS, 12, seed=0).ids, generated.ids)


def test_entropy_and_log_probs_are_those_of_a_plain_forward(policy, generated):
    policy.sampling = Sampling(temperature=1.3)
    scores = policy.score(*rows_of(generated), entropy=True, hidden=True)
    for i in range(0, 16, 5):
        p, n = int(generated.prompt_lengths[i]), int(generated.lengths[i])
        row = torch.cat((generated.prompt_ids[i, generated.prompt_ids.shape[1] - p :], generated.ids[i, :n]))
        with torch.no_grad():
            outputs = policy.model(row[None], output_hidden_states=True)
        logits = outputs.logits[0, p - 1 : -1, : policy.vocab_size] / 1.3
        expected = torch.distributions.Categorical(logits=logits)
        torch.testing.assert_close(scores.entropy[i, :n], expected.entropy(), atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.log_probs[i, :n], expected.log_prob(row[p:]), atol=1e-4, rtol=0)
        # hidden[t] is the state that predicts token t: the last hidden state one position before it.
        torch.testing.assert_close(scores.hidden[i, :n], outputs.hidden_states[-1][0, p - 1 : -1], atol=1e-4, rtol=1e-4)
    padding = ~generated.completion_mask
    assert padding.any()
    for tensor in (scores.log_probs, scores.entropy, scores.hidden):
        assert tensor[padding].abs().sum() == 0


def test_entropy_of_a_truncated_distribution(policy, generated):
    policy.sampling = Sampling(top_k=3)
    scores = policy.score(*rows_of(generated), entropy=True)
    assert scores.entropy.max() <= torch.tensor(4.0).log()  # 3 tokens, and the sampled one where it is none of them
    scores.entropy.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in policy.parameters())


def gradient(policy, *rows, **options):
    """The gradient of a loss that weighs every token differently, and the per-token log-probs."""
    policy.zero_grad()
    scores = policy.score(*rows, entropy=True, **options)
    weights = torch.linspace(0.5, 2.0, scores.log_probs.shape[1], device=policy.device)
    ((scores.log_probs + 0.3 * scores.entropy) * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}, scores.log_probs.detach()


def assert_same_gradient(first, second):
    for name, value in first.items():
        scale = value.abs().max().clamp(min=1.0)
        torch.testing.assert_close(second[name] / scale, value / scale, atol=2e-5, rtol=0)


def test_shuffling_padding_and_micro_batches_change_nothing(policy, generated, device):
    rows = rows_of(generated)
    expected, log_probs = gradient(policy, *rows)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled, shuffled_log_probs = gradient(policy, *(tensor[order] for tensor in rows))
    torch.testing.assert_close(shuffled_log_probs, log_probs[order], atol=1e-5, rtol=0)
    assert_same_gradient(expected, shuffled)
    # Padding on both sides, full of ids that no model has.
    prompt_ids, prompt_lengths, ids, lengths = rows
    prompt_ids = torch.where(torch.arange(prompt_ids.shape[1], device=device).flip(0) < prompt_lengths[:, None], prompt_ids, -100)
    ids = torch.where(generated.completion_mask, ids, 10**6)
    junk = torch.full((16, 7), -1, device=device)
    padded, padded_log_probs = gradient(policy, torch.cat((junk, prompt_ids), 1), prompt_lengths, torch.cat((ids, junk), 1), lengths)
    torch.testing.assert_close(padded_log_probs[:, : ids.shape[1]], log_probs, atol=1e-5, rtol=0)
    # The weights of the loss depend on the width, so compare under the same width.
    wide, _ = gradient(policy, *rows[:2], torch.cat((rows[2], torch.zeros_like(junk)), 1), lengths)
    assert_same_gradient(wide, padded)
    policy.zero_grad()
    parts = [gradient(policy, *(tensor[start : start + 5] for tensor in rows))[0] for start in range(0, 16, 5)]
    assert_same_gradient(expected, {name: sum(part[name] for part in parts) for name in expected})


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "temperature": 0.8}])
def test_chunks_change_neither_values_nor_gradients(model, tokenizer, device, monkeypatch, settings):
    policy = CausalLMPolicy(model, tokenizer, device=device, **settings)
    generated = policy.generate(PROMPTS, 20, seed=1, num_generations=4)
    expected, log_probs = gradient(policy, *rows_of(generated), keep=generated.kept)
    monkeypatch.setattr(scoring, "PLAIN_LOGITS", 0)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 7 * policy.vocab_size + 1)
    chunked, chunked_log_probs = gradient(policy, *rows_of(generated), keep=generated.kept)
    torch.testing.assert_close(chunked_log_probs, log_probs, atol=1e-6, rtol=0)
    assert_same_gradient(expected, chunked)


class _Largest(TorchDispatchMode):
    """The most elements that any float tensor had, weights and their gradients (V rows) left out."""

    def __init__(self, but):
        super().__init__()
        self.elements, self._but = 0, but

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and self._but not in tensor.shape[:-1]:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_all_logits_exists(tiny_model, tokenizer, device, monkeypatch):
    vocab_size = 1031
    policy = CausalLMPolicy(tiny_model("llama", vocab_size), tokenizer, device=device)
    policy.vocab_size = policy.backbone.vocab_size = vocab_size
    rows = torch.randint(0, vocab_size, (16, 6), device=device), torch.full((16,), 6, device=device)
    completions = torch.randint(0, vocab_size, (16, 24), device=device), torch.full((16,), 24, device=device)
    whole = 16 * 24 * vocab_size
    with _Largest(but=vocab_size) as plain:
        gradient(policy, *rows, *completions)
    assert plain.elements == whole, "the measurement sees the logits where they are made at once"
    monkeypatch.setattr(scoring, "PLAIN_LOGITS", whole - 1)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 8 * vocab_size)
    with _Largest(but=vocab_size) as chunked:
        gradient(policy, *rows, *completions)
        with torch.no_grad():
            policy.score(*rows, *completions, entropy=True)
            policy.sequence_full_kl(policy, *rows, *completions)
            policy.paired_sequence_log_probs(policy, *rows, *completions)
    assert chunked.elements <= policy.hidden_size * vocab_size, "nothing is larger than the gradient of the head's weight"


def test_the_backward_pass_keeps_no_logits(policy, generated, monkeypatch):
    def saved_logits():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
            policy.score(*rows_of(generated), entropy=True)
        # The extra outputs of the model come off before the distribution is made.
        return sum(
            tensor.numel() for tensor in saved if tensor.ndim and tensor.is_floating_point() and tensor.shape[-1] == policy.vocab_size
        )

    assert saved_logits() > 0
    monkeypatch.setattr(scoring, "PLAIN_LOGITS", 0)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 7 * policy.vocab_size)
    assert saved_logits() == 0


def test_a_chosen_token_counts_as_kept(policy, generated):
    """Rounding at the edge of a kept set must not make a token that was drawn impossible: the set then has one token more."""
    prompt_ids, prompt_lengths = generated.prompt_ids[:1], generated.prompt_lengths[:1]
    one = torch.ones_like(prompt_lengths)
    plain = torch.cat([policy.score(prompt_ids, prompt_lengths, one[:, None] * v, one).log_probs for v in range(policy.vocab_size)])[:, 0]
    order = plain.argsort(descending=True)
    policy.sampling = Sampling(top_k=3)
    for rank in (0, 2, 3, 20):
        token = order[rank]
        mass = plain[order[:3]].exp().sum() + (plain[token].exp() if rank >= 3 else 0)
        scores = policy.score(prompt_ids, prompt_lengths, token[None, None], one, entropy=True)
        torch.testing.assert_close(scores.log_probs[0, 0], plain[token] - mass.log(), atol=1e-4, rtol=0)
        first, second = policy.paired_sequence_log_probs(policy, prompt_ids, prompt_lengths, token[None, None], one)
        assert first == second == pytest.approx(scores.log_probs.item(), abs=1e-4)


def test_the_head_is_applied_to_completion_tokens_only(policy, generated, monkeypatch):
    seen = []
    logits = policy.backbone.logits
    monkeypatch.setattr(policy.backbone, "logits", lambda features: seen.append(features.shape[0]) or logits(features))
    policy.score(*rows_of(generated))
    assert seen == [int(generated.lengths.sum())]


def test_logits_beyond_the_vocabulary_are_removed(policy, generated):
    """The model has three outputs more than there are tokens; made huge, they must matter nowhere."""
    before = policy.score(*rows_of(generated), entropy=True)
    head = policy.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[policy.vocab_size :] = 100.0 * head.weight[3]
    after = policy.score(*rows_of(generated), entropy=True)
    torch.testing.assert_close(after.log_probs, before.log_probs)
    torch.testing.assert_close(after.entropy, before.entropy)
    assert torch.equal(policy.generate(PROMPTS, 20, seed=1, num_generations=4).ids, generated.ids)


def test_rows_without_tokens_and_whole_batches_without_tokens(policy, generated):
    prompt_ids, prompt_lengths, ids, lengths = rows_of(generated)
    expected = policy.score(prompt_ids, prompt_lengths, ids, lengths).log_probs
    some = lengths.clone()
    some[::2] = 0
    scores = policy.score(prompt_ids, prompt_lengths, ids, some, entropy=True, hidden=True).log_probs
    assert scores[::2].abs().sum() == 0
    torch.testing.assert_close(scores[1::2], expected[1::2], atol=1e-5, rtol=0)
    none = policy.score(prompt_ids, prompt_lengths, ids, torch.zeros_like(lengths), entropy=True)
    assert none.log_probs.abs().sum() == 0
    none.log_probs.sum().backward()


def test_a_value_head_reads_the_hidden_states(policy, generated, device):
    head = ValueHead(policy.hidden_size).to(device)
    torch.nn.init.normal_(head.output.weight)
    scores = policy.score(*rows_of(generated), values=head, hidden=True)
    torch.testing.assert_close(scores.values, head(scores.hidden) * generated.completion_mask)
    scores.values.sum().backward()
    assert head.output.weight.grad.abs().sum() > 0
    assert policy.model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_frozen_policy_gives_no_gradient(policy, generated):
    reference = policy.reference()
    assert not reference.score(*rows_of(generated), entropy=True).log_probs.requires_grad
    reference.requires_grad_(True)
    assert not reference.score(*rows_of(generated), entropy=True).log_probs.requires_grad
    assert policy.score(*rows_of(generated)).log_probs.requires_grad
    with torch.no_grad():
        assert not policy.score(*rows_of(generated)).log_probs.requires_grad


def test_given_kept_sets_replace_the_policys_own(policy, generated):
    """A reference is renormalised over the behaviour policy's set, not over its own."""
    sampled = policy.generate(PROMPTS, 10, seed=1, top_k=4)
    reference = policy.reference()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(parameter.device))
    scores = reference.score(*rows_of(sampled), keep=sampled.kept, sampling=Sampling(top_k=2))
    plain = reference.score(*rows_of(sampled), sampling=Sampling())
    kept = unpack_kept(sampled.kept, policy.vocab_size)[sampled.completion_mask]
    layout = lay_out(*rows_of(sampled))
    with torch.no_grad():
        features = reference.backbone.features(layout.input_ids, None, None)[layout.rows, layout.columns]
        probs = reference.backbone.logits(features).softmax(-1)
    expected = (probs.gather(-1, layout.targets[:, None])[:, 0] / (probs * kept).sum(-1)).log()
    torch.testing.assert_close(scores.log_probs[sampled.completion_mask], expected, atol=1e-4, rtol=0)
    assert (scores.log_probs - plain.log_probs)[sampled.completion_mask].min() > 0


def test_bfloat16_stays_within_its_tolerance(tiny_model, tokenizer, device, model_type):
    """In bfloat16 decoding and scoring round differently: a tenth of a nat at worst here, so ratios must be rescored or truncated."""
    model = tiny_model(model_type, len(tokenizer), scale=0.2).to(torch.bfloat16)
    policy = CausalLMPolicy(model, tokenizer, device=device)
    generated = policy.generate(PROMPTS, 20, seed=1, num_generations=4)
    scores = policy.score(*rows_of(generated))
    assert scores.log_probs.dtype == generated.log_probs.dtype == torch.float32
    difference = (scores.log_probs - generated.log_probs)[generated.completion_mask].abs()
    assert difference.mean() < 0.02
    assert difference.max() < 0.25
