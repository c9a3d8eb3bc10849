import pytest
import torch

from textgym.agents import CausalLMPolicy


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.5}, {"min_p": 0.05}])
def test_scores_equal_the_log_probs_of_generation(model, tokenizer, device, settings):
    policy = CausalLMPolicy(model, tokenizer, device=device, **settings)
    generated = policy.generate(["abc", "hello there", "a"], 20, seed=1, num_generations=4)
    scores = policy.score(generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths, keep=generated.kept)
    torch.testing.assert_close(scores.log_probs, generated.log_probs, atol=1e-4, rtol=0)
