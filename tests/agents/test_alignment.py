"""What is loaded begins in memory where what is made does, so that no number depends on where a file's tensors happened to begin."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from textgym.agents import DPO, DQN, PPO, CausalLMPolicy, RewardEnsemble, RewardModel, RewardModelTrainer, ValueHead, ValueModel
from textgym.alignment import ALIGNMENT, aligned, load_tensors
from textgym.bundled import bundled_model_path
from textgym.feedback import Comparison
from textgym.rewards import BertScoreReward, ClassifierReward

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
PAIRS = [{"prompt": "the film", "chosen": " was good.", "rejected": " was bad."}]


def misalign(folder: Path) -> Path:
    """Pads the header of every safetensors file under a folder, so that its tensors begin at 24 mod 64."""
    for file in folder.rglob("*.safetensors"):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + size].rstrip(b" ")
        json.loads(header)
        header += b" " * ((24 - 8 - len(header)) % ALIGNMENT)
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    return folder


def offsets(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.data_ptr() % ALIGNMENT for tensor in tensors}


def everything(module: torch.nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@pytest.fixture
def bundled() -> CausalLMPolicy:
    return CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu")


@pytest.fixture
def folder(bundled: CausalLMPolicy, tmp_path: Path) -> Path:
    bundled.save_pretrained(tmp_path / "model")
    return misalign(tmp_path / "model")


def test_the_files_of_these_tests_are_mapped_where_they_should_not_be(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert offsets(model.parameters()) - {0}
    places = {name: parameter for name, parameter in model.named_parameters()}
    assert aligned(model) is model and offsets(everything(model)) == {0}
    assert all(parameter is places[name] for name, parameter in model.named_parameters())


def test_what_shares_memory_goes_on_sharing_it() -> None:
    memory = torch.arange(40, dtype=torch.float32)[2:]
    first, second, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    first.weight.data = second.weight.data = memory[:12].view(4, 3)
    other.weight.data = memory[13:25].view(4, 3)
    other.register_buffer("scale", memory[30:33])
    before = [first.weight.clone(), other.weight.clone(), other.scale.clone()]
    module = aligned(torch.nn.ModuleList([first, second, other]))
    assert offsets(everything(module)) == {0}
    assert first.weight.data_ptr() == second.weight.data_ptr() != other.weight.data_ptr()
    assert all(torch.equal(*pair) for pair in zip(before, [first.weight, other.weight, other.scale], strict=True))


def test_a_policy_and_its_reference(folder: Path) -> None:
    policy = CausalLMPolicy.from_pretrained(folder, device="cpu")
    assert offsets(everything(policy)) == offsets(everything(policy.reference())) == {0}
    assert policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight
    own = AutoModelForCausalLM.from_pretrained(folder)
    assert offsets(everything(CausalLMPolicy(own, policy.tokenizer, device="cpu"))) == {0}


def test_an_adapter_and_the_model_under_it(folder: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f"])
    CausalLMPolicy.from_pretrained(folder, device="cpu", lora=config).save_pretrained(tmp_path / "adapter")
    policy = CausalLMPolicy.from_pretrained(misalign(tmp_path / "adapter"), device="cpu")
    assert offsets(everything(policy)) == offsets(everything(policy.reference())) == {0}


def test_a_reward_model_an_ensemble_and_classifiers(bundled: CausalLMPolicy, folder: Path, tmp_path: Path) -> None:
    assert offsets(RewardModel.from_pretrained(folder, device="cpu").parameters()) == {0}
    ensemble = RewardEnsemble([RewardModel.from_policy(bundled, seed=seed) for seed in range(2)])
    ensemble.save_pretrained(tmp_path / "ensemble")
    misalign(tmp_path / "ensemble")
    for member in RewardEnsemble.from_pretrained(tmp_path / "ensemble", device="cpu").models:
        assert offsets(everything(member.model)) == {0}
    reward = ClassifierReward(str(tmp_path / "ensemble" / "member-0"), device="cpu")
    reward(["the film"], [" was good."])
    assert offsets(everything(reward._model)) == {0}
    assert offsets(everything(ValueModel.from_classifier(tmp_path / "ensemble" / "member-0"))) == {0}


def test_an_encoder_of_bert_score(folder: Path) -> None:
    reward = BertScoreReward(str(folder), layer=1, device="cpu")
    reward([" was good."], reference=[" was bad."])
    assert offsets(everything(reward._model)) == {0}


def test_critics(bundled: CausalLMPolicy, tmp_path: Path) -> None:
    ValueModel.from_policy(bundled).save(tmp_path / "critic")
    assert offsets(everything(ValueModel.load(misalign(tmp_path / "critic")))) == {0}
    ValueHead(8, 16).save(tmp_path / "head.safetensors")
    misalign(tmp_path)
    assert offsets(everything(ValueHead.load(tmp_path / "head.safetensors"))) == {0}
    assert offsets(load_tensors(tmp_path / "head.safetensors").values()) == {0}


@pytest.mark.parametrize("kind", ["ppo", "dpo", "dqn", "reward"])
def test_agents(task, bundled: CausalLMPolicy, kind: str, tmp_path: Path) -> None:
    """Models, reference, critic and optimiser, from a checkpoint whose files begin badly."""
    if kind == "ppo":
        agent = PPO(task.policy(), task.envs(8), critic="separate", seed=0).learn(1)
    elif kind == "dqn":
        agent = DQN(task.policy(), task.envs(8), beta=0.5, seed=0, learning_starts=1).learn(100)
    elif kind == "dpo":
        agent = DPO(bundled, PAIRS, seed=0).learn()
    else:
        agent = RewardModelTrainer(RewardModel.from_policy(bundled), [Comparison("the film", " was good.", " was bad.")], seed=0).learn()
    agent.save(tmp_path / "agent")
    loaded = type(agent).load(misalign(tmp_path / "agent"), device="cpu")
    found = list(loaded.trainable_parameters())
    found += [value for state in loaded.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    if loaded.reference is not None:
        found += everything(loaded.reference)
    assert len(loaded.optimizer.state) > 3 and offsets(found) == {0}
