"""DPO: its first gradient, its fixed point π*, the reward it implies."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from textgym.agents import DPO, CausalLMPolicy
from textgym.exact import HARD_TREE_BETA, TokenTree, completion_distance, hard_tree, soft_solution
from textgym.exact.gradients import completion_log_probs, model_score
from textgym.exact.models import tiny_lm


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def pairs(tree: TokenTree, preference: Any = None) -> list[dict[str, Any]]:
    """Every pair of different completions of each prompt once, with its Bradley–Terry probability under the tree's rewards."""
    rows = []
    for number, prompt in enumerate(tree.prompts):
        for first in range(tree.num_completions):
            for second in range(first + 1, tree.num_completions):
                label = 1 / (1 + np.exp(tree.rewards[number, second] - tree.rewards[number, first]))
                ids = {"chosen_ids": list(tree.ids(first)), "rejected_ids": list(tree.ids(second))}
                rows.append({"prompt_ids": list(prompt), **ids, "preference": float(label)})
    return rows


def gradient(policy: CausalLMPolicy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize(
    "settings", [{}, {"label_smoothing": 0.1}, {"loss_type": "robust", "label_smoothing": 0.1}, {"loss_type": "ipo"}], ids=str
)
def test_the_first_gradient_is_that_of_the_enumerated_loss(task, settings: dict[str, Any]) -> None:
    """At a policy that is not the reference, in float64 from the enumeration."""
    tree, beta = hard_tree(0, vocab_size=4, horizon=2), 0.5
    policy = CausalLMPolicy(tiny_lm(tree, seed=3), tree.tokenizer(), device=task.device)
    reference = CausalLMPolicy(tiny_lm(tree), tree.tokenizer(), device=task.device).reference()
    rows = pairs(tree)
    agent = DPO(
        policy, rows, 1e-9, beta=beta, reference=reference, batch_size=len(rows), optimizer=sgd, max_grad_norm=None, seed=0, **settings
    )
    agent.learn(1)
    found = gradient(policy)
    policy.zero_grad()
    own = completion_log_probs(tree, model_score(policy.model), policy.device)
    h = own.double() - torch.tensor(tree.log_probs(reference), device=policy.device)
    rewards = torch.tensor(tree.rewards, device=policy.device)
    first, second = torch.triu_indices(tree.num_completions, tree.num_completions, 1)
    margins = h[:, first] - h[:, second]
    p = (rewards[:, first] - rewards[:, second]).sigmoid()
    epsilon = settings.get("label_smoothing", 0.0)
    if settings.get("loss_type") == "ipo":
        losses = p * (margins - 1 / (2 * beta)) ** 2 + (1 - p) * (margins + 1 / (2 * beta)) ** 2
    else:
        right, wrong = -(beta * margins).sigmoid().log(), -(-beta * margins).sigmoid().log()
        if settings.get("loss_type") == "robust":
            right, wrong = ((1 - epsilon) * a - epsilon * b for a, b in ((right, wrong), (wrong, right)))
            losses = (p * right + (1 - p) * wrong) / (1 - 2 * epsilon)
        else:
            q = p * (1 - epsilon) + (1 - p) * epsilon
            losses = q * right + (1 - q) * wrong
    losses.mean().backward()
    assert float((found - gradient(policy)).norm() / gradient(policy).norm()) < 1e-4


def trained(device: str, seed: int = 0, rows: Any = None, **settings: Any) -> tuple[TokenTree, DPO]:
    tree = hard_tree(seed, vocab_size=3, horizon=2)
    policy = CausalLMPolicy(tiny_lm(tree, seed=seed), tree.tokenizer(), device=device)
    rows = rows or pairs(tree)
    options = {"beta": HARD_TREE_BETA, "n_epochs": 300, "batch_size": len(rows), "seed": seed, "max_grad_norm": None, **settings}
    return tree, DPO(policy, rows, lambda left: 1e-2 * left, **options).learn()


@pytest.mark.slow
def test_the_fixed_point_is_the_optimum_of_the_true_reward(device) -> None:
    tree, agent = trained(device)
    assert agent.reference is not None
    reference = tree.tabular(tree.log_probs(agent.reference))
    optimum = soft_solution(tree, reference, HARD_TREE_BETA).log_probs
    assert completion_distance(tree.log_probs(reference), optimum).max() > 0.3
    assert completion_distance(tree.log_probs(agent.policy), optimum).max() < 0.02


@pytest.mark.slow
def test_the_implicit_reward_recovers_the_differences_of_the_true_one_and_serves_as_a_reward(device) -> None:
    tree, agent = trained(device)
    envs = gym.make_vec(
        "textgym:TextGen-v0",
        num_envs=7,
        prompts=tree.prompt_texts,
        tokenizer=tree.tokenizer(),
        reward=agent.implicit_reward(batch_size=4),
        max_new_tokens=tree.horizon,
    )
    from textgym.sequences import step_sequence

    found = np.zeros((tree.num_prompts, tree.num_completions))
    for number in range(tree.num_prompts):
        envs.reset(options={"prompt_index": np.full(7, number)})
        found[number] = step_sequence(envs, tree.completions, tree.lengths)[0].sum(axis=1)
    levels = (found - tree.rewards).mean(axis=1)
    np.testing.assert_allclose(found - tree.rewards - levels[:, None], 0, atol=0.03)
    assert np.ptp(levels) > 1  # which levels there are the preferences do not say: the tree's are 3 apart


@pytest.mark.slow
def test_rankings_lead_to_the_optimum_too(device) -> None:
    """All rankings of three completions, each weighted with its Plackett–Luce probability under the true reward."""
    from itertools import permutations

    tree = hard_tree(0, vocab_size=3, horizon=2)
    rows = []
    for number, prompt in enumerate(tree.prompts):
        strength = np.exp(tree.rewards[number])
        for ranking in permutations(range(tree.num_completions), 3):
            left = [strength[list(ranking[place:])].sum() for place in range(3)]
            weight = float(np.prod(strength[list(ranking)] / left))
            rows.append({"prompt_ids": list(prompt), "completion_ids": [list(tree.ids(one)) for one in ranking], "weight": weight})
    tree, agent = trained(device, rows=rows)
    optimum = soft_solution(tree, tree.tabular(tree.log_probs(agent.reference)), HARD_TREE_BETA).log_probs
    assert completion_distance(tree.log_probs(agent.policy), optimum).max() < 0.02


def test_before_the_first_step_margins_are_zero_and_the_loss_is_log_two(task) -> None:
    rows = pairs(task.tree)[:40]
    numbers = DPO(task.policy(temperature=0.7), rows, seed=0).evaluate(rows)
    assert numbers["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert numbers["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert numbers["rewards/accuracies"] == pytest.approx(0.5)


def test_metrics_by_hand(task) -> None:
    tree = task.tree
    reference = task.policy(seed=4).reference()
    rows = [
        {"prompt_ids": [0], "chosen_ids": [1, 4], "rejected_ids": [2, 4], "weight": 1.0},
        {"prompt_ids": [0], "chosen_ids": [3, 4], "rejected_ids": [1, 4], "preference": 0.2, "weight": 3.0},
    ]
    agent = DPO(task.policy(), rows, beta=0.3, reference=reference, seed=0)
    own, other = (tree.log_probs(policy)[0] for policy in (agent.policy, reference))
    places = {tree.ids(one): one for one in range(tree.num_completions)}
    a, b, c = (places[one] for one in ((1, 4), (2, 4), (3, 4)))
    h = 0.3 * (own - other)
    numbers = agent.evaluate(rows)
    assert numbers["rewards/chosen"] == pytest.approx((0.5 * h[a] + 1.5 * h[c]) / 2, abs=1e-5)
    assert numbers["rewards/rejected"] == pytest.approx((0.5 * h[b] + 1.5 * h[a]) / 2, abs=1e-5)
    assert numbers["logps/rejected"] == pytest.approx((0.5 * own[b] + 1.5 * own[a]) / 2, abs=1e-4)
    right = 0.5 * (h[a] > h[b]) + 1.5 * (0.2 if h[c] > h[a] else 0.8)
    assert numbers["rewards/accuracies"] == pytest.approx(right / 2, abs=1e-6)


def test_the_reference_is_scored_once(task) -> None:
    agent = DPO(task.policy(), pairs(task.tree)[:40], n_epochs=3, batch_size=8, seed=0)
    calls, score = [], agent.reference.score
    agent.reference.score = lambda *args, **kwargs: (calls.append(len(args[0])), score(*args, **kwargs))[1]
    agent.learn()
    assert sum(calls) == agent.examples.num_completions
    agent.learn(10)
    assert sum(calls) == agent.examples.num_completions


def test_soft_labels_count_in_a_data_set_that_has_rankings_too(task) -> None:
    pair = {"prompt_ids": [0], "chosen_ids": [1, 4], "rejected_ids": [2, 4]}
    ranking = {"prompt_ids": [0], "completion_ids": [[1, 4], [2, 4], [3, 4]]}
    reference = task.policy(seed=4).reference()
    agent = DPO(task.policy(), [ranking], reference=reference, seed=0)
    losses = [agent.evaluate([{**pair, "preference": p}])["train/loss"] for p in (0.0, 1.0, 0.3)]
    both = agent.evaluate([{**pair, "preference": 0.3}, ranking])["train/loss"]
    assert losses[2] == pytest.approx(0.7 * losses[0] + 0.3 * losses[1], abs=1e-5)
    assert both == pytest.approx((losses[2] + agent.evaluate([ranking])["train/loss"]) / 2, abs=1e-5)


SAME = {"prompt_ids": [0], "chosen_ids": [1, 2], "rejected_ids": [1, 2]}
OTHER = {"prompt_ids": [0], "chosen_ids": [1, 2], "rejected_ids": [2]}


def test_pairs_of_the_same_tokens_are_counted_and_all_of_them_are_refused(task) -> None:
    with pytest.warns(UserWarning, match=r"2 of 3 rows of `preferences` have answers that are the same tokens.*row 0 .*, row 2 ") as said:
        agent = DPO(task.policy(), [SAME, OTHER, SAME], seed=0)
    assert len(said) == 1 and len(agent.examples) == 3
    with pytest.raises(ValueError, match="answers of every row are the same tokens"):
        DPO(task.policy(), [SAME, SAME], seed=0)
