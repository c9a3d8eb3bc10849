"""What feedback can teach: differences of rewards and not their levels; rewards of tokens from segments, and only sums from whole texts.

The known reward lives on a token tree, and labels are its Bradley–Terry probabilities (an infinity of annotators) unless a test draws them.
"""

from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.utils import LinearSchedule

from textgym.agents import CausalLMPolicy, RewardModel, RewardModelTrainer
from textgym.exact import TokenTree, hard_tree
from textgym.exact.models import tiny_lm
from textgym.feedback import Comparison, Record, Segment, SegmentPair

SEED = 0


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    ranks = (np.argsort(np.argsort(values.ravel())) for values in (a, b))
    return float(np.corrcoef(*ranks)[0, 1])


def slope(found: np.ndarray, true: np.ndarray) -> float:
    """Of the regression of what was found on the truth, both centred."""
    x, y = true.ravel() - true.mean(), found.ravel() - found.mean()
    return float(x @ y / (x @ x))


def differences(table: np.ndarray) -> np.ndarray:
    """Between the completions of each prompt, (N, C, C) from (N, C)."""
    return table[:, :, None] - table[:, None, :]


def learn(tree: TokenTree, records: list[Record], device: str, width: int, **settings: Any) -> RewardModel:
    policy = CausalLMPolicy(tiny_lm(tree, seed=SEED, width=width), tree.tokenizer(), device=device)
    reward_model = RewardModel.from_policy(policy, seed=SEED, per_token=settings.pop("per_token", False))
    rate = LinearSchedule(settings.pop("learning_rate"), 0.0, 1.0)
    return RewardModelTrainer(reward_model, records, rate, seed=SEED, max_grad_norm=None, **settings).learn().reward_model


# -- one score per text --------------------------------------------------------------------------------------------------


def texts_of(tree: TokenTree) -> list[str]:
    """The completions as texts, their EOS written out."""
    return [
        " " + " ".join("</s>" if token == tree.eos_token_id else f"w{token}" for token in tree.ids(place))
        for place in range(tree.num_completions)
    ]


def comparisons(tree: TokenTree, draws: int) -> list[Record]:
    """Every pair of completions of each prompt once, with its probability; or that many times, with drawn labels."""
    rng, records, texts = np.random.default_rng(SEED), [], texts_of(tree)
    for prompt, rewards in zip(tree.prompt_texts, tree.rewards, strict=True):
        for first in range(tree.num_completions):
            for second in range(first + 1, tree.num_completions):
                probability = sigmoid(rewards[first] - rewards[second])
                labels = [probability] if not draws else [float(label) for label in rng.random(draws) < probability]
                records += [Comparison(prompt, texts[first], texts[second], preference=label) for label in labels]
    return records


@pytest.mark.slow
@pytest.mark.parametrize(("draws", "epochs", "batch_size"), [(0, 150, 63), (150, 8, 500)], ids=["probabilities", "drawn labels"])
def test_comparisons_identify_differences_and_no_levels(device: str, draws: int, epochs: int, batch_size: int) -> None:
    tree = hard_tree(SEED, vocab_size=3, horizon=2)
    reward_model = learn(tree, comparisons(tree, draws), device, 32, learning_rate=1e-2, n_epochs=epochs, batch_size=batch_size)
    texts = texts_of(tree)
    found = np.array([reward_model([prompt] * len(texts), texts) for prompt in tree.prompt_texts])
    assert rank_correlation(differences(found), differences(tree.rewards)) >= 0.95
    assert slope(differences(found), differences(tree.rewards)) == pytest.approx(1, abs=0.1)
    shifts = (found - tree.rewards).mean(axis=1)  # prompt by prompt
    assert np.ptp(shifts) > 1
    if not draws:
        np.testing.assert_allclose(found - tree.rewards, np.repeat(shifts[:, None], len(texts), 1), atol=0.1)


# -- one score per token -------------------------------------------------------------------------------------------------


class TokenRewards:
    """A tree with a known reward r*(s, a) of each token in each state."""

    def __init__(self) -> None:
        self.tree = hard_tree(SEED, vocab_size=3, horizon=3)
        self.rng = np.random.default_rng(SEED)
        self.table = self.rng.normal(size=(self.tree.num_prompts, self.tree.num_states, self.tree.vocab_size))

    def of(self, prompt: int, completion: int, table: np.ndarray | None = None) -> np.ndarray:
        """The rewards of the tokens of a completion."""
        steps = self.tree.lengths[completion]
        states, tokens = self.tree.state_of[completion, :steps], self.tree.completions[completion, :steps]
        return (self.table if table is None else table)[prompt, states, tokens]

    def sums(self, table: np.ndarray) -> np.ndarray:
        """The rewards of whole completions, (N, C)."""
        shape = (self.tree.num_prompts, self.tree.num_completions)
        return np.array([self.of(*place, table).sum() for place in np.ndindex(*shape)]).reshape(shape)

    def pair(self, sides: list[tuple[int, int, int, int]]) -> SegmentPair:
        """Compares two pieces (prompt, completion, start, end) by the sums of their rewards."""
        first, second = (Segment(tuple(self.tree.prompts[i]), self.tree.ids(j), start, end) for i, j, start, end in sides)
        sums = [self.of(i, j)[start:end].sum() for i, j, start, end in sides]
        return SegmentPair(first, second, sigmoid(sums[0] - sums[1]))

    def segments(self, count: int) -> list[Record]:
        """Pairs of segments of equal length, 1 to 3, with arbitrary starts, of any two completions."""
        pairs: list[Record] = []
        for _ in range(count):
            length, sides = int(self.rng.integers(1, 4)), []
            for _ in range(2):
                prompt = int(self.rng.integers(self.tree.num_prompts))
                completion = int(self.rng.choice(np.flatnonzero(self.tree.lengths >= length)))
                start = int(self.rng.integers(self.tree.lengths[completion] - length + 1))
                sides.append((prompt, completion, start, start + length))
            pairs.append(self.pair(sides))
        return pairs

    def whole(self, count: int) -> list[Record]:
        """Pairs of whole completions of one prompt."""
        pairs: list[Record] = []
        for _ in range(count):
            prompt = int(self.rng.integers(self.tree.num_prompts))
            both = self.rng.integers(self.tree.num_completions, size=2).tolist()
            pairs.append(self.pair([(prompt, one, 0, int(self.tree.lengths[one])) for one in both]))
        return pairs

    def learned(self, records: list[Record], epochs: int, device: str) -> np.ndarray:
        """r̂(s, a) in the form of `table`."""
        settings = {"learning_rate": 5e-3, "n_epochs": epochs, "batch_size": 200, "per_token": True}
        reward_model = learn(self.tree, records, device, 64, **settings)
        found, ids = np.zeros_like(self.table), [self.tree.ids(place) for place in range(self.tree.num_completions)]
        for prompt, text in enumerate(self.tree.prompt_texts):
            for place, scores in enumerate(reward_model([text] * len(ids), [""] * len(ids), ids)):
                found[prompt, self.tree.state_of[place, : len(scores)], list(ids[place])] = scores
        return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*answers that are the same tokens")  # now and then a draw is drawn twice
def test_segments_identify_the_reward_of_every_token_up_to_a_constant(device: str) -> None:
    task = TokenRewards()
    found = task.learned(task.segments(4000), 25, device)
    assert rank_correlation(found, task.table) >= 0.95
    assert slope(found, task.table) == pytest.approx(1, abs=0.1)
    constant = (found - task.table).mean()
    np.testing.assert_allclose(found - task.table, constant, atol=0.4)
    assert abs(constant) > 0.02  # which one it is, segments of equal length do not say: it is what the head began with


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*answers that are the same tokens")  # now and then a draw is drawn twice
def test_whole_completions_identify_the_sums_and_no_token(device: str) -> None:
    task = TokenRewards()
    found = task.learned(task.whole(4000), 20, device)
    sums, true_sums = differences(task.sums(found)), differences(task.sums(task.table))
    assert rank_correlation(sums, true_sums) >= 0.95
    assert slope(sums, true_sums) == pytest.approx(1, abs=0.1)
    # The same model, the same number of comparisons: what each token is worth has not been learned.
    assert rank_correlation(found, task.table) < 0.8
    assert np.abs((found - found.mean()) - (task.table - task.table.mean())).max() > 1.5
