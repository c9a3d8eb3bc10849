"""SFT: the gradient of one step, what it converges to, what the loss counts."""

from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents import SFT
from textgym.exact import TokenTree, completion_distance, hard_tree
from textgym.exact.gradients import completion_log_probs, model_score


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def demonstrations(tree: TokenTree, log_probs: np.ndarray) -> list[dict[str, Any]]:
    """Every completion with its probability as the weight."""
    return [
        {"prompt_ids": list(prompt), "completion_ids": list(tree.ids(one)), "weight": float(np.exp(log_probs[number, one]))}
        for number, prompt in enumerate(tree.prompts)
        for one in range(tree.num_completions)
    ]


def target(tree: TokenTree) -> np.ndarray:
    """A distribution over completions that is far from the model's, as log-probs (N, C)."""
    return tree.log_probs(tree.random_policy(7, scale=1.5))


def test_the_first_gradient_is_that_of_the_cross_entropy(task) -> None:
    """Expected over the demonstrations: −Σ_y q(y|x) ∇log π(y|x), from the enumeration, scaled to the tokens."""
    tree, policy = task.tree, task.policy()
    rows = demonstrations(tree, target(tree))
    SFT(policy, rows, 1e-9, batch_size=len(rows), optimizer=sgd, max_grad_norm=None, seed=0).learn(1)
    found = torch.cat([p.grad.flatten() for p in policy.parameters()])
    for parameter in policy.parameters():
        parameter.grad = None
    exact = completion_log_probs(tree, model_score(policy.model), policy.device)
    weights = torch.tensor(np.exp(target(tree)), dtype=exact.dtype, device=exact.device)
    tokens = tree.num_prompts * tree.lengths.sum()
    # the weights have mean 1 over the rows: N distributions of mass 1 each over N · C rows
    (-(weights * exact).sum() * tree.num_completions / tokens).backward()
    wanted = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.slow
def test_it_learns_the_distribution_it_is_shown(device) -> None:
    from textgym.agents import CausalLMPolicy
    from textgym.exact.models import tiny_lm

    tree = hard_tree(0, vocab_size=3, horizon=2)
    policy = CausalLMPolicy(tiny_lm(tree), tree.tokenizer(), device=device)
    wanted = target(tree)
    before = completion_distance(tree.log_probs(policy), wanted).max()
    rows = demonstrations(tree, wanted)
    SFT(policy, rows, lambda left: 1e-2 * left, n_epochs=300, batch_size=len(rows), loss_reduction="sequence_sum", seed=0).learn()
    after = completion_distance(tree.log_probs(policy), wanted).max()
    assert before > 0.3
    assert after < 0.02


def test_prompts_are_read_and_not_learned(task) -> None:
    policy = task.policy()
    loss = SFT(policy, [{"prompt": "w0 w1", "completion": "w2"}], seed=0).evaluate([{"prompt": "w0 w1", "completion": "w2"}])
    logits = policy.model(torch.tensor([[0, 1, 2]], device=policy.device)).logits[0].log_softmax(-1)
    assert loss["train/loss"] == pytest.approx(-float((logits[1, 2] + logits[2, 4]).detach()) / 2, abs=1e-5)  # w2 and EOS


@pytest.mark.parametrize(("reduction", "factor"), [("sequence_sum", 2.5), ("token_mean", 1.0)])
def test_reductions(task, reduction: str, factor: float) -> None:
    rows = [{"prompt_ids": [0], "completion_ids": [1, 2, 4]}, {"prompt_ids": [0], "completion_ids": [3, 4]}]
    numbers = SFT(task.policy(), rows, loss_reduction=reduction, seed=0).evaluate(rows)
    assert numbers["train/loss"] == pytest.approx(factor * numbers["train/nats_per_token"], rel=1e-5)
