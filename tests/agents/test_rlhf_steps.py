"""What each step of RLHF learns from and is measured on: comparisons, the reference's completions, fresh samples in every round."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from textgym.agents import RLHF, CausalLMPolicy, RewardModel
from textgym.agents.common.rlhf_steps import HELD_OUT, fit_reward_model, sample_completions, sample_pairs, split_by_prompt
from textgym.agents.common.scored_completions import PromptRows
from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.feedback import Comparison, SyntheticAnnotator, write_feedback

PROMPTS = [row["prompt"] for row in bundled_prompts("train")][:20]
TOKENS = 6
OPTIONS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 16, "n_epochs": 2}
# What is compared is nothing that the reference would write, so its rewards say nothing of the reference's.
COMPARISONS = [Comparison(prompt, " good good good.", " bad bad bad.") for prompt in PROMPTS]
SWAPPED = [Comparison(one.prompt, one.rejected, one.chosen) for one in COMPARISONS]


def reference(device: str) -> CausalLMPolicy:
    return CausalLMPolicy.from_pretrained(bundled_model_path(), device=device)


def another_policy(device: str) -> CausalLMPolicy:
    """Returns a policy that has moved far from the reference."""
    policy = reference(device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return policy


def rewards(model: RewardModel, policy: CausalLMPolicy, copies: int = 30) -> np.ndarray:
    """Returns the rewards of fresh completions of `policy`, the same number of each prompt."""
    prompts = PROMPTS * copies
    return np.array(model(prompts=prompts, completions=sample_completions(policy, prompts, TOKENS, seed=77)))


def has_mean_zero(model: RewardModel, policy: CausalLMPolicy) -> bool:
    """Whether the mean reward of `policy` is 0 to within five standard errors, of this sample and of the 512 texts of the fit."""
    found = rewards(model, policy)
    return abs(found.mean()) < 5 * found.std() * (1 / len(found) + 1 / 512) ** 0.5


def weights(model: RewardModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.model.parameters()]


def apart(first: RewardModel, second: RewardModel) -> float:
    """Returns the largest difference between two models' weights."""
    return max((a - b).abs().max().item() for a, b in zip(weights(first), weights(second), strict=True))


def loop(folder: str, device: str, present: CausalLMPolicy | None = None, comparisons: list[list[Comparison]] | None = None) -> RLHF:
    """Returns a run whose policy has moved on from the reference, with the comparisons of its rounds."""
    rlhf = RLHF(
        reference(device),
        PROMPTS,
        SyntheticAnnotator("film-review-true", temperature=0.25, seed=5),
        folder,
        num_pairs=20,
        max_new_tokens=TOKENS,
        reward_model_options=OPTIONS,
        seed=3,
    )
    for number, records in enumerate(comparisons or [], start=1):
        (Path(folder) / f"round-{number}").mkdir()
        write_feedback(Path(folder) / f"round-{number}" / "comparisons.jsonl", records)
    rlhf.agent = SimpleNamespace(reference=reference(device), policy=present or another_policy(device), num_timesteps=0)  # type: ignore[assignment]
    return rlhf


def test_the_reward_has_mean_zero_on_the_references_completions(device: str) -> None:
    policy = reference(device)
    for comparisons in (COMPARISONS, SWAPPED):
        model = fit_reward_model(policy, comparisons, PromptRows.read(PROMPTS), TOKENS, 0, OPTIONS).model
        assert has_mean_zero(model, policy)


def test_the_reward_model_comes_from_the_reference(device: str) -> None:
    """Trunk, head and normalisation, though the present policy is another one."""
    with tempfile.TemporaryDirectory() as folder:
        rlhf = loop(folder, device)
        (Path(folder) / "round-1").mkdir()
        rlhf.fit(1, COMPARISONS, progress_bar=False)
        assert rlhf.agent is not None and rlhf.reward_model is not None
        expected = fit_reward_model(rlhf.agent.reference, COMPARISONS, rlhf.prompts, TOKENS, rlhf.seed + 1, OPTIONS).model
        assert apart(rlhf.reward_model, expected) < 1e-5
        assert has_mean_zero(rlhf.reward_model, rlhf.agent.reference)


def test_each_round_pays_by_its_own_reward_model(device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rlhf = loop(folder, device, comparisons=[COMPARISONS, SWAPPED])
        liked = []
        for number, comparisons in ((1, COMPARISONS), (2, SWAPPED)):
            rlhf.fit(number, comparisons, progress_bar=False)
            good, bad = rlhf.reward(prompts=PROMPTS[:1] * 2, completions=[" good good good.", " bad bad bad."])
            liked.append(good > bad)
        assert liked == [True, False]


def test_a_round_learns_from_the_comparisons_of_all_rounds_so_far(device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rlhf = loop(folder, device, comparisons=[COMPARISONS[:3], SWAPPED[3:8], COMPARISONS[8:]])
        assert rlhf.comparisons(1) == COMPARISONS[:3]
        assert rlhf.comparisons(2) == COMPARISONS[:3] + SWAPPED[3:8]


def test_comparisons_are_parted_by_prompt() -> None:
    comparisons = [Comparison(f"prompt {i % 40}", f"good {i}", f"bad {i}") for i in range(400)]
    train, held_out = split_by_prompt(comparisons, HELD_OUT, seed=0)
    assert not {one.prompt for one in train} & {one.prompt for one in held_out}
    assert len({one.prompt for one in held_out}) == 4  # a tenth of the prompts
    assert sorted([*train, *held_out], key=repr) == sorted(comparisons, key=repr)
    assert split_by_prompt(comparisons, HELD_OUT, seed=1)[1] != held_out
    assert split_by_prompt(comparisons[:1], HELD_OUT, seed=0) == (comparisons[:1], [])


def test_what_is_held_out_is_not_learned(device: str) -> None:
    """Turned round, the comparisons that are held out change what is reported of the model, and not the model."""
    policy, prompts = reference(device), PromptRows.read(PROMPTS)
    held_out = {one.prompt for one in split_by_prompt(COMPARISONS, HELD_OUT, seed=0)[1]}
    turned = [other if one.prompt in held_out else one for one, other in zip(COMPARISONS, SWAPPED, strict=True)]
    model, report, *_ = fit_reward_model(policy, COMPARISONS, prompts, TOKENS, 0, OPTIONS)
    same, other_report, *_ = fit_reward_model(policy, turned, prompts, TOKENS, 0, OPTIONS)
    assert apart(model, same) < 1e-6
    assert report is not None and other_report is not None
    assert report.to_dict()["accuracy"]["mean"] == 1.0 - other_report.to_dict()["accuracy"]["mean"] == 1.0


def test_each_round_asks_about_other_samples(device: str) -> None:
    """Also where the policy has not moved: other draws, in another order."""
    policy = reference(device)
    with tempfile.TemporaryDirectory() as folder:
        rlhf = loop(folder, device, present=policy)
        for number in (1, 2):
            (Path(folder) / f"round-{number}").mkdir()
            rlhf.ask(number)
        first, second = ((Path(folder) / f"round-{number}" / "pairs.jsonl").read_text(encoding="utf-8") for number in (1, 2))
    assert first != second


def test_pairs_are_new_draws_in_a_new_order_with_every_seed(device: str) -> None:
    policy, prompts = reference(device), PromptRows.read(PROMPTS)
    samples = [sample_pairs(policy, prompts, 20, TOKENS, seed) for seed in (1, 2, 1)]
    assert samples[0] == samples[2]
    orders, texts = zip(
        *(([row["prompt"] for row in rows], {row["prompt"]: row["completions"] for row in rows}) for rows in samples), strict=True
    )
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == sorted(PROMPTS)
    same = sum(texts[0][prompt] == texts[1][prompt] for prompt in PROMPTS)
    assert same < 5
    one_prompt, others = (sample_pairs(policy, PromptRows.read(PROMPTS[:1]), 30, TOKENS, seed) for seed in (1, 2))
    assert one_prompt != others
    assert sum(len(set(row["completions"])) == 2 for row in one_prompt) > 15  # the two of a pair are two draws


def test_every_batch_of_samples_is_a_new_draw(device: str) -> None:
    texts = sample_completions(reference(device), PROMPTS[:1] * 128, TOKENS, seed=0)
    assert texts[:64] != texts[64:]
