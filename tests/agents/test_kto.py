"""KTO: its reference point, its first gradient, and where mass goes: to what is desirable often enough for the weights."""

from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents import KTO, CausalLMPolicy
from textgym.exact import TokenTree, hard_tree
from textgym.exact.models import tiny_lm


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


ROWS = [
    {"prompt_ids": [0], "completion_ids": [1, 4], "label": True},
    {"prompt_ids": [1, 0], "completion_ids": [2, 3, 1], "label": False, "weight": 3.0},
    {"prompt_ids": [0], "completion_ids": [3, 3, 4], "label": False},
    {"prompt_ids": [1, 2, 0], "completion_ids": [4], "label": True},
]


def log_ratio(agent: KTO, prompt: list[int], completion: list[int]) -> torch.Tensor:
    found = []
    for model in (agent.policy.model, agent.reference.model):
        logits = model(torch.tensor([prompt + completion], device=agent.policy.device)).logits[0].log_softmax(-1)
        found.append(logits[range(len(prompt) - 1, len(prompt + completion) - 1), completion].sum())
    return found[0] - found[1].detach()


def displaced(task: Any, seed: int, **settings: Any) -> KTO:
    options = {"learning_rate": 1e-9, "optimizer": sgd, "max_grad_norm": None, "beta": 0.5, "seed": 0, **settings}
    return KTO(task.policy(seed=seed), ROWS, reference=task.policy(seed=0).reference(), **options)


@pytest.mark.parametrize("seed", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_reference_point_is_the_mean_of_mismatched_pairs(task, seed: int, micro_batch_size: int | None) -> None:
    agent = displaced(task, seed, micro_batch_size=micro_batch_size)
    order = [2, 0, 3, 1]
    with torch.no_grad():
        ratios = [
            float(log_ratio(agent, ROWS[one]["prompt_ids"], ROWS[other]["completion_ids"]))
            for one, other in zip(order, [*order[1:], order[0]], strict=True)
        ]
    assert agent.estimate_kl(agent.examples, torch.tensor(order)) == pytest.approx(max(0.0, np.mean(ratios)), abs=1e-5)


def test_reference_points_below_zero_are_zero(task) -> None:
    found = [displaced(task, seed).estimate_kl(displaced(task, seed).examples, torch.arange(4)) for seed in range(3, 8)]
    assert min(found) == 0.0 and max(found) > 0.1  # both cases occur among the seeds above


def test_a_mismatched_pair_that_is_too_long_is_left_out(task) -> None:
    rows = [*ROWS[:2], {"prompt_ids": [1, 2, 0, 1, 2], "completion_ids": [4], "label": True}]  # the model has 6 positions
    agent = KTO(task.policy(seed=3), rows, reference=task.policy().reference(), seed=0)
    with torch.no_grad():
        ratios = [float(log_ratio(agent, rows[i]["prompt_ids"], rows[j]["completion_ids"])) for i, j in ((0, 1), (1, 2))]
    assert agent.estimate_kl(agent.examples, torch.arange(3)) == pytest.approx(max(0.0, np.mean(ratios)), abs=1e-5)


def test_the_first_gradient_by_hand(task) -> None:
    """v's own derivative: λ β σ'(β(h − z₀)) ∇h, with the sign of the label, and nothing through z₀."""
    agent = displaced(task, 7, desirable_weight=1.5, undesirable_weight=0.5)
    agent.learn(1)
    found = torch.cat([p.grad.flatten() for p in agent.policy.parameters()])
    # The permutation of the only step, as z₀ depends on who stands beside whom.
    again = displaced(task, 7)
    kl = again.estimate_kl(again.examples, torch.from_numpy(again.order.take(4)))
    assert kl > 0.01
    agent.policy.zero_grad()
    total = 0.0
    for row in ROWS:
        h = log_ratio(agent, row["prompt_ids"], row["completion_ids"])
        s = torch.sigmoid(0.5 * (h.detach() - kl))
        sign = -1.5 if row["label"] else 0.5
        total = total + row.get("weight", 1.0) / 1.5 * sign * 0.5 * s * (1 - s) * h / 4
    total.backward()
    wanted = torch.cat([p.grad.flatten() for p in agent.policy.parameters()])
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def labelled(tree: TokenTree, probability: np.ndarray) -> list[dict[str, Any]]:
    """Every completion twice: desirable with a weight of its probability to be, undesirable with the rest."""
    rows = []
    for number, prompt in enumerate(tree.prompts):
        for one in range(tree.num_completions):
            for label, weight in ((True, probability[number, one]), (False, 1 - probability[number, one])):
                rows.append({"prompt_ids": list(prompt), "completion_ids": list(tree.ids(one)), "label": label, "weight": float(weight)})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("undesirable_weight", "gains"), [(1.0, [0.9, 0.6]), (3.0, [0.9]), (0.3, [0.9, 0.6, 0.35])])
def test_mass_moves_to_what_is_desirable_often_enough(device, undesirable_weight: float, gains: list[float]) -> None:
    """With p λ_D > (1 − p) λ_U as the line: it is crossed by 0.9 and 0.6, by 0.9 alone, or by 0.35 too."""
    tree = hard_tree(0, vocab_size=3, horizon=2)
    levels = np.array([0.9, 0.6, 0.35, 0.1])
    probability = levels[np.random.default_rng(1).permuted(np.tile(np.arange(tree.num_completions) % 4, (tree.num_prompts, 1)), axis=1)]
    policy = CausalLMPolicy(tiny_lm(tree), tree.tokenizer(), device=device)
    rows = labelled(tree, probability)
    agent = KTO(
        policy, rows, lambda left: 3e-3 * left, beta=0.5, undesirable_weight=undesirable_weight, n_epochs=150, batch_size=len(rows), seed=0
    ).learn()
    good = np.isin(probability, gains)
    before, after = ((np.exp(tree.log_probs(model)) * good).sum(axis=1) for model in (agent.reference, policy))
    assert (before < 0.995).all() and (after > 0.99).all()


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(2, 2, [2]), (3, 2, [3]), (5, 2, [3, 2]), (7, 2, [3, 2, 2]), (5, 4, [3, 2]), (4, 3, [2, 2]), (9, 8, [5, 4]), (7, 3, [3, 2, 2])],
)
@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_no_step_has_a_single_example(
    task, count: int, batch_size: int, sizes: list[int], micro_batch_size: int | None, monkeypatch
) -> None:
    rows = [{**ROWS[place % 4], "prompt_ids": [place % 3, place % 2]} for place in range(count)]
    agent = KTO(task.policy(seed=3), rows, batch_size=batch_size, n_epochs=2, seed=0, micro_batch_size=micro_batch_size)
    found, own = [], agent.estimate_kl
    monkeypatch.setattr(agent, "estimate_kl", lambda examples, rows: (found.append(len(rows)), own(examples, rows))[1])
    agent.learn()
    assert found == sizes * 2


def test_a_run_of_uneven_steps_is_resumed_exactly(task, tmp_path) -> None:
    rows = [{**ROWS[place % 4], "prompt_ids": [place % 3, place % 2]} for place in range(7)]
    options = {"batch_size": 2, "n_epochs": 2, "seed": 0, "learning_rate": 1e-2}
    whole = KTO(task.policy(seed=3), rows, **options).learn()
    half = KTO(task.policy(seed=3), rows, **options).learn(1)  # one step of three
    half.save(tmp_path / "half")
    resumed = KTO.load(tmp_path / "half", rows, device=half.policy.device).learn(reset_num_timesteps=False)
    for one, other in zip(whole.policy.model.parameters(), resumed.policy.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_single_example_has_no_mismatched_pair(task) -> None:
    agent = displaced(task, 3)
    h = float(log_ratio(agent, ROWS[0]["prompt_ids"], ROWS[0]["completion_ids"]).detach())
    numbers = agent.evaluate(ROWS[:1])
    assert numbers["train/kl"] == 0.0
    assert numbers["train/loss"] == pytest.approx(1 - 1 / (1 + np.exp(-agent.beta * h)), abs=1e-5)
    with pytest.raises(ValueError, match="`examples` must hold at least 2 rows to train KTO on, got 1"):
        KTO(task.policy(), ROWS[:1], seed=0)
