"""Learning from feedback, whole: what a run leaves, that it goes on exactly where it was stopped, and that it learns what is meant."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from textgym.agents import RLHF, CausalLMPolicy, RewardModel, compare_policies
from textgym.bundled import bundled_model_path, bundled_prompts, true_reward
from textgym.errors import FeedbackNeeded
from textgym.feedback import SyntheticAnnotator, read_feedback, write_feedback
from textgym.rewards import ClassifierReward

SMALL: dict[str, Any] = {
    "num_pairs": 24,
    "timesteps_per_round": 200,
    "max_new_tokens": 8,
    "num_envs": 8,
    "agent_options": {"learning_rate": 1e-3, "num_generations": 4},
    "reward_model_options": {"learning_rate": 1e-3, "batch_size": 8},
    "checkpoint_interval": 50,
}
PROMPTS = [row["prompt"] for row in bundled_prompts("train")][:10]


def policy(device: str) -> CausalLMPolicy:
    return CausalLMPolicy.from_pretrained(bundled_model_path(), device=device)


def annotator() -> SyntheticAnnotator:
    return SyntheticAnnotator("film-review-true", temperature=0.25, seed=5)


@pytest.fixture
def make(tmp_path: Path, device: str) -> Callable[..., RLHF]:
    def make(name: str = "run", who: Any = None, **changes: Any) -> RLHF:
        return RLHF(policy(device), PROMPTS, who or annotator(), tmp_path / name, **{**SMALL, **changes})

    return make


def weights(model: CausalLMPolicy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class PowerCutError(Exception):
    """Goes off."""


class CutAt(BaseCallback):
    """Ends the process, so to say, at a timestep."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def _on_step(self) -> bool:
        if self.model.num_timesteps >= self.timesteps:
            raise PowerCutError
        return True


def test_a_round_leaves_comparisons_a_reward_model_and_a_policy(make: Callable[..., RLHF], device: str) -> None:
    rlhf = make()
    (done,) = rlhf.run()
    folder = rlhf.folder / "round-1"
    assert done.number == 1 and done.comparisons == 24 and done.timesteps >= 200
    assert json.loads((folder / "round.json").read_text())["comparisons"] == 24
    records = read_feedback(folder / "comparisons.jsonl", form="comparison").records
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert [{one.chosen, one.rejected} for one in records] == [set(pair["completions"]) for pair in pairs]
    assert {pair["prompt"] for pair in pairs} == set(PROMPTS)  # 24 pairs of 10 prompts: each at least twice
    assert rlhf.agent is not None
    assert not equal(weights(rlhf.policy), weights(rlhf.agent.reference))
    assert equal(weights(rlhf.agent.reference), weights(policy(device)))
    # what was paid is what was saved, and any tool can read it
    saved = RewardModel.from_pretrained(folder / "reward-model", device=device)
    texts = [" a joy.", " a bore."]
    expected = ClassifierReward(folder / "reward-model", device=device)(["the film was"] * 2, texts)
    assert rlhf.reward(["the film was"] * 2, texts) == pytest.approx(expected, abs=1e-5)
    assert saved(prompts=["the film was"] * 2, completions=texts) == pytest.approx(expected, abs=1e-5)
    assert equal(weights(CausalLMPolicy.from_pretrained(folder / "model", device=device)), weights(rlhf.policy))


def test_the_reward_has_mean_zero_on_the_reference(make: Callable[..., RLHF]) -> None:
    rlhf = make()
    rlhf.run()
    assert rlhf.agent is not None and rlhf.reward_model is not None
    prompts = PROMPTS * 40
    texts = rlhf.agent.reference.generate(prompts, 8, seed=1).texts
    rewards = np.array(rlhf.reward_model(prompts=prompts, completions=texts))
    assert abs(rewards.mean()) < 4 * rewards.std() * (1 / 400 + 1 / 512) ** 0.5


@pytest.mark.parametrize("cut", [30, 230, 330], ids=["in the first round", "at the second's beginning", "in the second round"])
def test_a_run_that_was_cut_goes_on_exactly(make: Callable[..., RLHF], cut: int) -> None:
    whole = make("whole")
    whole.run(2)
    with pytest.raises(PowerCutError):
        make("cut").run(2, callback=[CutAt(cut)])
    resumed = make("cut")
    assert resumed.run(2) == whole.rounds
    assert equal(weights(resumed.policy), weights(whole.policy))
    for number in (1, 2):
        name = f"round-{number}/comparisons.jsonl"
        assert (resumed.folder / name).read_text() == (whole.folder / name).read_text()


def test_a_run_goes_on_with_more_rounds(make: Callable[..., RLHF]) -> None:
    whole = make("whole")
    whole.run(2)
    make("parts").run(1)
    parts = make("parts")
    assert [one.number for one in parts.rounds] == [1]
    assert parts.run(2) == whole.rounds
    assert equal(weights(parts.policy), weights(whole.policy))


@pytest.mark.filterwarnings("ignore::textgym.errors.TrainingWarning")  # of the collapse that is wanted here
def test_later_rounds_ask_about_what_the_policy_has_become(make: Callable[..., RLHF]) -> None:
    rlhf = make(timesteps_per_round=2000, agent_options={"learning_rate": 1e-2, "beta": 0.0})
    first, second = rlhf.run(2)
    assert (first.comparisons, second.comparisons) == (24, 48)
    completions = []
    for number in (1, 2):
        lines = (rlhf.folder / f"round-{number}" / "pairs.jsonl").read_text().splitlines()
        completions.append([text for line in lines for text in json.loads(line)["completions"]])
    assert len(set(completions[1])) < 0.8 * len(set(completions[0]))  # a step size and a β that make anyone repetitive


def test_somebody_outside_compares(make: Callable[..., RLHF], tmp_path: Path, device: str) -> None:
    def outside() -> RLHF:
        return RLHF(policy(device), PROMPTS, None, tmp_path / "outside", **SMALL)

    folder = tmp_path / "outside" / "round-1"
    with pytest.raises(FeedbackNeeded, match=r"textgym label .*pairs\.jsonl --out .*comparisons\.jsonl"):
        outside().run()
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    sides = [[row["completions"][place] for row in rows] for place in (0, 1)]
    write_feedback(folder / "comparisons.jsonl", annotator().compare([row["prompt"] for row in rows], *sides))
    inside = make()
    assert outside().run() == inside.run()


def test_feedback_that_is_there_is_used_first(make: Callable[..., RLHF]) -> None:
    rankings = [{"prompt": PROMPTS[i % 10], "completions": [" good.", " bad.", " worse."], "ranks": [1, 2, 2]} for i in range(20)]
    (done,) = make(feedback=rankings).run()
    assert done.comparisons == 40  # ties are no comparisons


@pytest.mark.filterwarnings("ignore::textgym.errors.TrainingWarning")
def test_demonstrations_make_the_reference(make: Callable[..., RLHF], device: str) -> None:
    start = policy(device)
    before = weights(start)
    rows = [{"prompt": prompt, "completion": " brilliant."} for prompt in PROMPTS]
    rlhf = make(demonstrations=rows, sft_options={"learning_rate": 3e-3, "n_epochs": 60})
    rlhf.run()
    assert rlhf.agent is not None
    said = rlhf.agent.reference.generate(PROMPTS, 8, temperature=0).texts
    assert sum(text == " brilliant." for text in said) >= 8
    assert equal(weights(start), before)


def test_another_run_needs_another_folder(make: Callable[..., RLHF]) -> None:
    make().run()
    with pytest.raises(ValueError, match=r"`num_pairs` must be that of the run in .*, 24, got 25"):
        make(num_pairs=25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "DPO"}, "`algorithm` must be the name of an online agent, such as 'PPO' or 'RLOO', got 'DPO'"),
        ({"algorithm": "nothing"}, "`algorithm` must be the name of an online agent"),
        ({"num_pairs": 0}, "`num_pairs` must be"),
        ({"timesteps_per_round": 0}, "`timesteps_per_round` must be"),
    ],
)
def test_bad_arguments(make: Callable[..., RLHF], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.slow
def test_it_learns_what_the_annotator_means(tmp_path: Path, device: str) -> None:
    """Preferences by the true rule, which the policy never sees, make it write what the rule likes."""
    rows = bundled_prompts("train")
    rlhf = RLHF(
        policy(device),
        [row["prompt"] for row in rows],
        annotator(),
        tmp_path / "run",
        num_pairs=2000,
        timesteps_per_round=20_000,
        max_new_tokens=24,
        agent_options={"learning_rate": 1e-3, "beta": 0.2},
        reward_model_options={"learning_rate": 1e-3, "n_epochs": 2},
    )
    (done,) = rlhf.run()
    assert rlhf.agent is not None
    report = compare_policies(
        rlhf.policy,
        [row["prompt"] for row in bundled_prompts("eval")],
        rlhf.agent.reference,
        true_reward=true_reward,
        max_new_tokens=24,
        num_generations=4,
    )
    assert done.reward_model["accuracy"]["mean"] > 0.55
    assert report.win_rates["true_reward"].low > 0.55
