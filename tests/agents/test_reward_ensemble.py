"""`RewardEnsemble`: mean less disagreement, minimum, and what is worth asking about."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from textgym.agents import CausalLMPolicy, RewardEnsemble, RewardModel
from textgym.feedback import Comparison

PROMPTS, TEXTS = ["abc ", "hello ", "a "], ["def", "you there", "b"]


@pytest.fixture
def policy(tiny_model, tokenizer, device: str) -> CausalLMPolicy:
    return CausalLMPolicy(tiny_model("gpt2", len(tokenizer)), tokenizer, device=device)


def members(policy: CausalLMPolicy, **settings: Any) -> list[RewardModel]:
    return [RewardModel.from_policy(policy, seed=seed, **settings) for seed in range(3)]


def test_the_reward_by_hand(policy) -> None:
    models = members(policy)
    scores = np.array([model(PROMPTS, TEXTS) for model in models])
    careful = RewardEnsemble(models, uncertainty_penalty=0.7)
    np.testing.assert_allclose(careful(PROMPTS, TEXTS), scores.mean(0) - 0.7 * scores.std(0), atol=1e-5)
    np.testing.assert_allclose(RewardEnsemble(models)(PROMPTS, TEXTS), scores.mean(0), atol=1e-5)
    np.testing.assert_allclose(RewardEnsemble(models, aggregate="min")(PROMPTS, TEXTS), scores.min(0), atol=1e-5)
    np.testing.assert_allclose(careful.member_scores(PROMPTS, TEXTS), scores, atol=1e-5)
    assert scores.std(0).min() > 0.05


def test_token_rewards(policy) -> None:
    models = members(policy, per_token=True)
    ids = [[5, 6, 7], [8, 2], [9]]
    found = RewardEnsemble(models, uncertainty_penalty=0.5)(PROMPTS, TEXTS, ids)
    each = [model(PROMPTS, TEXTS, ids) for model in models]
    assert [len(row) for row in found] == [3, 2, 1]
    numbers = np.array([one[0][1] for one in each])
    assert found[0][1] == pytest.approx(numbers.mean() - 0.5 * numbers.std(), abs=1e-5)


@pytest.mark.parametrize("per_token", [False, True])
def test_an_environment_pays_it(task, per_token: bool) -> None:
    ensemble = RewardEnsemble(members(task.policy(), per_token=per_token), uncertainty_penalty=1.0)
    prompts = [prompt + " " for prompt in task.tree.prompt_texts]
    env = gym.make("TextGen-v0", **{**task.arguments(), "reward": ensemble, "prompts": prompts})
    env.reset(seed=0)
    rewards = [env.step(action)[1] for action in (0, 1, task.tree.eos_token_id)]
    assert len([reward for reward in rewards if reward != 0.0]) == (3 if per_token else 1)


def test_normalised_members_disagree_on_texts_and_not_on_levels(policy) -> None:
    models = members(policy)
    ensemble = RewardEnsemble(models, uncertainty_penalty=1.0)
    ensemble.normalise(PROMPTS, TEXTS)
    scores = ensemble.member_scores(PROMPTS, TEXTS)
    np.testing.assert_allclose(scores.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(scores.std(1), 1, atol=1e-4)


def test_disagreement_finds_the_pairs_worth_asking_about(policy) -> None:
    models = members(policy)
    ensemble = RewardEnsemble(models)
    prompts, first, second = ["x "] * 3, ["abc", "hello", "yes"], ["abc", "what is it", "no"]
    found = ensemble.disagreement(prompts, first, second)
    odds = np.array([np.array(model(prompts, first)) - np.array(model(prompts, second)) for model in models])
    np.testing.assert_allclose(found, (1 / (1 + np.exp(-odds))).std(0), atol=1e-6)
    assert found[0] == pytest.approx(0, abs=1e-6)
    order = ensemble.most_disputed(prompts, first, second, 2)
    assert order == np.argsort(-found)[:2].tolist() and 0 not in order


def test_training_on_bootstrap_samples(policy, tmp_path: Path) -> None:
    """Members agree on what the feedback says and disagree on what it says nothing about."""
    rng = np.random.default_rng(0)
    records = []
    for _ in range(60):
        words = ["".join(rng.choice(list("abc"), 4)) for _ in range(2)]
        if words[0] == words[1]:
            continue
        records.append(Comparison("say ", *sorted(words, key=lambda word: -word.count("a"))))
    settings = {"num_members": 3, "n_epochs": 4, "batch_size": 10, "seed": 5}
    ensemble = RewardEnsemble.train(policy, records, 3e-3, uncertainty_penalty=0.3, **settings)
    scores = ensemble.member_scores(["say "] * 2, ["aaaa", "bcbc"])
    assert (scores[:, 0] > scores[:, 1]).all()
    assert len(set(scores[:, 0].round(4))) == 3
    known = ensemble.disagreement(["say "], ["aaaa"], ["bcbc"])
    unknown = ensemble.disagreement(["zzz "] * 8, [f"{i} xyz" for i in range(8)], [f"q{i}" for i in range(8)])
    assert unknown.mean() > 2 * known[0]
    again = RewardEnsemble.train(policy, records, 3e-3, **settings)
    np.testing.assert_array_equal(again.member_scores(["say "], ["abab"]), ensemble.member_scores(["say "], ["abab"]))
    same = RewardEnsemble.train(lambda seed: RewardModel.from_policy(policy, seed=0), records, 3e-3, bootstrap=False, **settings)
    assert len(set(same.member_scores(["say "], ["abab"])[:, 0].round(5))) == 3  # another order of the records
    ensemble.save_pretrained(tmp_path / "ensemble")
    loaded = RewardEnsemble.from_pretrained(tmp_path / "ensemble", device=policy.device)
    assert (loaded.uncertainty_penalty, loaded.aggregate, len(loaded.models)) == (0.3, "mean", 3)
    np.testing.assert_allclose(loaded(PROMPTS, TEXTS), ensemble(PROMPTS, TEXTS), atol=1e-6)


def test_bad_arguments(policy, tmp_path: Path) -> None:
    models = members(policy)
    for arguments, said in (
        ({"models": models[:1]}, "`models` must be at least two"),
        ({"models": [models[0], max]}, "`models` must be RewardModels, got a builtin"),
        ({"models": [*models, RewardModel.from_policy(policy, per_token=True)]}, "all have a score per text"),
        ({"models": models, "uncertainty_penalty": -1.0}, "`uncertainty_penalty` must be"),
        ({"models": models, "aggregate": "median"}, "`aggregate` must be one of"),
        ({"models": models, "aggregate": "min", "uncertainty_penalty": 1.0}, "`uncertainty_penalty` must be 0 with"),
    ):
        with pytest.raises(ValueError, match=said):
            RewardEnsemble(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no ensemble"):
        RewardEnsemble.from_pretrained(tmp_path)
