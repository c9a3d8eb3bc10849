"""What ruins a run without an error is told: each symptom by numbers put in by hand, once in a run, and not by honest small runs."""

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3.common.logger import HumanOutputFormat, Logger

from textgym.agents import GRPO, PPO, REINFORCE, SFT, CausalLMPolicy
from textgym.agents.common import diagnostics
from textgym.agents.common.batches import RolloutBatch
from textgym.agents.common.diagnostics import (
    Finding,
    broken_gradient,
    constant_reward,
    empty_completions,
    groups_without_spread,
    identical_fraction,
    kl_at_start,
    negative_kl,
    never_ends,
    part_findings,
    ratio_at_start,
    repeated_completions,
    rollout_findings,
    sampling_mismatch,
    still_outputs,
    zero_gradient,
)
from textgym.agents.common.run_warnings import RunWarnings
from textgym.errors import TrainingWarning

LOGGER = Logger(folder=None, output_formats=[])
ROOT = Path(__file__).parents[2]


def rollout(completions: list[list[int]], *, group: int = 1, prompts: list[int] | None = None, **changes: Any) -> RolloutBatch:
    """A rollout of given completions; row i has prompt `[i // group]`, and id 2 is the end."""
    width, count = max(map(len, completions)), len(completions)
    ids = torch.tensor([c + [0] * (width - len(c)) for c in completions])
    infos = [{"finish_reason": "eos" if c[-1] == 2 else "length", "rewards": {}} for c in completions]
    values: dict[str, Any] = {
        "prompt_ids": torch.tensor(prompts or [i // group for i in range(count)])[:, None],
        "prompt_lengths": torch.ones(count, dtype=torch.int64),
        "completion_ids": ids,
        "lengths": torch.tensor([len(c) for c in completions]),
        "log_probs": torch.zeros(count, width),
        "rewards": torch.zeros(count, width),
        "truncated": torch.zeros(count, dtype=torch.bool),
        "unshaped_returns": torch.zeros(count),
        "kl_per_sequence": torch.zeros(count),
        "num_generations": group,
        "infos": infos,
    }
    return RolloutBatch(**{**values, **changes})


def told(finding: Finding) -> bool:
    return finding.sentence is not None


def test_completions_that_never_end() -> None:
    cut = [5] * 12
    assert told(never_ends(rollout([cut] * 3)))
    assert not told(never_ends(rollout([cut, cut, [5, 2]])))
    assert not told(never_ends(rollout([[5] * 11] * 3))), "of so few tokens nobody expects an end"


def test_rewards_that_are_all_the_same() -> None:
    assert told(constant_reward(torch.tensor([0.5, 0.5, 0.5])))
    assert told(constant_reward(torch.tensor([100.0, 100.0 + 1e-4, 100.0]))), "the rounding of taking the KL term out is no difference"
    assert not told(constant_reward(torch.tensor([0.5, 0.5, 0.501])))
    names = [
        f.name for f in rollout_findings(rollout([[5]] * 2), torch.ones(2), algorithm="PPO", room=8, compares_groups=False, varied=True)
    ]
    assert "saturated_reward" in names and "constant_reward" not in names


def test_groups_without_spread() -> None:
    assert told(groups_without_spread(torch.tensor([0.0, 0.0, 1.0, 1.0]), 2, "GRPO"))
    assert not told(groups_without_spread(torch.tensor([0.0, 0.0, 1.0, 0.0]), 2, "GRPO"))
    assert groups_without_spread(torch.zeros(12), 4, "GRPO").items == 3, "prompts are counted, not completions"
    assert "has learned what these prompts teach" in str(groups_without_spread(torch.zeros(4), 2, "RLOO", varied=True).sentence)


def test_one_cause_is_one_sentence() -> None:
    batch = rollout([[5, 2]] * 4, group=2)
    findings = rollout_findings(batch, torch.zeros(4), algorithm="RLOO", room=32, compares_groups=True)
    assert [f.name for f in findings if told(f)] == ["constant_reward"]


@pytest.mark.parametrize(
    ("completions", "group", "expected"),
    [
        ([[5, 2], [5, 2], [6, 2], [7, 2]], 4, 1 / 3),  # one of the three that could repeat does
        ([[5, 2], [5, 2], [6, 2], [6, 2]], 2, 1.0),
        ([[5, 2], [6, 2], [5, 2], [6, 2]], 2, 0.0),  # the same text for another prompt is no repetition
        ([[5, 2], [5, 2], [5, 2], [7, 2]], 1, 2 / 3),  # one completion a prompt: over the rollout
        ([[5, 6, 2], [5, 6]], 2, 0.0),  # ended and cut are different
        ([[5, 2]], 1, 0.0),
    ],
)
def test_the_share_of_identical_completions(completions: list[list[int]], group: int, expected: float) -> None:
    assert identical_fraction(rollout(completions, group=group)) == pytest.approx(expected)


def test_draws_of_one_prompt_are_found_where_groups_are_not_declared() -> None:
    batch = rollout([[5, 2], [5, 2], [6, 2], [6, 2]], prompts=[8, 9, 8, 9])
    assert identical_fraction(batch) == 0.0


def test_collapse_and_empty_completions() -> None:
    long = [5, 6, 7, 8, 2]
    assert told(repeated_completions(rollout([long] * 3 + [[9, 9, 9, 9]])))
    assert not told(repeated_completions(rollout([[5, 2]] * 4))), "short answers are alike honestly"
    assert told(empty_completions(rollout([[2], [2], [5, 2]])))
    assert not told(empty_completions(rollout([[2], [5, 2], [5, 2]])))
    assert not told(empty_completions(rollout([[5]] * 3))), "cut, not ended"


def test_parts_of_a_reward() -> None:
    batch = rollout([[5, 2], [6, 2]])
    batch.infos[0]["rewards"].update(a=1.0, b=0.0)
    batch.infos[1]["rewards"].update(a=2.0, b=0.0)
    findings = {f.name: f for f in part_findings(batch, ["a", "b", "c"])}
    assert [name for name, f in findings.items() if told(f)] == ["constant_part/b", "part_without_value/c"]
    assert findings["constant_part/b"].lasting > findings["part_without_value/c"].lasting
    assert not list(part_findings(batch, ["a"])), "one part is the reward itself"


@pytest.mark.parametrize(
    ("dtype", "gap", "wrong"), [("float32", 0.001, False), ("float32", 0.03, True), ("bfloat16", 0.03, False), ("bfloat16", 0.3, True)]
)
def test_distributions_before_the_first_step(dtype: str, gap: float, wrong: bool) -> None:
    precision, length = getattr(torch, dtype), 3
    batch = rollout([[5, 6, 2]] * 4, kl_per_sequence=torch.tensor([gap, -gap, gap, -gap]) * length)
    assert told(kl_at_start(batch, precision)) == wrong, "of either sign"
    zeros, mask = torch.zeros(4, 3), batch.completion_mask
    assert told(sampling_mismatch(zeros, zeros + gap, mask, precision)) == wrong
    assert told(ratio_at_start(zeros + gap, zeros, mask, precision)) == wrong
    assert told(ratio_at_start(zeros * float("nan"), zeros, mask, precision))


def test_a_kl_below_what_chance_allows() -> None:
    """E[exp(−Σ log-ratio)] ≤ 1 under the policy's own samples, so a sum of −30 nats has a probability below 1e-13."""
    assert told(negative_kl(rollout([[5, 2]] * 30, kl_per_sequence=torch.full((30,), -1.0)), torch.float32))
    assert not told(negative_kl(rollout([[5, 2]] * 10, kl_per_sequence=torch.full((10,), -1.0)), torch.float32))
    assert not told(negative_kl(rollout([[5, 2]] * 4, kl_per_sequence=torch.tensor([-30.0, 40.0, float("nan"), 0.0])), torch.float32))


def test_gradients_and_adapters() -> None:
    assert told(zero_gradient(0.0)) and not told(zero_gradient(1e-12))
    assert [told(broken_gradient(norm, 3)) for norm in (float("nan"), float("inf"), 1e9)] == [True, True, False]
    assert told(still_outputs(torch.ones(2), torch.ones(2), 10)) and not told(
        still_outputs(torch.ones(2), torch.tensor([1.0, 1 + 1e-6]), 10)
    )


# -- when, and once -------------------------------------------------------------------------------------------------


def observe(record: RunWarnings, sentence: str | None, items: int = 8) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record.observe([Finding("symptom", sentence, items, lasting=2, at_least=16)], LOGGER)
    return [str(w.message) for w in caught]


def test_a_symptom_is_told_when_it_has_lasted_and_once() -> None:
    record = RunWarnings()
    assert [observe(record, "bad") for _ in range(4)] == [[], ["bad"], [], []]
    few = RunWarnings()
    assert [observe(few, "bad", items=6) for _ in range(3)] == [[], [], ["bad"]], "two rollouts, but twelve completions only"
    broken = RunWarnings()
    assert [observe(broken, sentence) for sentence in ("bad", None, "bad", "bad")] == [[], [], [], ["bad"]], "in a row"


def test_a_resumed_run_knows_what_was_told() -> None:
    record, resumed = RunWarnings(), RunWarnings()
    observe(record, "bad")
    resumed.load_state_dict(record.state_dict())
    assert observe(resumed, "bad") == ["bad"], "the first observation was before the checkpoint"
    last = RunWarnings()
    last.load_state_dict(resumed.state_dict())
    assert [observe(last, "bad") for _ in range(3)] == [[], [], []]


def test_the_sentence_stands_in_the_log_and_points_to_the_users_line(tmp_path: Path) -> None:
    logger = Logger(folder=None, output_formats=[HumanOutputFormat(str(tmp_path / "log.txt"))])
    with pytest.warns(TrainingWarning, match="bad") as caught:
        RunWarnings().tell("symptom", "bad", logger)
    logger.close()
    assert "bad" in (tmp_path / "log.txt").read_text()
    assert caught[0].filename == __file__


# -- whole runs -----------------------------------------------------------------------------------------------------


def constant(prompts: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(prompts)


def test_a_run_tells_of_a_constant_reward_once_and_its_checkpoint_remembers(task: Any, tmp_path: Path) -> None:
    task.reward = constant
    agent = REINFORCE(task.policy(), task.envs(16), beta=0.1, seed=0, baseline="none")
    with pytest.warns(TrainingWarning, match="Every completion got the same reward, 1 ") as caught:
        agent.learn(200)
    assert len([w for w in caught if w.category is TrainingWarning]) == 1
    agent.save(tmp_path)
    again = REINFORCE.load(tmp_path, env=task.envs(16), device=task.device)
    assert "constant_reward" in again.run_warnings.told
    again.learn(100, reset_num_timesteps=False)  # warnings are errors here


def test_a_group_algorithm_tells_that_no_prompt_has_spread(task: Any) -> None:
    def by_prompt(prompts: list[str], **columns: Any) -> list[float]:
        return [float(len(prompt)) for prompt in prompts]

    task.reward = by_prompt
    agent = GRPO(task.policy(), task.envs(32), beta=0.0, num_generations=4, seed=0)
    with pytest.warns(TrainingWarning, match="GRPO learns from these differences alone"):
        agent.learn(200)


def test_an_engine_that_samples_something_else_is_found(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-probs that come with the samples are not those of the policy: the first KL and PPO's first pass tell it."""
    policy = task.policy()
    generate = policy.generate_ids

    def wrong(*args: Any, **kwargs: Any) -> Any:
        generation = generate(*args, **kwargs)
        return dataclasses.replace(generation, log_probs=generation.log_probs - 0.5)

    monkeypatch.setattr(policy, "generate_ids", wrong)
    with pytest.warns(TrainingWarning) as caught:
        PPO(policy, task.envs(16), beta=0.1, seed=0).learn(1)
    sentences = [str(w.message) for w in caught]
    assert any("training pass by 0.5 nats per token" in s for s in sentences), sentences


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(task: Any) -> None:
    policy = task.policy()
    agent = REINFORCE(policy, task.envs(8), seed=0, baseline="none")
    before = [p.detach().clone() for p in policy.parameters()]
    with pytest.warns(TrainingWarning, match="is not finite"):
        agent.step([sum(p.sum() for p in policy.parameters()) * float("nan")])
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert agent.logger.name_to_value["train/skipped_steps"] == 1 and agent._n_updates == 0


def test_an_adapter_that_is_not_trained_is_found(task: Any) -> None:
    peft = pytest.importorskip("peft")
    examples = [{"prompt": task.tree.prompt_texts[0], "completion": task.tree.prompt_texts[0]}]

    def trained(*, forgotten: bool) -> list[str]:
        base = task.policy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's own
            model = peft.get_peft_model(base.model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        policy = CausalLMPolicy(model, base.tokenizer, device=task.device)
        agent = SFT(policy, examples, learning_rate=1e-2, n_epochs=12, seed=0)
        if forgotten:  # by an optimiser whose parameters are others
            agent.optimizer.step = lambda: None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            agent.learn()
        return [str(w.message) for w in caught if w.category is TrainingWarning]

    assert trained(forgotten=False) == []
    assert ["the adapter is not trained" in sentence for sentence in trained(forgotten=True)] == [True]


def test_a_reference_that_moves_with_the_policy_is_refused(task: Any) -> None:
    policy = task.policy()
    with pytest.raises(ValueError, match="`reference` must stay as it is"):
        PPO(policy, task.envs(8), reference=policy)


# -- the page -------------------------------------------------------------------------------------------------------


def test_the_page_has_every_symptom() -> None:
    source = Path(diagnostics.__file__).read_text(encoding="utf-8")
    names = set(re.findall(r'(?:Finding|_of_rollout)\(f?"(\w+)', source))
    page = (ROOT / "docs/agents.md").read_text(encoding="utf-8")
    table = page.split("## What a run warns of")[1].split("\n## ")[0]
    assert len(names) > 10
    assert names == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
