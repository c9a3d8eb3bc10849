"""In which dtype weights are trained: no step of the learning rate rounds away unless it was asked for, and then a warning says so."""

import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from textgym.agents import DPO, KTO, PPO, SFT, CausalLMPolicy, RewardModel, RewardModelTrainer, ValueModel
from textgym.agents.common import precision
from textgym.agents.common.devices import as_device, has_bfloat16_units
from textgym.bundled import bundled_model_path
from textgym.feedback import Comparison

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks for its old name
PAIRS = [
    {"prompt": "the film", "chosen": " was good.", "rejected": " was bad."},
    {"prompt": "i", "chosen": " saw it.", "rejected": " sat."},
]
EXAMPLES = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
JUDGED = [{**row, "label": number == 0} for number, row in enumerate(EXAMPLES)]
ROUNDING = r"`{}` has bfloat16 weights, of which one step of the learning rate 1e-0. can move [0-9.]+ %: .*`dtype=.float32., autocast="


@pytest.fixture
def half(tmp_path: Path) -> Path:
    policy = CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu")
    policy.model.to(torch.bfloat16)
    policy.save_pretrained(tmp_path / "half")
    return tmp_path / "half"


@pytest.fixture(params=[True, False], ids=["with units", "without units"])
def units(request, monkeypatch) -> bool:
    monkeypatch.setattr(precision, "has_bfloat16_units", lambda device: request.param)
    return request.param


def load(folder: Path, **settings: Any) -> CausalLMPolicy:
    return CausalLMPolicy.from_pretrained(folder, device="cpu", **settings)


def share(agent: Any) -> tuple[float, CausalLMPolicy]:
    """The share of the weights that training changes."""
    before = [parameter.detach().clone() for parameter in agent.policy.parameters()]
    policy = agent.learn().policy
    changed = sum(int((a != b).sum()) for a, b in zip(before, policy.parameters(), strict=True))
    return changed / sum(parameter.numel() for parameter in before), policy


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_a_half_precision_checkpoint_is_trained_as_a_float32_one(half: Path, kind: str, units: bool) -> None:
    make, rows = {"sft": (SFT, EXAMPLES), "dpo": (DPO, PAIRS), "kto": (KTO, JUDGED)}[kind]
    found, policy = share(make(load(half), rows, n_epochs=20, seed=0))
    expected, wide = share(make(load(half, dtype="float32"), rows, n_epochs=20, seed=0))
    assert policy.backbone.dtype == torch.float32 and policy.backbone.autocast == (torch.bfloat16 if units else None)
    assert expected > 0.1 and found == pytest.approx(expected, abs=0.05)
    if not units:
        assert all(torch.equal(*pair) for pair in zip(policy.parameters(), wide.parameters(), strict=True))


def test_what_was_done_is_said_once(half: Path, caplog, units: bool) -> None:
    with caplog.at_level(logging.WARNING):
        load(half)
        load(half)
        load(half, dtype="float32")
    assert len(caplog.messages) == 1
    assert "stored in bfloat16; its weights are loaded as float32" in caplog.text
    assert ("products are bfloat16 (`autocast`)" if units else "products are float32 too") in caplog.text


def test_dtypes_that_are_asked_for(half: Path, units: bool) -> None:
    for given, dtype, autocast in (
        ({"dtype": "checkpoint"}, torch.bfloat16, None),
        ({"dtype": "bfloat16"}, torch.bfloat16, None),
        ({"dtype": torch.float32, "autocast": "bfloat16"}, torch.float32, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32, None),
        ({"autocast": None}, torch.float32, None),
        ({"autocast": "float16"}, torch.float32, torch.float16),
    ):
        policy = load(half, **given)
        assert (policy.backbone.dtype, policy.backbone.autocast) == (dtype, autocast), given
    whole = load(Path(bundled_model_path()))
    assert (whole.backbone.dtype, whole.backbone.autocast) == (torch.float32, None)
    for dtype in ("int8", "half-baked", torch.int64, 16):
        with pytest.raises(ValueError, match="`dtype` must be 'auto', 'checkpoint' or a floating dtype"):
            load(half, dtype=dtype)


def test_float16_is_widened_too_and_its_products_are_not_float16(half: Path, units: bool, tmp_path: Path) -> None:
    load(half).model.to(torch.float16).save_pretrained(half)
    policy = load(half)
    assert (policy.backbone.dtype, policy.backbone.autocast) == (torch.float32, None)


def test_a_checkpoint_that_does_not_say_its_dtype(half: Path, units: bool) -> None:
    config = json.loads((half / "config.json").read_text())
    del config["dtype"]
    (half / "config.json").write_text(json.dumps(config))
    assert load(half).backbone.dtype == torch.float32
    assert load(half, dtype="checkpoint").backbone.dtype == torch.bfloat16


def test_under_an_adapter_frozen_weights_stay_as_they_are(half: Path, units: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    policy = load(half, lora=config)
    assert policy.backbone.dtype == torch.bfloat16 and policy.backbone.autocast is None
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    before = [parameter.detach().clone() for parameter in trained]
    agent = DPO(policy, PAIRS, learning_rate=1e-3, n_epochs=20, seed=0).learn()  # no warning: what is trained is float32
    changed = sum(int((a != b).sum()) for a, b in zip(before, trained, strict=True)) / sum(p.numel() for p in before)
    assert changed > 0.9
    agent.save(tmp_path / "agent")
    assert DPO.load(tmp_path / "agent", PAIRS, device="cpu").policy.backbone.dtype == torch.bfloat16


def test_every_learner_warns_of_steps_that_round_away(task, half: Path) -> None:
    def policy() -> CausalLMPolicy:
        return load(half, dtype="bfloat16")

    comparisons = [Comparison("the film", " was good.", " was bad.")]
    learners = {
        "sft": lambda: SFT(policy(), EXAMPLES),
        "dpo": lambda: DPO(policy(), PAIRS),
        "kto": lambda: KTO(policy(), JUDGED),
        "ppo": lambda: PPO(CausalLMPolicy(task.policy().model.to(torch.bfloat16), task.tree.tokenizer(), device="cpu"), task.envs(4)),
        "reward model": lambda: RewardModelTrainer(RewardModel.from_pretrained(half, device="cpu", dtype="bfloat16"), comparisons),
    }
    for name, make in learners.items():
        with pytest.warns(UserWarning, match=ROUNDING.format("reward_model" if name == "reward model" else "policy")) as caught:
            make()
        assert len([one for one in caught if "round" in str(one.message)]) == 1, name


def test_the_share_that_a_step_can_move() -> None:
    weights = torch.tensor([0.0, 1e-6, 1e-4, 0.02, 1.0], dtype=torch.bfloat16)
    for rate, moved in ((1e-7, 2), (1e-6, 3), (1e-4, 4), (0.01, 5)):
        by_hand = sum(
            any(float(torch.tensor(float(w) + sign * rate, dtype=torch.bfloat16)) != float(w) for sign in (1, -1)) for w in weights
        )
        assert by_hand == moved
        with pytest.warns(UserWarning, match=rf"can move {100 * moved / 5:.1f} %"):
            precision.warn_of_rounding("policy", [weights], [rate / 2, rate, 0.0])
    precision.warn_of_rounding("policy", [weights], [0.0])
    precision.warn_of_rounding("policy", [weights.float()], [1e-6])


def test_reward_models_and_critics(half: Path, units: bool, tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(half, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "reward")
    assert RewardModel.from_pretrained(tmp_path / "reward", device="cpu").model.dtype == torch.float32
    assert RewardModel.from_pretrained(tmp_path / "reward", device="cpu", dtype="checkpoint").model.dtype == torch.bfloat16
    assert RewardModel.from_pretrained(tmp_path / "reward", device="cpu", **model.loading_arguments()).model.dtype == torch.bfloat16
    assert model.copy().model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in ValueModel.from_classifier(tmp_path / "reward").parameters()} == {torch.float32}


# --- devices


def test_devices() -> None:
    assert as_device("cpu") == as_device(torch.device("cpu")) == torch.device("cpu")
    assert as_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not has_bfloat16_units(torch.device("meta"))
    for wrong in ("gpu", "cpux", "", None):
        with pytest.raises(ValueError, match="`device` must be a device that can be used here, got"):
            as_device(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error(task) -> None:
    folder = bundled_model_path()
    policy = load(Path(folder))
    for attempt in (
        lambda: CausalLMPolicy.from_pretrained(folder, device="cuda"),
        lambda: CausalLMPolicy(policy.model, policy.tokenizer, device="cuda"),
        lambda: RewardModel.from_pretrained(folder, device="cuda"),
        lambda: SFT(policy, EXAMPLES, device="cuda"),
        lambda: PPO(task.policy(), task.envs(4), device="cuda:3"),
    ):
        with pytest.raises(ValueError, match="`device` must be a device that can be used here, got 'cuda"):
            attempt()


# --- adapters whose model is gone


@pytest.mark.parametrize("base", ["./gone/model", None, "nobody/no-such-model"])
def test_an_adapter_whose_model_is_missing(half: Path, base: str | None, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    load(half, lora=config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    with pytest.raises(ValueError, match=r"`path`: .*(holds an adapter of .*Put that model|belongs to the model 'nobody/no-such)"):
        load(tmp_path / "adapter")
