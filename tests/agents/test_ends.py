"""Policy, environment and checkpoint end completions with the same tokens, those of the model where nobody names others."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import textgym  # noqa: F401  (registers the ids)
from textgym.agents import DPO, GRPO, SFT, CausalLMPolicy, Evaluation


def nothing(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def environment(task: Any, **settings: Any) -> gym.vector.VectorEnv:
    return gym.make_vec("TextGen-v0", num_envs=8, **(task.arguments() | {"reward": nothing} | settings))


@pytest.fixture
def policy(task) -> CausalLMPolicy:
    """A model whose generation configuration names the tokenizer's end and one more token, as those of chat models do."""
    made = task.policy()
    made.model.generation_config = GenerationConfig(eos_token_id=[task.tree.eos_token_id, 3])
    return CausalLMPolicy(made.model, made.tokenizer, device=task.device)


def test_generation_ends_where_that_of_transformers_does(task, policy) -> None:
    assert policy.eos_token_ids == (task.tree.eos_token_id, 3)
    prompt = list(task.tree.prompts[0])
    found = policy.generate([prompt], task.tree.horizon, temperature=0)
    ids = torch.tensor([prompt], device=task.device)
    options = {"max_new_tokens": task.tree.horizon, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert found.completion_ids[0] == policy.model.generate(ids, **options)[0, len(prompt) :].tolist()
    many = policy.generate([prompt], task.tree.horizon, num_generations=200, seed=0)
    for ids, reason in zip(many.completion_ids, many.finish_reasons, strict=True):
        assert not set(ids[:-1]) & set(policy.eos_token_ids)
        assert reason == ("eos" if ids[-1] in policy.eos_token_ids else "length")
    assert any(ids[-1] == 3 for ids in many.completion_ids)


def test_an_environment_with_other_ends_is_refused(task, policy) -> None:
    ends = tuple(policy.eos_token_ids)
    message = r"`env` ends its episodes with the tokens \(4,\), `policy` its completions with \(4, 3\).*eos_token_ids=policy.eos_token_ids"
    with pytest.raises(ValueError, match=message):
        GRPO(policy, environment(task), num_generations=2)
    agent = GRPO(policy, environment(task, eos_token_ids=ends), num_generations=2, seed=0)
    assert set(agent.collector.eos_token_ids) == set(ends)
    with pytest.raises(ValueError, match=message):
        agent.set_env(environment(task))
    with pytest.raises(ValueError, match="`env` ends its episodes"):
        GRPO(task.policy(), environment(task, eos_token_ids=ends), num_generations=2)
    evaluation = Evaluation(environment(task, eos_token_ids=ends))
    with pytest.raises(ValueError, match="`evaluation` ends its episodes"):
        GRPO(task.policy(), environment(task), num_generations=2, evaluation=evaluation)


def test_saved_models_end_there_for_everybody(task, tmp_path: Path) -> None:
    plain = task.policy()
    policy = CausalLMPolicy(plain.model, plain.tokenizer, device=task.device, eos_token_ids=[task.tree.eos_token_id, 2])
    policy.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [task.tree.eos_token_id, 2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [task.tree.eos_token_id, 2]
    loaded = CausalLMPolicy.from_pretrained(tmp_path, device=task.device)
    assert loaded.eos_token_ids == policy.eos_token_ids
    GRPO(loaded, environment(task, tokenizer=loaded.tokenizer), num_generations=2, seed=0).learn(1)
    assert policy.model.generation_config.eos_token_id == plain.model.generation_config.eos_token_id == task.tree.eos_token_id


def rows(task: Any) -> list[dict[str, Any]]:
    return [{"prompt_ids": list(task.tree.prompts[0]), "completion_ids": list(task.tree.ids(place))} for place in range(4)]


@pytest.mark.parametrize(
    "settings",
    [{"eos_token_ids": [4, 3]}, {"eos_token_ids": [3]}, {"temperature": 0.7, "decode_batch_size": 3}, {"autocast": "bfloat16"}],
    ids=["more ends", "another end", "sampling", "products"],
)
def test_a_checkpoint_keeps_the_settings_of_its_policy(task, settings: dict[str, Any], tmp_path: Path) -> None:
    policy = task.policy(**settings)
    SFT(policy, rows(task), seed=0, n_epochs=2).learn(8).save(tmp_path)
    found = SFT.load(tmp_path, rows(task), device=task.device).policy
    assert found.loading_arguments() == policy.loading_arguments()
    assert (found.eos_token_ids, found.sampling) == (policy.eos_token_ids, policy.sampling)
    assert found.decode_batch_size == policy.decode_batch_size
    assert (found.backbone.dtype, found.backbone.autocast) == (policy.backbone.dtype, policy.backbone.autocast)


def test_a_tokenizer_without_an_end_of_its_own(task, tmp_path: Path) -> None:
    plain = task.policy()
    plain.tokenizer.eos_token = None
    plain.model.generation_config.eos_token_id = plain.model.config.eos_token_id = None
    with pytest.raises(ValueError, match="`eos_token_ids` must name at least one token"):
        CausalLMPolicy(plain.model, plain.tokenizer, device=task.device)
    policy = CausalLMPolicy(plain.model, plain.tokenizer, device=task.device, eos_token_ids=[2])
    SFT(policy, rows(task), seed=0).learn().save(tmp_path)
    assert SFT.load(tmp_path, rows(task), device=task.device).policy.eos_token_ids == (2,)
    assert CausalLMPolicy.from_pretrained(tmp_path / "model", device=task.device).eos_token_ids == (2,)


def test_a_reference_that_was_given_keeps_its_own_settings(task, tmp_path: Path) -> None:
    pairs = [{"prompt_ids": list(task.tree.prompts[0]), "chosen_ids": list(task.tree.ids(0)), "rejected_ids": list(task.tree.ids(1))}]
    reference = CausalLMPolicy(task.policy(seed=1).model.to(torch.bfloat16), task.tree.tokenizer(), device=task.device).reference()
    DPO(task.policy(), pairs, reference=reference, seed=0).learn().save(tmp_path)
    loaded = DPO.load(tmp_path, pairs, device=task.device)
    assert (loaded.reference.backbone.dtype, loaded.policy.backbone.dtype) == (torch.bfloat16, torch.float32)


def test_checkpoints_from_before_load(task, tmp_path: Path) -> None:
    """They name neither ends nor dtypes: those are the model's, and what its files hold."""
    policy = CausalLMPolicy(task.policy().model.to(torch.bfloat16), task.tree.tokenizer(), device=task.device)
    with pytest.warns(UserWarning, match="one step of the learning rate"):
        SFT(policy, rows(task), seed=0).learn().save(tmp_path)
    document = json.loads((tmp_path / "agent.json").read_text())
    document["state"]["model"] = {name: document["state"]["model"][name] for name in ("temperature", "top_k", "top_p", "min_p")}
    del document["reference_model"]
    (tmp_path / "agent.json").write_text(json.dumps(document))
    with pytest.warns(UserWarning, match="one step of the learning rate"):
        found = SFT.load(tmp_path, rows(task), device=task.device).policy
    assert (found.backbone.dtype, found.backbone.autocast, found.eos_token_ids) == (torch.bfloat16, None, policy.eos_token_ids)


def test_what_differs_in_other_examples_is_said(task, tmp_path: Path) -> None:
    examples = rows(task)
    SFT(task.policy(), examples, seed=0).learn(4).save(tmp_path)
    tokens = sum(len(row["completion_ids"]) for row in examples)
    longer = [*examples[:3], {**examples[3], "completion_ids": [1, *examples[3]["completion_ids"]]}]
    for others, what in (
        (examples[:3], f"4 with {tokens} tokens, got 3 with"),
        (longer, f"4 with {tokens} tokens, got as many with {tokens + 1} tokens: other texts, or another setting"),
        ([*examples[1:], examples[0]], "got as many with as many tokens, but their contents, weights or order are others"),
    ):
        with pytest.raises(ValueError, match=rf"must be those that the checkpoint was trained on, .*{what}.*load without and"):
            SFT.load(tmp_path, others, device=task.device)
