"""What every on-policy agent promises of its loop: laws 2, 4, 5, 7, 8, callbacks, environments of every kind."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from textgym.agents import PPO, REINFORCE
from textgym.agents.common.evaluation import Evaluation, evaluate_policy
from textgym.agents.common.rollout_scores import score_rollout
from textgym.kl import AdaptiveKLController
from textgym.wrappers.vector import KLShaping

AGENTS: dict[str, Any] = {
    "ppo": lambda policy, env, **k: PPO(policy, env, **{"learning_rate": 1e-3, "seed": 1, **k}),
    "ppo-separate": lambda policy, env, **k: PPO(policy, env, **{"learning_rate": 1e-3, "seed": 1, "critic": "separate", **k}),
    "reinforce": lambda policy, env, **k: REINFORCE(policy, env, **{"learning_rate": 1e-3, "seed": 1, **k}),
    "reinforce-value": lambda policy, env, **k: REINFORCE(policy, env, **{"learning_rate": 1e-3, "seed": 1, "baseline": "value", **k}),
    "reinforce-average": lambda policy, env, **k: REINFORCE(
        policy, env, **{"learning_rate": 1e-3, "seed": 1, "baseline": "moving_average", **k}
    ),
}
everyone = pytest.mark.parametrize("make", AGENTS.values(), ids=AGENTS)


def parameters(agent: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in agent.trainable_parameters()])


class Recorder(BaseCallback):
    """Notes every environment step."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.steps, self.timesteps, self.rollouts, self.stop_at = 0, [], 0, stop_at

    def _on_step(self) -> bool:
        self.steps += 1
        self.timesteps.append(self.num_timesteps)
        return self.stop_at is None or self.steps < self.stop_at

    def _on_rollout_end(self) -> None:
        self.rollouts += 1


@everyone
def test_two_runs_with_the_same_seed_are_bit_identical(task, make) -> None:
    first, second = (make(task.policy(), task.envs()).learn(600) for _ in range(2))
    assert torch.equal(parameters(first), parameters(second))
    assert not torch.equal(parameters(first), parameters(make(task.policy(), task.envs(), seed=2).learn(600)))


@everyone
def test_a_resumed_run_equals_an_uninterrupted_one(task, make, tmp_path: Path) -> None:
    schedule = LinearSchedule(1e-3, 0.0, 1.0)
    settings = {"learning_rate": schedule, "beta": AdaptiveKLController(0.1, target=0.5, horizon=1000), "batch_size": 8}
    whole = make(task.policy(), task.envs(), **settings)
    half_way = Recorder(stop_at=None)

    class SaveAfterThreeRollouts(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if half_way.rollouts == 3:
                self.model.save(tmp_path / "agent")

    whole.learn(800, callback=[half_way, SaveAfterThreeRollouts()])
    resumed = type(whole).load(tmp_path / "agent", env=task.envs(), device=task.device)
    assert resumed.num_timesteps < 800
    resumed.learn(800 - resumed.num_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps
    assert torch.equal(parameters(resumed), parameters(whole))
    assert resumed.kl_shaping[0].beta == whole.kl_shaping[0].beta != 0.1


def test_a_checkpoint_holds_nothing_pickled_and_transformers_reads_it(task, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    agent = PPO(task.policy(), task.envs(), learning_rate=1e-3, seed=0).learn(200)
    (tmp_path / "notes.txt").write_text("mine")
    agent.save(tmp_path)
    agent.save(tmp_path)
    suffixes = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".jinja"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[0, 1, 2]])
    assert torch.equal(model(ids).logits, agent.policy.model.cpu()(ids).logits)


def test_loading_says_what_is_wrong(task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint"):
        PPO.load(tmp_path)
    PPO(task.policy(), task.envs(), learning_rate=lambda progress: 1e-3).save(tmp_path)
    with pytest.raises(ValueError, match="checkpoint of PPO"):
        REINFORCE.load(tmp_path)
    with pytest.raises(ValueError, match="learning_rate"):
        PPO.load(tmp_path)
    loaded = PPO.load(tmp_path, learning_rate=1e-3, device=task.device)
    with pytest.raises(ValueError, match="no environment"):
        loaded.learn(10)
    loaded.set_env(task.envs())
    loaded.learn(10)


@everyone
def test_before_the_first_step_ratio_is_one_and_kl_is_zero(task, make) -> None:
    agent = make(task.policy(temperature=0.7, top_k=4), task.envs(), learning_rate=0.0)
    rollouts = []

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            rollouts.append(self.locals["rollout"])

    agent.learn(1, callback=Keep())
    (rollout,) = rollouts
    log_probs = score_rollout(agent.policy, rollout).log_probs
    torch.testing.assert_close(log_probs, rollout.log_probs, atol=1e-4, rtol=0)
    assert rollout.kl_per_sequence.abs().max() < 1e-4
    assert rollout.rewards.sum(1).allclose(rollout.unshaped_returns, atol=1e-4)


@everyone
def test_kl_of_the_wrapper_is_the_agents(task, make) -> None:
    agent = make(task.policy(), task.envs(), learning_rate=1e-2)
    kept = []

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            rollout = self.locals["rollout"]
            with torch.no_grad():
                mine = (score_rollout(agent.policy, rollout).log_probs - score_rollout(agent.reference, rollout).log_probs).sum(1)
            kept.append((mine, rollout))

    agent.learn(400, callback=Keep())
    mine, rollout = kept[-1]
    assert rollout.kl_per_sequence.abs().max() > 0.01
    torch.testing.assert_close(mine, rollout.kl_per_sequence, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rollout.returns, rollout.unshaped_returns - 0.05 * mine, atol=1e-4, rtol=1e-4)


@everyone
@pytest.mark.parametrize("change", [{"micro_batch_size": 5}, {"micro_batch_size": 1}])
def test_micro_batches_change_no_gradient(task, make, change: dict[str, int]) -> None:
    plain, split = (make(task.policy(), task.envs(), optimizer=sgd, max_grad_norm=None, **extra).learn(1) for extra in ({}, change))
    torch.testing.assert_close(parameters(split), parameters(plain), atol=1e-6, rtol=1e-5)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def test_callbacks_run_once_per_environment_step_and_count_real_tokens(task) -> None:
    agent = PPO(task.policy(), task.envs(), learning_rate=1e-3, seed=0)
    recorder = Recorder()
    agent.learn(300, callback=recorder)
    assert recorder.steps == recorder.rollouts * task.tree.horizon
    assert recorder.timesteps == sorted(recorder.timesteps)
    assert recorder.timesteps[-1] == agent.num_timesteps < recorder.rollouts * 32 * task.tree.horizon


def test_a_callback_that_says_false_stops_before_the_update(task) -> None:
    agent = PPO(task.policy(), task.envs(), learning_rate=1e-2, seed=0)
    before = parameters(agent)
    agent.learn(10_000, callback=Recorder(stop_at=2))
    assert torch.equal(parameters(agent), before)
    assert agent.num_timesteps <= 64


def test_stable_baselines3_callbacks_work(task, tmp_path: Path) -> None:
    agent = PPO(task.policy(), task.envs(), learning_rate=1e-3, seed=0)
    agent.learn(200, callback=CheckpointCallback(save_freq=3, save_path=str(tmp_path)), progress_bar=True)
    assert (next(tmp_path.iterdir()) / "agent.json").exists()


def test_predict_and_get_parameters_are_those_of_stable_baselines3(task) -> None:
    agent = PPO(task.policy(), task.envs(), learning_rate=1e-3, seed=0)
    view = agent.get_env()
    assert view is not None
    actions, _ = agent.predict(view.reset(), deterministic=True)
    assert actions.shape == (32,)
    assert set(agent.get_parameters()) == {"policy", "optimizer", "critic"}


@pytest.mark.parametrize("kind", ["env", "sync", "disabled", "same_step", "vec_env", "async"])
def test_every_kind_of_environment_gives_the_same_learning_signal(task, kind: str) -> None:
    mode = gym.vector.AutoresetMode
    env = {
        "env": lambda: task.env(),
        "sync": lambda: task.sync_envs(8),
        "disabled": lambda: task.envs(8, autoreset_mode=mode.DISABLED),
        "same_step": lambda: task.envs(8, autoreset_mode=mode.SAME_STEP),
        "vec_env": lambda: DummyVecEnv([task.env for _ in range(8)]),
        "async": lambda: gym.make_vec("TextGen-v0", num_envs=8, vectorization_mode="async", **task.arguments()),
    }[kind]()
    size = {"rollout_size": 8}
    agent = REINFORCE(task.policy(), env, learning_rate=1e-3, seed=3, **size).learn(120)
    native = REINFORCE(task.policy(), task.envs(8), learning_rate=1e-3, seed=3, **size).learn(120)
    if kind == "env":  # one row at a time draws its random numbers in another order
        assert agent.num_timesteps >= 120
    else:
        torch.testing.assert_close(parameters(agent), parameters(native), atol=1e-6, rtol=1e-5)
    agent.vector_env.close()


def test_an_id_makes_a_native_environment(task) -> None:
    with pytest.raises(ValueError, match=r"tokenizer=policy\.tokenizer"):
        PPO(task.policy(), "TextGen-v0")


def test_the_reward_is_asked_once_per_rollout(task) -> None:
    agent = PPO(task.policy(), task.envs(), learning_rate=1e-3, seed=0)
    recorder = Recorder()
    agent.learn(300, callback=recorder)
    assert task.reward.calls == recorder.rollouts
    assert task.reward.rows == 32 * recorder.rollouts


def test_shaping_that_is_there_must_agree(task) -> None:
    policy, reference = task.policy(), task.policy(seed=5)
    with pytest.raises(ValueError, match="beta"):
        PPO(policy, KLShaping(task.envs(), policy=policy, reference=reference, beta=0.2), beta=0.1, reference=reference)
    with pytest.raises(ValueError, match="`reference`"):
        PPO(policy, KLShaping(task.envs(), policy=policy, reference=task.policy(), beta=0.1), beta=0.1, reference=reference)
    with pytest.raises(ValueError, match="`policy`"):
        PPO(policy, KLShaping(task.envs(), policy=reference, reference=reference, beta=0.1), beta=0.1, reference=reference)
    agent = PPO(policy, KLShaping(task.envs(), beta=0.1), beta=0.1, reference=reference, learning_rate=1e-3)
    assert len(agent.kl_shaping) == 1
    agent.learn(50)


def test_evaluation_logs_and_keeps_the_best_model(task, tmp_path: Path) -> None:
    evaluation = Evaluation(task.envs(8), interval=2, episodes=64, best_model_path=tmp_path / "best")
    agent = PPO(task.policy(), task.envs(), learning_rate=3e-3, seed=0, evaluation=evaluation)
    agent.learn(32 * 3 * 12)
    assert evaluation.last is not None and len(evaluation.last.rewards) == 64
    assert evaluation.best_reward >= evaluation.last.reward_mean
    from textgym.agents import CausalLMPolicy

    best = CausalLMPolicy.from_pretrained(tmp_path / "best", device=task.device)
    again = evaluate_policy(best, task.envs(8), agent.reference, episodes=64, seed=0)
    assert again.reward_mean == pytest.approx(evaluation.best_reward, abs=1e-4)


def test_a_bound_on_the_kl_keeps_bad_models_from_being_best(task) -> None:
    evaluation = Evaluation(task.envs(8), interval=1, max_kl=-1.0)
    PPO(task.policy(), task.envs(), learning_rate=3e-3, seed=0, evaluation=evaluation).learn(200)
    assert evaluation.best_reward is None and evaluation.last is not None


def test_missing_eos_penalty_and_whitening(task) -> None:
    agent = PPO(task.policy(), task.envs(), missing_eos_penalty=1.0, seed=0)
    rollout = agent.collector.walk(np.zeros(32, dtype=np.int64), agent.sampling_generator)
    rewards = agent.shaped_rewards(rollout)
    difference = (rollout.rewards - rewards).sum(1)
    ended = torch.tensor([info["finish_reason"] == "eos" for info in rollout.infos], device=difference.device)
    assert ended.any() and not ended.all()
    torch.testing.assert_close(difference, (~ended).float())
    whitened = PPO(task.policy(), task.envs(), whiten_rewards=True, seed=0).shaped_rewards(rollout)
    kept = whitened[rollout.completion_mask]
    assert kept.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    assert kept.mean().item() == pytest.approx(rollout.rewards[rollout.completion_mask].mean().item(), abs=1e-4)


def test_what_rewards_log_is_in_the_agents_log(task) -> None:
    def halves(completions, log_metric, **columns):
        log_metric("half", 0.5)
        return [1.0] * len(completions)

    agent = PPO(task.policy(), gym.make_vec("TextGen-v0", num_envs=8, **{**task.arguments(), "reward": halves}), seed=0)
    agent.learn(1, log_interval=0)
    assert agent.logger.name_to_value["rewards/half"] == 0.5
    assert agent.logger.name_to_value["rewards/halves/mean"] == 1.0


BAD = {
    "rollout_size": ({"rollout_size": 48}, "multiple of the number of environments"),
    "num_generations": ({"num_generations": 3}, "must divide"),
    "unknown": (
        {"learning_rat": 1},
        r"PPO has no argument `learning_rat`. Did you mean `learning_rate`\? It has: (?=.*\bbeta,)(?=.*\bclip_range,)(?=.*\brollout_size)",
    ),
    "beta": ({"beta": -1.0}, "`beta`"),
    "critic": ({"critic": "big"}, "`critic`"),
    "clip": ({"clip_range": "wide"}, "`clip_range`"),
    "negative clip": ({"clip_range": -1.0}, "`clip_range`"),
    "critic's rate": ({"critic_learning_rate": -1.0}, "`critic_learning_rate`"),
    "norm": ({"max_grad_norm": 0.0}, "`max_grad_norm`"),
    "micro": ({"micro_batch_size": 0}, "`micro_batch_size`"),
    "gamma": ({"gamma": 1.5}, "`gamma`"),
    "epochs": ({"n_epochs": 0}, "`n_epochs`"),
    "batch": ({"batch_size": 0}, "`batch_size`"),
    "lambda": ({"gae_lambda": -0.1}, "`gae_lambda`"),
    "learning_rate": ({"learning_rate": -1.0}, "`learning_rate`"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(task, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        PPO(task.policy(), task.envs(), **arguments)


def test_bad_choices_of_reinforce_are_named(task) -> None:
    with pytest.raises(ValueError, match="`baseline`"):
        REINFORCE(task.policy(), task.envs(), baseline="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`num_generations`"):
        REINFORCE(task.policy(), task.envs(), baseline="leave_one_out")
    with pytest.raises(ValueError, match="`policy`"):
        REINFORCE(task.policy().model, task.envs())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`env`"):
        REINFORCE(task.policy(), 3)


@pytest.mark.parametrize("critic", ["head", "joint", "separate"])
def test_ppos_first_step_shares_its_pass_with_the_targets(task, critic: str) -> None:
    """The same parameters as with a pass of its own, and one pass of the policy less."""
    parameters, passes = [], []
    for shared in (True, False):
        agent = PPO(task.policy(), task.envs(24), 1e-2, critic=critic, n_epochs=2, ent_coef=0.01, beta=0.1, seed=0)
        if not shared:
            agent._first_scores = lambda rollout: None  # type: ignore[method-assign]
        rollout = agent.collector.walk(None, agent.sampling_generator, seed=3)
        count: list[int] = []
        hook = agent.policy.model.get_input_embeddings().register_forward_hook(lambda *arguments, count=count: count.append(1))
        agent.train(rollout)
        hook.remove()
        parameters.append(torch.cat([p.detach().flatten() for p in agent.trainable_parameters()]))
        passes.append(len(count))
    torch.testing.assert_close(*parameters, atol=1e-6, rtol=1e-5)
    assert passes == [2, 3]
