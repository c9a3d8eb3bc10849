"""Packed rows: law 1 (the same log-probs for learned and rotary positions), and that no completion sees another."""

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from textgym.agents.common.offline_batches import CompletionBatch, ExampleSet
from textgym.agents.common.offline_rows import Example
from textgym.agents.common.offline_tokens import TokenisedExample
from textgym.agents.common.packing import check_packing, first_fit, pack, score_packed, visibility
from textgym.agents.policy import CausalLMPolicy

EXAMPLES = [
    TokenisedExample([5, 6, 7], [[8, 9], [10, 11, 12, 2]]),
    TokenisedExample([9], [[2]]),
    TokenisedExample([20, 21], [[22, 23, 24]]),
    TokenisedExample([13, 5], [[6], [7, 8, 2], [30, 31]]),
]


def batch(device: str, examples: list[TokenisedExample] = EXAMPLES) -> CompletionBatch:
    data = ExampleSet([Example("", [])] * len(examples), examples)
    return data.completion_batch(np.arange(data.num_completions), torch.device(device))


def plain(policy: CausalLMPolicy, rows: CompletionBatch) -> torch.Tensor:
    return policy.score(rows.prompt_ids, rows.prompt_lengths, rows.completion_ids, rows.lengths).log_probs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_log_probs_and_gradients_are_those_of_padded_rows(model, tokenizer, device, attention) -> None:
    model.set_attn_implementation(attention)
    policy = CausalLMPolicy(model, tokenizer, device=device)
    rows = batch(device)
    found = []
    for scored in (plain(policy, rows), score_packed(policy, rows)):
        weights = torch.linspace(-1, 1, scored.numel(), device=device).reshape(scored.shape)
        gradients = torch.autograd.grad((weights * scored).sum(), list(policy.parameters()), allow_unused=True)
        found.append((scored, torch.cat([g.flatten() for g in gradients if g is not None])))
    (first, first_gradient), (second, second_gradient) = found
    assert first.abs().max() > 1
    torch.testing.assert_close(second, first, atol=1e-4, rtol=0)
    torch.testing.assert_close(second_gradient, first_gradient, atol=1e-4 * float(first_gradient.abs().max()), rtol=0)


def test_a_completion_does_not_depend_on_its_neighbours(model, tokenizer, device) -> None:
    policy = CausalLMPolicy(model, tokenizer, device=device)
    first_prompt = EXAMPLES[0]._replace(completions=[EXAMPLES[0].completions[0], [33, 34, 35, 36]])
    others = [first_prompt, EXAMPLES[1], EXAMPLES[2]._replace(prompt=[40, 41])]
    first, second = (score_packed(policy, batch(device, examples)) for examples in (EXAMPLES[:3], others))
    torch.testing.assert_close(second[[0, 2]], first[[0, 2]], atol=1e-5, rtol=0)
    assert (second[[1, 3]] - first[[1, 3]]).abs().max() > 0.1


def test_rows_by_hand() -> None:
    layout = pack(batch("cpu", EXAMPLES[:3]))
    # widths: prompt 3 + inputs 1 + 3; 1 + 0; 2 + 2, so the second and third share a row
    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 10, 11, 12], [20, 21, 22, 23, 9, 0, 0]]
    assert layout.position_ids is not None and layout.visible is not None
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 5], [0, 1, 2, 3, 0, 0, 0]]
    assert layout.rows.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert layout.columns.tolist() == [2, 3, 2, 4, 5, 6, 4, 1, 2, 3]
    assert layout.targets.tolist() == [8, 9, 10, 11, 12, 2, 2, 22, 23, 24]
    seen = [row.nonzero().flatten().tolist() for row in layout.visible[0, 0]]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 4, 5], [0, 1, 2, 4, 5, 6]]
    assert layout.visible[1, 0, 4].nonzero().flatten().tolist() == [4]


def test_padding_is_seen_by_no_token() -> None:
    seen = visibility(torch.tensor([[0, 1, -1, -1]]), torch.tensor([[0, 0, -1, -1]]))[0]
    assert not seen[:2, 2:].any()
    assert seen.any(1).all()  # a query that sees nothing would be NaN


def test_a_row_may_be_longer_than_the_models_positions(tiny_model, tokenizer, device) -> None:
    policy = CausalLMPolicy(tiny_model("gpt2", len(tokenizer), positions=7), tokenizer, device=device)
    rows = batch(device, [TokenisedExample([5, 6, 7], [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]])])
    assert pack(rows).input_ids.shape[1] == 12
    torch.testing.assert_close(score_packed(policy, rows), plain(policy, rows), atol=1e-4, rtol=0)


def test_first_fit_fills_bins() -> None:
    assert first_fit([3, 7, 4, 2, 5], 7) == [[1], [4, 3], [2, 0]]


def test_a_model_that_makes_its_own_mask_is_refused(tokenizer) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), sliding_window=4, **sizes))
    with pytest.raises(ValueError, match="`packing` must be False"):
        check_packing(CausalLMPolicy(model, tokenizer, device="cpu"))
