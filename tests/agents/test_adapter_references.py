"""π_ref of a policy with an adapter is the policy as training starts, whatever is trained, and stays there; checkpoints bring it back."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from textgym.agents import DPO, GRPO, PPO, CausalLMPolicy, RewardModel, ValueModel
from textgym.agents.common.adapters import OUTSIDE_FILE, adds_nothing
from textgym.agents.policy import CausalLMPolicy as Policy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft asks for its old name
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:Besides the adapter .*ln_f:UserWarning"),
]
KINDS = {
    "fresh": {},
    "trained": {"init_lora_weights": False},
    "dora": {"use_dora": True},
    "rows of the embedding": {"target_modules": ["wte"], "fan_in_fan_out": False, "bias": "none"},
    "biases": {"bias": "all"},
    "a module": {"modules_to_save": ["ln_f"]},
    "tokens": {"trainable_token_indices": [2, 3]},
    "a norm besides": {},
    "ia3": None,
}


@pytest.fixture
def base(task, tmp_path: Path) -> Path:
    task.policy().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, kind: str, device: str, **settings: Any) -> Policy:
    shared = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "fan_in_fan_out": True}
    options = KINDS[kind]
    if options is None:
        config: Any = peft.IA3Config(**shared, feedforward_modules=[])
    else:
        config = peft.LoraConfig(**{**shared, "r": 2, **options})
    policy = CausalLMPolicy.from_pretrained(base, device=device, lora=config, **settings)
    if kind == "a norm besides":
        policy.backbone._trunk.ln_f.requires_grad_(True)
    return policy


def pairs(tree: Any) -> list[dict[str, Any]]:
    ids = [list(tree.ids(place)) for place in range(6)]
    prompts = [list(tree.prompts[place % tree.num_prompts]) for place in range(3)]
    return [{"prompt_ids": p, "chosen_ids": a, "rejected_ids": b} for p, a, b in zip(prompts, ids[:3], ids[3:], strict=True)]


def weights(agent: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in agent.policy.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_start_and_stays_there_and_a_resumed_run_has_it(task, base: Path, kind: str, tmp_path: Path) -> None:
    policy, rows = adapted(base, kind, task.device), pairs(task.tree)
    generated = policy.generate(task.tree.prompt_texts, task.tree.horizon, num_generations=4, seed=0)
    sample = generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths
    agent = DPO(policy, rows, learning_rate=1e-2, n_epochs=8, seed=0)
    assert agent.evaluate(rows)["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    before = agent.reference.score(*sample).log_probs
    torch.testing.assert_close(before, policy.score(*sample).log_probs.detach(), atol=1e-6, rtol=0)
    agent.learn(12)
    assert torch.equal(agent.reference.score(*sample).log_probs, before)
    assert (policy.score(*sample).log_probs - before).abs().max() > 1e-4
    assert agent.reference.generate(task.tree.prompt_texts, task.tree.horizon, num_generations=4, seed=0).ids.equal(generated.ids)
    agent.save(tmp_path / "agent")
    loaded = DPO.load(tmp_path / "agent", rows, device=task.device)
    assert torch.equal(loaded.reference.score(*sample).log_probs, before)
    for one in (agent, loaded):
        one.learn(12, reset_num_timesteps=False)
    assert torch.equal(weights(loaded), weights(agent))
    # What users get holds one adapter, the trained one.
    with safe_open(tmp_path / "agent" / "model" / "adapter_model.safetensors", framework="pt") as file:
        assert not any("reference" in name or "frozen" in name for name in file.keys())  # noqa: SIM118  (not a dict)
    assert (tmp_path / "agent" / "model" / OUTSIDE_FILE).exists() == (kind == "a norm besides")
    assert (tmp_path / "agent" / "reference").exists() == (kind not in ("fresh", "rows of the embedding"))


@pytest.mark.parametrize("agent_class", [PPO, GRPO])
def test_the_divergence_of_the_first_rollout_is_zero(task, base: Path, agent_class: Any) -> None:
    policy = adapted(base, "trained", task.device)
    agent = agent_class(policy, task.envs(8), seed=0, num_generations=2, learning_rate=1e-2)
    rollouts: list[float] = []
    agent.train = lambda rollout: rollouts.append(float(rollout.kl_per_sequence.abs().max()))
    agent.learn(1)
    assert rollouts[0] < 1e-5


def test_the_model_under_an_adapter_can_still_be_the_reference(task, base: Path, tmp_path: Path) -> None:
    policy, rows = adapted(base, "trained", task.device), pairs(task.tree)
    bare = CausalLMPolicy.from_pretrained(base, device=task.device)
    agent = DPO(policy, rows, reference=policy.reference(adapter=False), learning_rate=1e-2, seed=0).learn()
    expected = DPO(bare, rows).evaluate(rows)["logps/chosen"]
    assert DPO(agent.reference, rows, reference=bare).evaluate(rows)["logps/chosen"] == pytest.approx(expected, abs=1e-5)
    agent.save(tmp_path / "agent")
    assert DPO.load(tmp_path / "agent", device=task.device).reference.backbone.without_adapter
    with pytest.raises(ValueError, match="`adapter` must be True for a policy without an adapter"):
        bare.reference(adapter=False)


def test_references_that_training_would_move_are_refused(task, base: Path) -> None:
    policy, rows = adapted(base, "fresh", task.device), pairs(task.tree)
    reference = policy.reference()
    policy.backbone._trunk.ln_f.requires_grad_(True)
    with pytest.raises(ValueError, match=r"`reference` must stay as it is, but shares .*ln_f.weight.*Make it with `policy.reference\(\)`"):
        DPO(policy, rows, reference=reference)
    plain = task.policy()
    with pytest.raises(ValueError, match="`reference` must stay as it is"):
        DPO(plain, rows, reference=CausalLMPolicy(plain.model, plain.tokenizer, device=task.device))


def test_a_reference_whose_adapter_was_merged_meanwhile_says_so(task, base: Path) -> None:
    policy, rows = adapted(base, "trained", task.device), pairs(task.tree)
    agent = DPO(policy, rows, seed=0)
    before = agent.evaluate(rows)
    policy.model.merge_adapter()
    agent.examples = None
    with pytest.raises(ValueError, match="The adapter was merged into its model, or taken out of it, after this reference was made"):
        agent.evaluate(rows)
    policy.model.unmerge_adapter()
    assert agent.evaluate(rows)["train/loss"] == pytest.approx(before["train/loss"], abs=1e-5)


def test_what_is_made_from_a_reference_has_its_weights(task, base: Path) -> None:
    policy = adapted(base, "trained", task.device)
    reference = policy.reference()
    generated = policy.generate(task.tree.prompt_texts[:1], task.tree.horizon, num_generations=4, seed=0)
    sample = generated.prompt_ids.expand(4, -1), generated.prompt_lengths.expand(4), generated.ids, generated.lengths

    def scores(source: CausalLMPolicy) -> torch.Tensor:
        with torch.no_grad():
            return RewardModel.from_policy(source).score_tokens(*sample)

    before = scores(reference)
    trunk = [p.clone() for p in ValueModel.from_policy(reference).parameters()]
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    assert torch.equal(scores(reference), before) and not torch.allclose(scores(policy), before)
    assert all(torch.equal(*both) for both in zip(trunk, ValueModel.from_policy(reference).parameters(), strict=True))


def test_what_peft_does_not_save_is_said_and_saved(task, base: Path, tmp_path: Path) -> None:
    policy = adapted(base, "a norm besides", task.device)
    with torch.no_grad():
        policy.backbone._trunk.ln_f.bias.add_(0.5)
    with pytest.warns(UserWarning, match="Besides the adapter .*ln_f.* are trained, which peft does not save"):
        policy.save_pretrained(tmp_path / "adapter")
    loaded = CausalLMPolicy.from_pretrained(tmp_path / "adapter", device=task.device)
    assert torch.equal(loaded.backbone._trunk.ln_f.bias, policy.backbone._trunk.ln_f.bias)
    assert loaded.backbone._trunk.ln_f.bias.requires_grad and not loaded.backbone._trunk.wte.weight.requires_grad
    policy.backbone._trunk.ln_f.requires_grad_(False)
    policy.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / OUTSIDE_FILE).exists()


def test_when_an_adapter_adds_nothing(task, base: Path) -> None:
    nothing = {kind: adds_nothing(adapted(base, kind, task.device).model) for kind in KINDS}
    assert nothing == {kind: kind in ("fresh", "rows of the embedding") for kind in KINDS}


@pytest.mark.parametrize("active", [["mine"], ["second"], ["mine", "second"], ["default"]])
def test_adapters_of_other_names_and_several_of_them(task, base: Path, active: list[str], tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    first = "default" if active == ["default"] else "mine"
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter_name=first)
    if active != ["mine"]:
        model.add_adapter("second", config)
    model.base_model.set_adapter(active)
    policy, rows = CausalLMPolicy(model, task.tree.tokenizer(), device=task.device), pairs(task.tree)
    agent = DPO(policy, rows, learning_rate=1e-2, n_epochs=8, seed=0)
    assert agent.evaluate(rows)["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    agent.learn(12).save(tmp_path / "agent")
    loaded = DPO.load(tmp_path / "agent", rows, device=task.device)
    found, trained = ({name for name, p in one.policy.model.named_parameters() if p.requires_grad} for one in (loaded, agent))
    assert found == trained and any(f".{active[-1]}." in name for name in trained)
    for one in (agent, loaded):
        one.learn(12, reset_num_timesteps=False)
    assert torch.equal(weights(loaded), weights(agent))
    assert loaded.evaluate(rows) == agent.evaluate(rows)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # of peft, which takes any norm
def test_an_adapter_on_the_norms_is_run_by_transformers(tiny_model, tokenizer) -> None:
    """LN tuning puts modules of its own in the places of norms, which the package's own layers do not know."""
    model = peft.get_peft_model(tiny_model("llama", len(tokenizer)), peft.LNTuningConfig(task_type="CAUSAL_LM"))
    policy = CausalLMPolicy(model, tokenizer, device="cpu")
    assert policy.backbone.fast_trunk is None
    generation = policy.generate(["abc", "a longer prompt"], 6, seed=0)
    scored = policy.score(generation.prompt_ids, generation.prompt_lengths, generation.ids, generation.lengths)
    torch.testing.assert_close(scored.log_probs, generation.log_probs, atol=1e-4, rtol=0)
