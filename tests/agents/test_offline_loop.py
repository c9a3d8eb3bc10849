"""What every offline agent promises of its loop: laws 7 and 8, resuming, callbacks, counting, errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.utils import LinearSchedule

from textgym.agents import DPO, KTO, SFT, CausalLMPolicy, Evaluation
from textgym.agents.common.packing import score_packed
from textgym.exact import TokenTree


def rows_of(tree: TokenTree, kind: str, count: int = 21) -> list[dict[str, Any]]:
    generator, rows = np.random.default_rng(0), []
    for number in range(count):
        prompt = list(tree.prompts[number % tree.num_prompts])
        first, second, third = (list(tree.ids(one)) for one in generator.choice(tree.num_completions, 3, replace=False))
        weight = {"weight": 1.0 + number % 3}
        rows.append(
            {
                "sft": {"prompt_ids": prompt, "completion_ids": first, **weight},
                "dpo": {"prompt_ids": prompt, "chosen_ids": first, "rejected_ids": second, "preference": (number % 5) / 4, **weight},
                "rankings": {"prompt_ids": prompt, "completion_ids": [first, second, third][: 2 + number % 2]},
                "kto": {"prompt_ids": prompt, "completion_ids": first, "label": number % 3 == 0, **weight},
            }[kind]
        )
    return rows


KINDS: dict[str, Any] = {"sft": SFT, "dpo": DPO, "rankings": DPO, "kto": KTO}
everyone = pytest.mark.parametrize("kind", KINDS)


def make(task: Any, kind: str, policy: CausalLMPolicy | None = None, **settings: Any) -> Any:
    options = {"learning_rate": 3e-3, "seed": 1, "n_epochs": 2, "batch_size": 5, **settings}
    return KINDS[kind](policy or task.policy(), rows_of(task.tree, kind), **options)


def parameters(agent: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in agent.trainable_parameters()])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


class Recorder(BaseCallback):
    """Notes every step; stops at one, or saves there."""

    def __init__(self, stop_at: int | None = None, save_at: int | None = None, path: Path | None = None) -> None:
        super().__init__()
        self.stop_at, self.save_at, self.path = stop_at, save_at, path
        self.timesteps: list[int] = []
        self.rows: list[list[int]] = []
        self.rates: list[float] = []

    def _on_rollout_start(self) -> None:
        if len(self.timesteps) == self.save_at:
            self.model.save(self.path)

    def _on_step(self) -> bool:
        self.timesteps.append(self.num_timesteps)
        self.rows.append(self.locals["rows"].tolist())
        self.rates.append(self.model._current_progress_remaining)
        return len(self.timesteps) != self.stop_at


@everyone
def test_two_runs_with_the_same_seed_are_bit_identical_and_they_learn(task, kind: str) -> None:
    first, second = (make(task, kind).learn() for _ in range(2))
    assert torch.equal(parameters(first), parameters(second))
    assert not torch.equal(parameters(first), parameters(make(task, kind, seed=2).learn()))
    untrained = make(task, kind)
    before, after = (agent.evaluate(rows_of(task.tree, kind))["train/loss"] for agent in (untrained, first))
    assert after < before - 0.01


@everyone
def test_a_resumed_run_equals_an_uninterrupted_one(task, kind: str, tmp_path: Path) -> None:
    whole = make(task, kind, learning_rate=LinearSchedule(1e-2, 0.0, 1.0))
    whole.learn(callback=Recorder(save_at=4, path=tmp_path / "agent"))
    resumed = KINDS[kind].load(tmp_path / "agent", rows_of(task.tree, kind), device=task.device)
    assert 0 < resumed.num_timesteps < whole.num_timesteps
    resumed.learn(reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps
    assert torch.equal(parameters(resumed), parameters(whole))
    later = KINDS[kind].load(tmp_path / "agent", device=task.device)  # examples that come later
    later.connect(rows_of(task.tree, kind))
    assert torch.equal(parameters(later.learn(reset_num_timesteps=False)), parameters(whole))


def test_a_checkpoint_knows_its_examples_and_holds_none_of_them(task, tmp_path: Path) -> None:
    agent = make(task, "dpo").learn(20)
    agent.save(tmp_path)
    with pytest.raises(ValueError, match="must be those that the checkpoint was trained on, 21 with"):
        DPO.load(tmp_path, rows_of(task.tree, "dpo", 20))
    loaded = DPO.load(tmp_path, device=task.device)
    with pytest.raises(ValueError, match="no preferences"):
        loaded.learn()
    loaded.save(tmp_path / "again")  # where it stands is not lost
    assert DPO.load(tmp_path / "again", rows_of(task.tree, "dpo"), device=task.device).order.left == agent.order.left
    loaded.connect(rows_of(task.tree, "dpo", 12))
    assert loaded.learn(30).order.num_items == 12
    assert (loaded.beta, loaded.batch_size, loaded.n_epochs) == (0.1, 5, 2)


@everyone
@pytest.mark.parametrize(
    "change", [{"micro_batch_size": 2}, {"micro_batch_size": 1}, {"packing": True}, {"packing": True, "micro_batch_size": 3}]
)
def test_micro_batches_and_packing_change_no_gradient(task, kind: str, change: dict[str, Any]) -> None:
    gradients = []
    for extra in ({}, change):
        policy = task.policy()
        agent = make(
            task, kind, policy, reference=task.policy(seed=3).reference(), optimizer=sgd, max_grad_norm=None, batch_size=11, **extra
        )
        agent.learn(1)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    assert gradients[0].norm() > 1e-3


@everyone
def test_steps_count_completion_tokens_and_go_through_the_examples(task, kind: str) -> None:
    agent, recorder = make(task, kind), Recorder()
    agent.learn(callback=recorder)
    rows = rows_of(task.tree, kind)
    tokens = [
        sum(len(ids) for name, value in row.items() if name not in ("prompt_ids", "label", "weight", "preference") for ids in nested(value))
        for row in rows
    ]
    assert agent.num_timesteps == recorder.timesteps[-1] == 2 * sum(tokens)
    assert recorder.timesteps == np.cumsum([sum(tokens[row] for row in step) for step in recorder.rows]).tolist()
    assert [len(step) for step in recorder.rows] == [5, 4, 4, 4, 4] * 2  # 21 examples in steps of at most 5
    for steps in (recorder.rows[:5], recorder.rows[5:]):
        assert sorted(row for step in steps for row in step) == list(range(21))
    assert recorder.rates[0] == 1.0
    assert 0 < recorder.rates[-1] < 0.15
    assert agent._n_updates == 10


def nested(value: list[Any]) -> list[Any]:
    return value if isinstance(value[0], list) else [value]


def test_training_goes_on_until_its_passes_are_done(task) -> None:
    agent = make(task, "sft").learn(callback=Recorder(stop_at=3))
    assert agent.num_timesteps < agent.examples.num_tokens.sum()
    agent.learn(reset_num_timesteps=False)
    assert agent.num_timesteps >= 2 * agent.examples.num_tokens.sum()
    with pytest.raises(ValueError, match="the 2 passes of `n_epochs` are done"):
        agent.learn(reset_num_timesteps=False)
    assert agent.learn(10, reset_num_timesteps=False).num_timesteps > 2 * agent.examples.num_tokens.sum()


@everyone
def test_a_callback_that_says_false_stops_before_the_update(task, kind: str) -> None:
    agent = make(task, kind)
    before = parameters(agent)
    agent.learn(callback=Recorder(stop_at=1))
    assert torch.equal(parameters(agent), before)
    assert agent._n_updates == 0


def test_stable_baselines3_callbacks_work_or_say_what_to_do(task, tmp_path: Path) -> None:
    agent = make(task, "dpo")
    agent.learn(callback=CheckpointCallback(save_freq=3, save_path=str(tmp_path)), progress_bar=True)
    assert (next(tmp_path.iterdir()) / "agent.json").exists()
    with pytest.raises(ValueError, match=r"has no environment.*evaluation=Evaluation"):
        agent.learn(callback=EvalCallback(task.env()))
    with pytest.raises(ValueError, match="has no environment"):
        agent.set_env(task.envs())


def test_a_linear_schedule_and_the_log(task, tmp_path: Path) -> None:
    agent = make(task, "dpo", learning_rate=LinearSchedule(1e-2, 0.0, 1.0), tensorboard_log=str(tmp_path))
    logged: list[tuple[int, dict[str, float]]] = []

    class Spy(BaseCallback):
        def _on_training_start(self) -> None:
            dump = self.model.logger.dump

            def spy(step: int = 0) -> None:
                logged.append((step, dict(self.model.logger.name_to_value)))
                dump(step)

            self.model.logger.dump = spy

        def _on_step(self) -> bool:
            return True

    agent.learn(callback=Spy(), log_interval=4)
    assert len(logged) == 3  # 10 steps: two rows of four, one of two
    step, last = logged[-1]
    assert step == agent.num_timesteps
    wanted = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"}
    assert {*wanted, "train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "time/fps"} <= set(last)
    assert last["train/epoch"] == pytest.approx(2.0)
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-6)
    assert "DPO" in agent.progress_text({}) or "loss" in agent.progress_text({})
    assert list(tmp_path.rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_evaluation_in_an_environment(task, kind: str, tmp_path: Path) -> None:
    evaluation = Evaluation(task.envs(8), interval=3, episodes=16, best_model_path=tmp_path / "best")
    agent = make(task, kind, evaluation=evaluation).learn()
    assert evaluation.iterations == 10 and evaluation.last is not None
    assert evaluation.last.rewards.shape == (16,)
    assert np.isnan(evaluation.last.kl_mean) == (agent.reference is None)
    assert (tmp_path / "best" / "config.json").exists()


def test_packing_scores_fewer_tokens(task) -> None:
    agent = make(task, "rankings", packing=True)
    batch = agent.examples.select(torch.arange(21), agent.policy.device).completions
    agent.policy.backbone._fast_trunk = None  # transformers' forward: the package's own shares prompts without being packed
    widths = []
    features = agent.policy.backbone.features_and_hidden
    agent.policy.backbone.features_and_hidden = lambda ids, *others: (widths.append(ids.numel()), features(ids, *others))[1]
    score_packed(agent.policy, batch)
    agent.policy.score(batch.prompt_ids, batch.prompt_lengths, batch.completion_ids, batch.lengths)
    assert widths[0] < 0.7 * widths[1]


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("sft", {"n_epochs": 0}, "`n_epochs` must be"),
        ("sft", {"batch_size": 0}, "`batch_size` must be"),
        ("sft", {"max_tokens": 0}, "`max_tokens` must be a whole number"),
        ("sft", {"max_tokens": 1}, "`max_tokens` must be at least 2, the shortest"),
        ("sft", {"loss_reduction": "sum"}, "`loss_reduction` must be one of"),
        ("sft", {"reference": "model"}, "`reference` must be a CausalLMPolicy"),
        ("sft", {"learning_rate": -1.0}, "`learning_rate` must be"),
        ("dpo", {"beta": 0.0}, "`beta` must be a number above 0"),
        ("dpo", {"loss_type": "hinge"}, "`loss_type` must be one of"),
        ("dpo", {"label_smoothing": 0.5}, "`label_smoothing` must be below 0.5"),
        ("dpo", {"label_smoothing": 0.1, "loss_type": "ipo"}, "`label_smoothing` must be 0"),
        ("rankings", {"loss_type": "ipo"}, "rankings of more than two"),
        ("rankings", {"label_smoothing": 0.1}, "rankings of more than two"),
        ("kto", {"batch_size": 1}, "`batch_size` must be"),
        ("kto", {"desirable_weight": -1.0}, "`desirable_weight` must be"),
    ],
)
def test_bad_arguments(task, kind: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(task, kind, **settings)


def test_what_no_offline_agent_can_use(task) -> None:
    with pytest.raises(ValueError, match="must not truncate"):
        make(task, "sft", task.policy(top_k=2))
    with pytest.raises(ValueError, match="`policy` must be a CausalLMPolicy"):
        DPO("gpt2", rows_of(task.tree, "dpo"))
    with pytest.raises(TypeError, match="rollout_size"):
        make(task, "sft", rollout_size=3)
    long = [{"prompt_ids": [0, 1, 2], "completion_ids": [1, 2, 3, 0]}, *rows_of(task.tree, "sft", 2)]
    with pytest.raises(
        ValueError, match=r"row 0 of `examples` has 7 tokens with its prompt, but the model has 6 positions; pass `max_tokens=6`"
    ):
        SFT(task.policy(), long)
    assert len(SFT(task.policy(), long, max_tokens=6).examples) == 2


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for its old name
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_lora_trains_the_adapter_against_the_model_without_it(task, kind: str) -> None:
    peft = pytest.importorskip("peft")
    policy = task.policy()
    base = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=True, fan_in_fan_out=True)
    adapted = CausalLMPolicy(peft.get_peft_model(policy.model, lora), policy.tokenizer, device=task.device)
    agent = make(task, kind, adapted, learning_rate=1e-2)
    before = agent.evaluate(rows_of(task.tree, kind))
    agent.learn()
    after = agent.evaluate(rows_of(task.tree, kind))
    assert after["train/loss"] < before["train/loss"] - 1e-3
    for name, value in adapted.model.base_model.model.named_parameters():
        if "lora" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")])
    if kind == "dpo":
        assert before["rewards/margins"] == pytest.approx(0, abs=1e-6)
        assert abs(after["rewards/margins"]) > 1e-3
