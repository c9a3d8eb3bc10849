"""Tabular Q-learning against its error bound: hard and soft, exact and noisy rewards, three discounts. Draws q_learning_on_a_tree.png.

The agent repeats one word and must learn when to stop: 20 words are best, 200 the most. It starts optimistic (every value is 5), and the
truth travels back from the end of a text one token at a time: on texts as long as these, the bound is all but attained.
"""

import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from textgym.exact import (
    BellmanOperator,
    TokenTree,
    error_bound,
    hard_tree,
    polynomial_step_size,
    q_learning,
    rescaled_linear_step_size,
    synchronous_q_learning,
)

UPDATES = 5_000
COLORS = {0.7: "#009E73", 0.9: "#0072B2", 0.97: "#D55E00"}  # of each γ
NOISE_RUNS = {0.0: 1, 1.0: 5}  # standard deviation of the reward noise: runs, whose mean is compared with the bound
BETA = 0.5


def measure(operator: BellmanOperator, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """The errors of each run, (runs, UPDATES + 1), and their bound, (UPDATES + 1,)."""
    steps = rescaled_linear_step_size(operator.gamma)
    runs = [
        synchronous_q_learning(operator, UPDATES, steps, initial=5.0, reward_noise=noise, seed=seed).errors
        for seed in range(NOISE_RUNS[noise])
    ]
    return np.stack(runs), error_bound(operator, steps, UPDATES, runs[0][0], noise)


def draw(axes, gamma: float, errors: np.ndarray, bound: np.ndarray) -> None:
    updates, color = np.arange(1, UPDATES + 1), COLORS[gamma]
    axes.fill_between(updates, errors.min(axis=0)[1:], errors.max(axis=0)[1:], color=color, alpha=0.2, linewidth=0)
    axes.loglog(updates, errors.mean(axis=0)[1:], color=color, alpha=0.6, linewidth=3, label=f"γ = {gamma}")
    axes.loglog(updates, bound[1:], "--", color=color, linewidth=1.6, zorder=3)


def finish(figure, panels) -> None:
    for axes, title in zip(
        panels[0], ("exact rewards: no run exceeds its bound", "noisy rewards, σ = 1: nor does the mean of runs"), strict=True
    ):
        axes.set_title(title, pad=10)
    formulas = (r"hard: $V = \max_a\, Q$", r"soft: $V = \beta\,\log\, \sum_a \pi_{\mathrm{ref}}\; e^{\,Q/\beta}$")
    for axes, formula in zip(panels[:, 0], formulas, strict=True):
        axes.text(0.97, 0.9, formula, transform=axes.transAxes, ha="right", fontsize=13)
    for axes in panels.flat:
        axes.set(xlim=(1, UPDATES), ylim=(2e-3, 90))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("largest error, max |Q − Q*|")
    for axes in panels[1]:
        axes.set_xlabel("updates of every state-action pair")
    panels[0, 0].plot([], [], "--", color="0.3", linewidth=1.6, label="bound")
    panels[0, 0].legend(loc="lower left", frameon=False)
    figure.suptitle("Q-learning on a token tree, and its bound", fontsize=14)
    figure.savefig("q_learning_on_a_tree.png", dpi=100)


def main() -> None:
    tree = TokenTree(2, 200, 1, [[0]], lambda _, ids: math.exp(-(((len(ids) - 20) / 10) ** 2)))
    reference = np.tile(np.log([0.95, 0.05]), (1, tree.num_states, 1))  # goes on with probability 0.95
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    print(f"error after {UPDATES} updates        noise   measured      bound")
    for row, options in enumerate(({}, {"reference": reference, "beta": BETA})):
        for column, noise in enumerate(NOISE_RUNS):
            for gamma in COLORS:
                errors, bound = measure(BellmanOperator(tree, gamma, **options), noise)
                draw(panels[row, column], gamma, errors, bound)
                print(f"{'soft' if options else 'hard'}, γ = {gamma:<4}  {noise:26.1f}  {errors.mean(axis=0)[-1]:9.2e}  {bound[-1]:9.2e}")
    finish(figure, panels)

    tree = hard_tree(0)
    operator = BellmanOperator(tree, 1.0)
    exact = synchronous_q_learning(operator, tree.horizon, polynomial_step_size(0))
    print(f"γ = 1, step size 1: error {exact.errors[-1]} after {tree.horizon} updates, the length of the longest completion")
    online = q_learning(operator, 5_000, polynomial_step_size(0), behaviour=tree.uniform_policy())
    print(f"the same from texts of random tokens: error {online.errors[-1]} after {online.errors.argmin()} texts")
    print("drawn: q_learning_on_a_tree.png")


if __name__ == "__main__":
    main()
