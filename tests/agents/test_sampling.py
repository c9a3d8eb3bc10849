import numpy as np
import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from textgym.agents import Sampling
from textgym.agents.common.sampling import distribution_entropy, draw, kept_tokens, pack_kept, token_log_probs, unpack_kept


def random_logits(rows=64, vocab_size=50, seed=0):
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"top_k": 9, "top_p": 0.6}, [TopKLogitsWarper(9), TopPLogitsWarper(0.6)]),
        ({"top_k": 20, "top_p": 0.9, "min_p": 0.05}, [TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)]),
    ],
)
def test_kept_sets_are_those_of_transformers(settings, warpers):
    logits = random_logits()
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    assert torch.equal(kept_tokens(logits, Sampling(**settings)), expected > -torch.inf)


def test_kept_sets_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert kept_tokens(logits, Sampling()) is None
    assert kept_tokens(logits, Sampling(top_k=2)).tolist() == [[True, True, False, False]]
    # Mass 0.7 is not reached by the first alone and is by the first two; 0.5 is reached by the first exactly.
    assert kept_tokens(logits, Sampling(top_p=0.7)).tolist() == [[True, True, False, False]]
    assert kept_tokens(logits, Sampling(top_p=0.5)).tolist() == [[True, False, False, False]]
    assert kept_tokens(logits, Sampling(min_p=0.3)).tolist() == [[True, True, False, False]]
    # Equal probabilities share one fate, whatever order a sort leaves them in.
    assert kept_tokens(logits, Sampling(top_p=0.8)).tolist() == [[True, True, True, True]]
    assert kept_tokens(logits, Sampling(top_k=3)).tolist() == [[True, True, True, True]]


def test_legal_tokens_come_before_truncation():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    legal = torch.tensor([False, True, True, True])
    assert kept_tokens(logits, Sampling(), legal).tolist() == [[False, True, True, True]]
    assert kept_tokens(logits, Sampling(top_k=1), legal).tolist() == [[False, True, False, False]]
    # Of the legal mass 0.5, token 1 has half.
    assert kept_tokens(logits, Sampling(top_p=0.4), legal).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be a finite number above 0, got 0.0"),
        ({"temperature": float("inf")}, "`temperature`"),
        ({"temperature": float("nan")}, "`temperature`"),
        ({"top_k": -1}, "`top_k` must be a whole number >= 0"),
        ({"top_k": 2.5}, "`top_k`"),
        ({"top_p": 0.0}, "`top_p` must be in"),
        ({"top_p": 1.1}, "`top_p`"),
        ({"min_p": 1.0}, "`min_p` must be in"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("vocab_size", [30, 1024, 3000])
def test_draws_follow_the_distribution_exactly(vocab_size):
    logits = random_logits(rows=1, vocab_size=vocab_size)
    draws = 100_000 if vocab_size < 1000 else 10_000
    # A grid of numbers instead of random ones: every count is then within one of its expectation.
    grid = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens, log_probs = draw(logits.expand(draws, -1), grid)
    counts = torch.bincount(tokens, minlength=vocab_size)
    expected = logits[0].double().softmax(-1) * draws
    assert (counts - expected).abs().max() <= 1.0
    torch.testing.assert_close(log_probs, logits[0].log_softmax(-1)[tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("first", "second"), [(2, 4), (2, 3900), (1100, 1101), (1100, 2600)])
def test_draws_never_leave_the_kept_set(first, second):
    logits = torch.full((4, 4000), -torch.inf)
    logits[:, first], logits[:, second] = 0.3, -10.0
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53, 1.0], dtype=torch.float64)
    tokens, _ = draw(logits, uniforms)
    assert tokens.tolist() == [first, first, second, second]
    logits[:, second] = -torch.inf
    tokens, log_probs = draw(logits, uniforms)
    assert tokens.tolist() == [first] * 4
    assert log_probs.tolist() == [0.0] * 4


def test_rare_tokens_keep_their_probability():
    """A token of probability 1e-9 is hit by the numbers in its interval, which float32 sums would not resolve."""
    logits = torch.tensor([[0.0, -20.723, 0.0, 0.0]])  # 1/3, 3.3e-10, 1/3, 1/3
    share = logits.double().softmax(-1)[0]
    edges = share.cumsum(0)
    uniforms = torch.stack((edges[0] - 1e-12, edges[0] + 1e-12, edges[1] - 1e-12, edges[1] + 1e-12))
    tokens, _ = draw(logits.expand(4, -1), uniforms)
    assert tokens.tolist() == [0, 1, 1, 2]


def test_a_row_is_drawn_alone():
    logits = random_logits()
    uniforms = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    tokens, log_probs = draw(logits, uniforms)
    shuffled = draw(logits[order][:13], uniforms[order][:13])
    assert torch.equal(shuffled[0], tokens[order][:13])
    assert torch.equal(shuffled[1], log_probs[order][:13])


def test_log_probs_and_entropy_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log().requires_grad_()
    entropy = distribution_entropy(logits)
    assert entropy.item() == pytest.approx(1.5 * np.log(2))
    assert token_log_probs(logits, torch.tensor([1])).item() == pytest.approx(np.log(0.25))
    (entropy + token_log_probs(logits, torch.tensor([0]))).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 46, 513])
def test_packing_is_numpys(vocab_size):
    kept = torch.rand(3, 5, vocab_size, generator=torch.Generator().manual_seed(0)) < 0.4
    packed = pack_kept(kept)
    np.testing.assert_array_equal(packed.numpy(), np.packbits(kept.numpy(), axis=-1, bitorder="little"))
    assert torch.equal(unpack_kept(packed, vocab_size), kept)
