import numpy as np
import pytest

from textgym.agents import perplexity
from textgym.agents.common.perplexity import completion_nats


def test_it_is_the_mean_surprise_of_the_tokens(task):
    tree, policy = task.tree, task.policy()
    prompts = [text for text in tree.prompt_texts for _ in range(tree.num_completions)]
    ids = [list(tree.ids(j)) for _ in tree.prompts for j in range(tree.num_completions)]
    exact = -tree.log_probs(policy).ravel()
    nats = completion_nats(policy, prompts, ids, batch_size=50)
    np.testing.assert_allclose(nats, exact, atol=1e-4)
    found = perplexity(policy, prompts, ids)
    assert found.tokens == 3 * tree.lengths.sum()
    assert found.nats_per_token == pytest.approx(exact.sum() / found.tokens, abs=1e-5)
    assert found.perplexity == pytest.approx(np.exp(found.nats_per_token))


def test_it_is_that_of_the_model_whatever_is_sampled(task):
    plain, sharp = task.policy(), task.policy(temperature=0.3, top_k=1)
    arguments = (["w0", "w1 w0"], [[0, 1, 2], [4]])
    assert perplexity(plain, *arguments) == perplexity(sharp, *arguments)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(task):
    policy = task.policy()
    for parameter in policy.parameters():
        parameter.data.zero_()
    assert perplexity(policy, ["w0"], [[0, 1, 4]]).perplexity == pytest.approx(5.0)


def test_texts_without_prompts_are_an_error(task):
    with pytest.raises(ValueError, match="one entry per text"):
        perplexity(task.policy(), ["w0"], [[0], [1]])
