"""n-step returns by hand, and the soft losses on the exact solution of trees: residual and gradient are zero there and nowhere near."""

import numpy as np
import pytest
import torch

from textgym.agents.common.bellman import n_step_returns, path_consistency_loss, soft_action_values
from textgym.agents.common.losses import value_loss
from textgym.exact import hard_tree, soft_solution

REWARDS = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, float("nan")]])
VALUES = torch.tensor([[10.0, 20.0, 40.0], [80.0, 160.0, float("nan")]])
LENGTHS = torch.tensor([3, 2])


@pytest.mark.parametrize(
    ("n_steps", "expected"),
    [
        # Row 0 ends after token 2: 1 + V(s_1)/2, 2 + V(s_2)/2, 4 and nothing behind it.
        (1, [[11.0, 22.0, 4.0], [88.0, 16.0, 0.0]]),
        (2, [[12.0, 4.0, 4.0], [16.0, 16.0, 0.0]]),
        (None, [[3.0, 4.0, 4.0], [16.0, 16.0, 0.0]]),
        (7, [[3.0, 4.0, 4.0], [16.0, 16.0, 0.0]]),
    ],
)
def test_n_step_returns_by_hand(n_steps, expected) -> None:
    found = n_step_returns(REWARDS, VALUES, LENGTHS, n_steps=n_steps, gamma=0.5)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_two_step_return_by_hand_counts_the_value_once() -> None:
    found = n_step_returns(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[10.0, 20.0, 40.0]]), torch.tensor([3]), n_steps=2, gamma=0.5)
    torch.testing.assert_close(found, torch.tensor([[1 + 1 + 0.25 * 40, 2 + 2, 4.0]]))


@pytest.mark.parametrize("n_steps", [1, 2, None])
def test_only_rows_that_were_cut_go_on_behind_their_end(n_steps) -> None:
    truncated, ends = torch.tensor([False, True]), torch.tensor([1000.0, 100.0])
    found = n_step_returns(REWARDS, VALUES, LENGTHS, n_steps=n_steps, gamma=0.5, truncated=truncated, end_values=ends)
    plain = n_step_returns(REWARDS, VALUES, LENGTHS, n_steps=n_steps, gamma=0.5)
    torch.testing.assert_close(found[0], plain[0])
    torch.testing.assert_close(found[1, 1], torch.tensor(16 + 50.0))
    torch.testing.assert_close(found[1, 0], torch.tensor(88.0 if n_steps == 1 else 8 + 8 + 25.0))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="`values` must have the shape"):
        n_step_returns(REWARDS, VALUES[:, :2], LENGTHS)
    with pytest.raises(ValueError, match="must be \\(B, T\\)"):
        n_step_returns(REWARDS[0], VALUES[0], LENGTHS)
    with pytest.raises(ValueError, match="belong together"):
        n_step_returns(REWARDS, VALUES, LENGTHS, truncated=torch.tensor([True, False]))


class Exact:
    """Every completion of every prompt of a tree with the numbers of its exact soft solution, as (B, T) tables."""

    def __init__(self, beta: float = 0.5) -> None:
        tree = hard_tree(0, vocab_size=3, horizon=3)
        reference = tree.random_policy(1)
        solution = soft_solution(tree, reference, beta)
        self.beta, self.log_z = beta, solution.log_z

        def table(values: np.ndarray) -> torch.Tensor:
            return torch.tensor(values.reshape(-1, tree.horizon))

        self.values = table(np.where(tree.mask, solution.state_values[:, tree.state_of], 0.0))
        self.log_probs = table(tree.token_log_probs(solution.policy))
        self.reference_log_probs = table(tree.token_log_probs(reference))
        last = np.arange(tree.horizon) == tree.lengths[:, None] - 1
        self.rewards = table(np.where(last, tree.rewards[..., None], 0.0))
        self.lengths = torch.tensor(np.tile(tree.lengths, tree.num_prompts))

    def path_loss(self, values, log_probs, n_steps) -> torch.Tensor:
        return path_consistency_loss(
            values, log_probs, self.reference_log_probs, self.rewards, self.lengths, beta=self.beta, n_steps=n_steps
        )

    def one_step_loss(self, values, log_probs) -> torch.Tensor:
        mask = torch.arange(values.shape[1]) < self.lengths[:, None]
        targets = n_step_returns(self.rewards, values.detach(), self.lengths)
        action_values = soft_action_values(values, log_probs, self.reference_log_probs, beta=self.beta)
        return value_loss(action_values, targets, mask, reduction="sequence_sum")


def losses(exact: Exact, values, log_probs) -> dict[str, torch.Tensor]:
    found = {f"path of {n}": exact.path_loss(values, log_probs, n) for n in (1, 2, None)}
    return found | {"one step": exact.one_step_loss(values, log_probs)}


def test_every_soft_residual_is_zero_at_the_exact_solution_and_so_is_its_gradient() -> None:
    """All completions count alike here, however improbable: the loss asks nothing of who sampled them."""
    exact = Exact()
    values, log_probs = exact.values.requires_grad_(), exact.log_probs.requires_grad_()
    for name, loss in losses(exact, values, log_probs).items():
        assert loss.item() < 1e-24, name
        for gradient in torch.autograd.grad(loss, (values, log_probs)):
            assert gradient.abs().max() < 1e-12, name


@pytest.mark.parametrize("what", ["values", "log_probs"])
def test_every_soft_residual_sees_a_wrong_value_and_a_wrong_policy(what) -> None:
    exact = Exact()
    mask = torch.arange(3) < exact.lengths[:, None]
    moved = {"values": exact.values, "log_probs": exact.log_probs, what: getattr(exact, what) + 0.1 * mask}
    for name, loss in losses(exact, moved["values"], moved["log_probs"]).items():
        assert loss.item() > 1e-4, name


def test_value_at_the_root_is_beta_log_z() -> None:
    exact = Exact()
    roots = exact.values[:, 0].view(len(exact.log_z), -1)
    np.testing.assert_allclose(roots.numpy(), np.broadcast_to(exact.beta * exact.log_z[:, None], roots.shape), atol=1e-12)


def test_path_consistency_by_hand() -> None:
    """Two tokens, β = 2, γ = ½: C_0 = −V_0 + (r_0 − 2 d_0) + ½ (r_1 − 2 d_1), C_1 = −V_1 + r_1 − 2 d_1."""
    values, log_probs = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[-1.0, -2.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0]], requires_grad=True)
    rewards, lengths = torch.tensor([[3.0, 5.0]]), torch.tensor([2])
    loss = path_consistency_loss(values, log_probs, reference, rewards, lengths, beta=2.0, gamma=0.5)
    second = -2 + (5 - 2 * -1.0)
    first = -1 + (3 - 2 * 0.5) + 0.5 * (5 - 2 * -1.0)
    torch.testing.assert_close(loss, torch.tensor(0.5 * (first**2 + second**2)))
    of_values, of_log_probs = torch.autograd.grad(loss, (values, log_probs), retain_graph=True)
    torch.testing.assert_close(of_values, torch.tensor([[-first, -second]]))
    torch.testing.assert_close(of_log_probs, torch.tensor([[-2 * first, -2 * 0.5 * first - 2 * second]]))
    assert torch.autograd.grad(loss, reference, allow_unused=True) == (None,)


def test_the_value_at_the_end_of_a_short_path_gets_gradient_too() -> None:
    values = torch.tensor([[1.0, 2.0]], requires_grad=True)
    zeros = torch.zeros(1, 2)
    loss = path_consistency_loss(values, zeros, zeros, torch.tensor([[3.0, 5.0]]), torch.tensor([2]), beta=1.0, n_steps=1)
    (gradient,) = torch.autograd.grad(loss, values)
    first, second = -1 + 3 + 2.0, -2 + 5.0
    torch.testing.assert_close(gradient, torch.tensor([[-first, first - second]]))


def test_padding_reaches_neither_loss_nor_gradient() -> None:
    def loss(fill: float, width: int):
        tables = [torch.full((2, width), fill) for _ in range(4)]
        for k, table in enumerate(tables):
            table[0, :2], table[1, :1] = torch.tensor([0.3 * k, -0.2]), 0.7 - k
        tables[0].requires_grad_()
        tables[1].requires_grad_()
        values, log_probs, reference, rewards = tables
        total = path_consistency_loss(values, log_probs, reference, rewards, torch.tensor([2, 1]), beta=0.5)
        return total.detach(), [g[:, :2] for g in torch.autograd.grad(total, (values, log_probs))]

    plain, gradients = loss(0.0, 2)
    for fill in (float("nan"), float("inf"), 9.0):
        other, other_gradients = loss(fill, 4)
        torch.testing.assert_close(other, plain)
        torch.testing.assert_close(other_gradients, gradients)


def test_soft_action_values_by_hand() -> None:
    reference = torch.tensor([-0.5], requires_grad=True)
    found = soft_action_values(torch.tensor([3.0]), torch.tensor([-2.0]), reference, beta=0.5)
    torch.testing.assert_close(found, torch.tensor([3 + 0.5 * (-2 + 0.5)]))
    assert not found.requires_grad
