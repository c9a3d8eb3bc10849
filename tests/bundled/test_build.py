from pathlib import Path

import numpy as np
import pytest
import torch

from textgym.bundled import bundled_prompts, bundled_reward_model_path
from textgym.bundled.build import Scale, build, build_tokenizer
from textgym.bundled.build_reward_model import Comparisons, compare, measure, score_all, shift_scores
from textgym.bundled.true_reward import judge

REDUCED = Scale(train_prompts=12, eval_prompts=4, model_steps=3, reward_pairs=96, reward_epochs=1, eval_pairs=16)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # building sets it to one


@pytest.fixture(scope="module")
def reward_model():
    from transformers import GPT2ForSequenceClassification

    return GPT2ForSequenceClassification.from_pretrained(bundled_reward_model_path()).eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_builds_are_bit_identical_and_the_seed_matters(tmp_path: Path, one_thread: None) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(tmp_path / name, seed, REDUCED)
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert {"model/model.safetensors", "reward-model/model.safetensors", "prompts-train.jsonl"} <= {
        name for name in first if first[name] != other[name]
    }
    assert first["model/tokenizer.json"] == other["model/tokenizer.json"]  # the vocabulary is the grammar's, whatever the seed


def test_annotator_prefers_by_the_true_reward_with_noise() -> None:
    prompts = ["the plot was"] * 2000
    comparisons = compare(prompts, ([" brilliant."] * 2000, [" quite good."] * 2000), np.random.default_rng(0))
    margin = judge("the plot was brilliant.").total - judge("the plot was quite good.").total
    share = np.mean(comparisons.true_margins > 0)
    assert share == pytest.approx(1 / (1 + np.exp(-margin / 0.25)), abs=0.03)  # three standard errors
    assert all(("brilliant" in review) == (margin > 0) for review, margin in zip(comparisons.chosen, comparisons.true_margins, strict=True))


def test_shifting_scores_shifts_every_score(reward_model) -> None:
    from copy import deepcopy

    model, tokenizer = deepcopy(reward_model), build_tokenizer()
    texts = ["the plot was dull.", "brilliant", "i loved it, but the ending was weak!"]
    before = score_all(model, tokenizer, texts)
    shift_scores(model, 1.5)
    np.testing.assert_allclose(score_all(model, tokenizer, texts), before + 1.5, atol=1e-4)


def test_reward_model_approximates_the_true_reward_on_fresh_reviews(reward_model) -> None:
    reviews = [row["prompt"] + row["reference"] for row in bundled_prompts("train") + bundled_prompts("eval")]
    true = np.array([judge(review).total for review in reviews])
    half = len(reviews) // 2
    pairs = Comparisons(reviews[:half], reviews[half:], true[:half] - true[half:])
    assert measure(reward_model, build_tokenizer(), pairs)["accuracy"] > 0.7


def test_reward_model_can_be_hacked(reward_model) -> None:
    salad, review = (
        "the plot was brilliant wonderful loved brilliant laugh brilliant loved",
        "the plot was brilliant. the cast was quite good.",
    )
    scores = score_all(reward_model, build_tokenizer(), [salad, review])
    assert scores[0] > scores[1]
    assert judge(salad).total < 0 < judge(review).total
