import math
import subprocess
import sys

import numpy as np
import pytest

from textgym.exact import (
    BellmanOperator,
    TokenTree,
    error_bound,
    hard_solution,
    hard_tree,
    polynomial_step_size,
    q_learning,
    rescaled_linear_step_size,
    soft_solution,
    synchronous_q_learning,
)

ONE = polynomial_step_size(0)  # α = 1


def half(count):
    return np.full(np.shape(count), 0.5)


def two_step_tree():
    """States () and (0,); token 1 is EOS. The completions (0, 0), (0, 1), (1,) are paid 4, 2, 1."""
    return TokenTree(2, 2, 1, [[0]], [[4.0, 2.0, 1.0]])


def long_tree(horizon=60):
    """One word repeated: a single path, with an exit at each step."""
    return TokenTree(2, horizon, 1, [[0]], lambda _, ids: math.exp(-(((len(ids) - 20) / 10) ** 2)))


def operators(tree, gamma):
    return [BellmanOperator(tree, gamma), BellmanOperator(tree, gamma, tree.random_policy(1, scale=1.5), 0.5)]


# --- Hand-computed updates -------------------------------------------------------------------------------------------------------


def test_synchronous_hard_by_hand():
    """γ = 1/2, α = 1/2, two updates. Mean for max would give 0.375 at (s_0, 0), no discount 1.0, new for old values 0.75."""
    result = synchronous_q_learning(BellmanOperator(two_step_tree(), 0.5), 2, half)
    np.testing.assert_array_equal(result.action_values, [[[0.5, 0.75], [3.0, 1.5]]])
    np.testing.assert_array_equal(result.visits, [[[2, 2], [2, 2]]])
    np.testing.assert_array_equal(result.errors, [4.0, 2.0, 1.5])  # Q* is 2, 1; 4, 2


def test_synchronous_soft_by_hand():
    """As above, with β = 2 and π_ref = (1/4, 3/4) at (0,): V((0,)) of (2, 1) is 2 log(e/4 + 3√e/4)."""
    tree = two_step_tree()
    reference = np.log([[[0.5, 0.5], [0.25, 0.75]]])
    result = synchronous_q_learning(BellmanOperator(tree, 0.5, reference, 2.0), 2, half)
    value = 2.0 * math.log(0.25 * math.e + 0.75 * math.sqrt(math.e))
    np.testing.assert_allclose(result.action_values, [[[0.25 * value, 0.75], [3.0, 1.5]]], rtol=1e-14)


def test_token_by_token_by_hand():
    """Two texts (0, 0), α = 1 then 1/2: (s_0, 0) is updated before the end is seen, so that the reward arrives with the second."""
    always_zero = np.tile([0.0, -np.inf], (1, 2, 1))
    result = q_learning(BellmanOperator(two_step_tree(), 0.5), 2, polynomial_step_size(1), always_zero)
    np.testing.assert_array_equal(result.action_values, [[[1.0, 0.0], [4.0, 0.0]]])
    np.testing.assert_array_equal(result.visits, [[[2, 0], [2, 0]]])
    np.testing.assert_array_equal(result.errors, [4.0, 2.0, 2.0])


def test_token_by_token_soft_by_hand():
    tree = two_step_tree()
    always_zero = np.tile([0.0, -np.inf], (1, 2, 1))
    reference = np.log([[[0.5, 0.5], [0.25, 0.75]]])
    result = q_learning(BellmanOperator(tree, 0.5, reference, 2.0), 2, half, always_zero)
    first = 0.25 * 2.0 * math.log(1.0)  # V of (0, 0) is 0
    second = 0.5 * first + 0.25 * 2.0 * math.log(0.25 * math.e + 0.75)
    np.testing.assert_allclose(result.action_values, [[[second, 0.0], [3.0, 0.0]]], rtol=1e-14)


def test_step_sizes():
    np.testing.assert_allclose(polynomial_step_size(0.5)(np.array([1, 4, 9])), [1, 1 / 2, 1 / 3])
    np.testing.assert_allclose(polynomial_step_size(1)(np.array([1, 4])), [1, 1 / 4])
    np.testing.assert_allclose(rescaled_linear_step_size(0.75)(np.array([1, 2, 4])), [4 / 5, 2 / 3, 1 / 2])


# --- The operator ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_the_fixed_point_is_the_solution(gamma):
    """T Q* = Q*, and H applications lead there from anywhere."""
    tree = hard_tree(0)
    hard, soft = operators(tree, gamma)
    np.testing.assert_array_equal(hard.optimum, hard_solution(tree, gamma).action_values)
    np.testing.assert_array_equal(soft.optimum, soft_solution(tree, tree.random_policy(1, scale=1.5), 0.5, gamma).action_values)
    for operator in (hard, soft):
        np.testing.assert_allclose(operator(operator.optimum), operator.optimum, atol=1e-14)
        values = 10.0 * np.random.default_rng(0).standard_normal(operator.optimum.shape)
        for _ in range(tree.horizon):
            values = operator(values)
        np.testing.assert_allclose(values, operator.optimum, atol=1e-13)


def test_the_operator_contracts_and_the_factor_is_gamma():
    tree = hard_tree(0)
    rng = np.random.default_rng(0)
    for operator in operators(tree, 0.8):
        for _ in range(20):
            one, other = 3.0 * rng.standard_normal((2, *operator.optimum.shape))
            assert np.abs(operator(one) - operator(other)).max() <= 0.8 * np.abs(one - other).max()
        np.testing.assert_allclose(np.abs(operator(one + 2.0) - operator(one)).max(), 1.6)


def test_soft_becomes_hard_as_beta_falls_to_zero():
    tree = hard_tree(0)
    soft = BellmanOperator(tree, 0.9, tree.uniform_policy(), 1e-4)
    np.testing.assert_allclose(soft.optimum, BellmanOperator(tree, 0.9).optimum, atol=2 * 1e-4 * math.log(5))


def test_tokens_that_the_reference_excludes_do_not_count():
    """Hard takes the 4, soft cannot."""
    tree = two_step_tree()
    reference = np.array([[[math.log(0.5)] * 2, [-np.inf, 0.0]]])
    operator = BellmanOperator(tree, 1.0, reference, 0.5)
    np.testing.assert_allclose(operator.optimum[0, 0], [2.0, 1.0])
    assert synchronous_q_learning(operator, 2, ONE).errors[-1] < 1e-14


# --- Exact with α = 1 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.7, 1.0])
def test_synchronous_is_exact_after_as_many_updates_as_the_horizon(gamma):
    for operator in operators(hard_tree(0), gamma):
        result = synchronous_q_learning(operator, 4, ONE, initial=7.0)
        assert (result.errors[:3] > 0.1).all()
        np.testing.assert_allclose(result.errors[3:], 0.0, atol=1e-14)
    tree = hard_tree(0)
    assert synchronous_q_learning(BellmanOperator(tree, gamma), 3, ONE).errors[-1] == 0.0  # to the bit


@pytest.mark.parametrize("kind", [0, 1], ids=["hard", "soft"])
@pytest.mark.parametrize("behaviour", ["uniform", "epsilon"])
def test_token_by_token_is_exact_once_the_truth_has_travelled_to_the_start(kind, behaviour):
    tree = hard_tree(0, vocab_size=4)
    operator = operators(tree, 1.0)[kind]
    result = q_learning(operator, 6000, ONE, tree.uniform_policy() if behaviour == "uniform" else 0.8)
    assert result.visits.min() >= tree.horizon
    np.testing.assert_allclose(result.action_values, operator.optimum, atol=1e-13)
    if kind == 0:
        assert result.errors[-1] == 0.0


# --- The bound -------------------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "rescaled linear": rescaled_linear_step_size,
    "polynomial": lambda gamma: polynomial_step_size(0.7),
    "linear": lambda gamma: polynomial_step_size(1.0),
    "constant": lambda gamma: half,
}


def test_bound_by_hand():
    """γ = α = 1/2, σ = 1, three rewards: d = 1, 3/4, 9/16 + c/8 and v = 0, 1/4, 5/16 with c² = 2 log 6."""
    c = math.sqrt(2.0 * math.log(6.0))
    bound = error_bound(BellmanOperator(two_step_tree(), 0.5), half, 2, 1.0, reward_noise=1.0)
    np.testing.assert_allclose(bound, [1.0, 0.75 + 0.5 * c, 0.5625 + 0.125 * c + c * math.sqrt(0.3125)])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("tree", [hard_tree(0), long_tree()], ids=["wide", "long"])
def test_without_noise_no_error_exceeds_the_bound(tree, gamma, schedule):
    steps = SCHEDULES[schedule](gamma)
    for operator in operators(tree, gamma):
        for initial in (0.0, 5.0, -5.0):
            errors = synchronous_q_learning(operator, 400, steps, initial).errors
            assert (errors <= error_bound(operator, steps, 400, errors[0]) * (1 + 1e-12) + 1e-14).all()


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_the_bound_is_attained_on_long_texts_from_an_optimistic_start(gamma):
    """So no smaller bound holds for all trees: a looser one in the code would be seen here."""
    steps = rescaled_linear_step_size(gamma)
    operator = BellmanOperator(long_tree(200), gamma)
    errors = synchronous_q_learning(operator, 1000, steps, 5.0).errors
    np.testing.assert_allclose(errors, error_bound(operator, steps, 1000, errors[0]), rtol=1e-3)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_closed_form_of_the_bound(gamma, noise):
    """The one of the docstring, for rescaled linear steps: equal without noise, above it with noise, and by less than a factor of 2."""
    tree = hard_tree(0)
    k = np.arange(2001)
    decay = 1.0 / (1.0 + (1.0 - gamma) * k)
    scale = noise * math.sqrt(2.0 * math.log(2.0 * 3 * 85))
    closed = 3.0 * decay + (1.0 + gamma) / (1.0 - gamma) * scale * np.sqrt(decay)
    bound = error_bound(BellmanOperator(tree, gamma), rescaled_linear_step_size(gamma), 2000, 3.0, noise)
    if noise:
        assert (bound <= closed).all()
        assert closed[-1] < 2.0 * bound[-1]
    else:
        np.testing.assert_allclose(bound, closed)


@pytest.mark.parametrize("omega", [0.6, 0.8])
def test_closed_form_for_polynomial_steps(omega):
    """Π (1 − (1 − γ) i^−ω) ≤ exp(−(1 − γ) ((k + 1)^(1−ω) − 1) / (1 − ω)), the geometric factor of Even-Dar & Mansour."""
    k = np.arange(501)
    bound = error_bound(BellmanOperator(two_step_tree(), 0.8), polynomial_step_size(omega), 500, 1.0)
    assert (bound <= np.exp(-0.2 * ((k + 1.0) ** (1 - omega) - 1.0) / (1 - omega)) * (1 + 1e-12)).all()


@pytest.mark.parametrize("kind", [0, 1], ids=["hard", "soft"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_noise_no_run_exceeds_the_bound_for_its_own_noise(kind, schedule):
    """‖Q_k − Q*‖ ≤ d_k + ‖P_k‖ for every course of the noise, with P averaged here from the same draws."""
    tree, gamma, noise, updates = long_tree(30), 0.9, 1.0, 500
    operator, steps = operators(tree, gamma)[kind], SCHEDULES[schedule](gamma)
    for seed in range(3):
        errors = synchronous_q_learning(operator, updates, steps, 2.0, noise, seed).errors
        rng = np.random.default_rng(seed)
        averaged, rest = np.zeros(tree.rewards.shape), errors[0]
        for k, alpha in enumerate(steps(np.arange(1, updates + 1)), start=1):
            rest = (1 - (1 - gamma) * alpha) * rest + gamma * alpha * np.abs(averaged).max()
            averaged = (1 - alpha) * averaged + alpha * noise * rng.standard_normal(tree.rewards.shape)
            assert errors[k] <= (rest + np.abs(averaged).max()) * (1 + 1e-12)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_with_noise_the_mean_does_not_exceed_the_bound(gamma):
    steps = rescaled_linear_step_size(gamma)
    for operator in operators(hard_tree(0), gamma):
        runs = [synchronous_q_learning(operator, 500, steps, 0.0, 1.0, seed).errors for seed in range(10)]
        bound = error_bound(operator, steps, 500, runs[0][0], 1.0)
        assert (np.mean(runs, axis=0) <= bound).all()
        assert np.mean(runs, axis=0)[-1] > bound[-1] * (1 - gamma) / (1 + gamma) / 2  # and it is the right size


class NoDiscount(BellmanOperator):
    def __call__(self, action_values, rewards=None):
        return np.where(
            self.tree.completion_of >= 0, super().__call__(action_values, rewards), super().__call__(action_values) / self.gamma
        )


class MeanForMax(BellmanOperator):
    def state_values(self, action_values, where=...):
        return action_values.mean(axis=-1)


class NoReference(BellmanOperator):
    """β log Σ exp(Q/β): log V too much."""

    def state_values(self, action_values, where=...):
        return self.beta * np.logaddexp.reduce(action_values / self.beta, axis=-1)


class BootstrapsPastTheEnd(BellmanOperator):
    def __call__(self, action_values, rewards=None):
        past = self.gamma * self.state_values(action_values)[:, :1, None]
        return super().__call__(action_values, rewards) + np.where(self.tree.completion_of >= 0, past, 0.0)


@pytest.mark.parametrize("mistake", [NoDiscount, MeanForMax, NoReference, BootstrapsPastTheEnd])
def test_mistakes_exceed_the_bound(mistake):
    tree = hard_tree(0)
    options = {"reference": tree.uniform_policy(), "beta": 0.5} if mistake is NoReference else {}
    right, wrong = BellmanOperator(tree, 0.8, **options), mistake(tree, 0.8, **options)
    steps = rescaled_linear_step_size(0.8)
    for operator, exceeds in ((right, False), (wrong, True)):
        errors = synchronous_q_learning(operator, 500, steps).errors
        assert (errors > error_bound(operator, steps, 500, errors[0]) * (1 + 1e-12)).any() == exceeds


# --- Token by token --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1], ids=["hard", "soft"])
def test_error_is_bounded_by_the_run_without_rewards(kind):
    """|Q − Q*| ≤ B in every pair: B starts at the largest error and learns, at the same visits and steps, that all rewards are 0."""
    tree = hard_tree(0)
    operator = operators(tree, 0.9)[kind]
    nothing = BellmanOperator(TokenTree(5, 3, 4, tree.prompts, np.zeros_like(tree.rewards)), 0.9)
    policy, steps = tree.random_policy(3), polynomial_step_size(0.8)
    for episodes in (1, 10, 100, 1000):
        result = q_learning(operator, episodes, steps, policy, seed=4)
        bound = q_learning(nothing, episodes, steps, policy, initial=result.errors[0], seed=4)
        np.testing.assert_array_equal(result.visits, bound.visits)
        assert (np.abs(result.action_values - operator.optimum) <= bound.action_values + 1e-12).all()


@pytest.mark.parametrize("kind", [0, 1], ids=["hard", "soft"])
def test_noisy_runs_converge_whatever_the_behaviour(kind):
    tree = hard_tree(0, vocab_size=3, horizon=3)
    operator = operators(tree, 0.9)[kind]
    for behaviour in (0.5, tree.uniform_policy()):
        # The rarest pair is visited 46 times on average with ε = 0.5: a standard deviation of σ √(46^−0.8 / 2) = 0.08, of 63 pairs.
        errors = q_learning(operator, 30_000, polynomial_step_size(0.8), behaviour, reward_noise=0.5).errors
        assert errors[0] > 3.0
        assert errors[-1] < 0.3


@pytest.mark.parametrize("online", [False, True])
def test_noise_averages_out_as_it_must(online):
    """With α = 1/n a paid pair holds the mean of n noisy rewards: n (Q − r)² / σ² is 1 on average."""
    tree = hard_tree(0)
    operator, noise = BellmanOperator(tree, 0.9), 2.0
    if online:
        result = q_learning(operator, 10_000, polynomial_step_size(1), tree.uniform_policy(), reward_noise=noise)
    else:
        result = synchronous_q_learning(operator, 200, polynomial_step_size(1), reward_noise=noise)
    paid = np.broadcast_to(tree.completion_of >= 0, result.visits.shape)
    assert result.visits[paid].min() > 5
    scores = (result.visits * (result.action_values - operator.optimum) ** 2 / noise**2)[paid]
    assert abs(scores.mean() - 1.0) < 4.0 * math.sqrt(2.0 / scores.size)


def test_behaviour_chooses_the_tokens():
    tree = hard_tree(0)
    operator, policy = BellmanOperator(tree, 0.9), tree.random_policy(5)
    visits = q_learning(operator, 6000, ONE, policy).visits
    totals = visits.sum(axis=-1)
    assert totals[:, 0].sum() == 6000
    assert (abs(totals[:, 0] - 2000) < 4 * math.sqrt(6000 * 2 / 9)).all()  # prompts are drawn uniformly
    probs = np.exp(policy[:, 0])
    assert (abs(visits[:, 0] / totals[:, :1] - probs) < 4 * np.sqrt(probs / 2000)).all()
    # From state to state: what enters a state leaves it.
    for state, action in np.argwhere(tree.next_state >= 0):
        np.testing.assert_array_equal(visits[:, state, action], totals[:, tree.next_state[state, action]])


def test_epsilon_greedy_follows_the_values():
    tree = hard_tree(0)
    operator = BellmanOperator(tree, 1.0)
    visits = q_learning(operator, 3000, ONE, 0.2, initial=operator.optimum).visits[:, 0]
    share = visits.max(axis=-1) / visits.sum(axis=-1)
    np.testing.assert_array_equal(visits.argmax(axis=-1), operator.optimum[:, 0].argmax(axis=-1))
    assert (abs(share - (0.8 + 0.2 / 5)) < 4 * math.sqrt(0.84 * 0.16 / 900)).all()


def test_seeds_repeat_and_differ():
    operator = BellmanOperator(hard_tree(0), 0.9)
    for run in (
        lambda seed: q_learning(operator, 50, ONE, 0.5, reward_noise=1.0, seed=seed).action_values,
        lambda seed: synchronous_q_learning(operator, 5, ONE, reward_noise=1.0, seed=seed).action_values,
    ):
        np.testing.assert_array_equal(run(1), run(1))
        assert (run(1) != run(2)).any()


def test_the_start_is_not_changed():
    operator = BellmanOperator(hard_tree(0), 0.9)
    start = np.ones(operator.optimum.shape)
    q_learning(operator, 5, ONE, 0.5, initial=start)
    synchronous_q_learning(operator, 5, ONE, initial=start)
    assert (start == 1.0).all()


# --- Errors ----------------------------------------------------------------------------------------------------------------------

TREE = two_step_tree()
OPERATOR = BellmanOperator(TREE, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BellmanOperator(TREE, 1.1), r"`gamma` must be in \[0, 1\], got 1.1"),
        (lambda: BellmanOperator(TREE, float("nan")), r"`gamma` must be in \[0, 1\], got nan"),
        (lambda: BellmanOperator(TREE, 0.9, TREE.uniform_policy(), -1.0), r"`beta` must be at least 0 and finite, got -1.0"),
        (
            lambda: BellmanOperator(TREE, 0.9, beta=0.5),
            r"`reference` must be given if and only if `beta` is positive, got `beta` = 0.5 and none",
        ),
        (
            lambda: BellmanOperator(TREE, 0.9, TREE.uniform_policy()),
            r"`reference` must be given if and only if .* got `beta` = 0.0 and one",
        ),
        (lambda: polynomial_step_size(1.5), r"`omega` must be in \[0, 1\], got 1.5"),
        (lambda: rescaled_linear_step_size(1.0), r"`gamma` must be in \[0, 1\), got 1.0.* use `polynomial_step_size`"),
        (lambda: synchronous_q_learning(OPERATOR, 0, ONE), r"`updates` must be at least 1, got 0"),
        (lambda: q_learning(OPERATOR, 0, ONE, 0.5), r"`episodes` must be at least 1, got 0"),
        (lambda: synchronous_q_learning(OPERATOR, 3, lambda n: 2.0 / n), r"`step_size` must be in \(0, 1\], got 2.0 for update 1"),
        (lambda: q_learning(OPERATOR, 3, lambda n: 1.0 - (n == 2), 0.5), r"`step_size` must be in \(0, 1\], got 0.0 for update 2"),
        (lambda: q_learning(OPERATOR, 3, lambda n: 0.1, 0.5), r"`step_size` must return one number for each count, here 3, got shape \(\)"),
        (lambda: q_learning(OPERATOR, 3, ONE, 0.0), r"`behaviour` must be a tabular policy or an ε in \(0, 1\], got 0.0. With ε = 0"),
        (lambda: q_learning(OPERATOR, 3, ONE, np.zeros((1, 2, 3))), r"`behaviour` must be .* \(N, S, V\) = \(1, 2, 2\), got \(1, 2, 3\)"),
        (lambda: q_learning(OPERATOR, 3, ONE, np.zeros((1, 2, 2))), r"`behaviour` must be log-probabilities that sum to 1"),
        (lambda: q_learning(OPERATOR, 3, ONE, 0.5, initial=[1.0, 2.0, 3.0]), r"`initial` must be a number or a table .* got shape \(3,\)"),
        (lambda: synchronous_q_learning(OPERATOR, 3, ONE, np.inf), r"`initial` must be finite, got inf"),
        (lambda: synchronous_q_learning(OPERATOR, 3, ONE, reward_noise=-1.0), r"`reward_noise` must be at least 0 and finite, got -1.0"),
        (lambda: error_bound(OPERATOR, ONE, 3, 1.0, -1.0), r"`reward_noise` must be at least 0"),
        (lambda: error_bound(OPERATOR, ONE, 3, -1.0), r"`initial_error` must be at least 0 and finite, got -1.0"),
        (lambda: error_bound(BellmanOperator(TREE, 1.0), ONE, 3, 1.0), r"`operator` must have γ < 1, got 1.0: .*exact after H updates"),
        (lambda: soft_solution(TREE, TREE.uniform_policy(), 0.0, 0.9), r"`beta` must be positive"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_torch_is_loaded():
    code = "import sys, textgym.exact.q_learning; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
