"""What the agents that compare the completions of a prompt promise of their loop, their arguments, and where they end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import VectorWrapper
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from textgym.agents import REBEL, RLOO, CausalLMPolicy
from textgym.exact import TokenTree, hard_tree, soft_solution, total_variation
from textgym.exact.certification import certify_fixed_point
from textgym.exact.models import tiny_lm

AGENTS: dict[str, Any] = {"rloo": RLOO, "rebel": REBEL}
everyone = pytest.mark.parametrize("agent_class", AGENTS.values(), ids=AGENTS)


def parameters(agent: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in agent.trainable_parameters()])


def make(agent_class: Any, policy: Any, env: Any, **options: Any) -> Any:
    return agent_class(policy, env, **({"learning_rate": 1e-3, "seed": 1} | options))


@everyone
def test_a_resumed_run_equals_an_uninterrupted_one(task, agent_class, tmp_path: Path) -> None:
    class SaveBeforeTheFourthRollout(BaseCallback):
        rollouts = 0

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if self.rollouts == 3:
                self.model.save(tmp_path / "agent")
            self.rollouts += 1

    options = {"learning_rate": LinearSchedule(1e-3, 0.0, 1.0), "n_epochs": 2, "batch_size": 8}
    whole = make(agent_class, task.policy(), task.envs(), **options).learn(600, callback=SaveBeforeTheFourthRollout())
    resumed = agent_class.load(tmp_path / "agent", env=task.envs(), device=task.device)
    assert resumed.n_epochs == 2 and resumed.num_generations == whole.num_generations and resumed.num_timesteps < 600
    resumed.learn(600 - resumed.num_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps
    assert torch.equal(parameters(resumed), parameters(whole))


@everyone
@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_micro_batches_change_no_gradient(task, agent_class, micro_batch_size: int) -> None:
    options = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "max_grad_norm": None, "n_epochs": 2, "batch_size": 16}
    plain = make(agent_class, task.policy(), task.envs(), **options).learn(1)
    split = make(agent_class, task.policy(), task.envs(), micro_batch_size=micro_batch_size, **options).learn(1)
    torch.testing.assert_close(parameters(split), parameters(plain), atol=1e-6, rtol=1e-5)


@everyone
def test_truncated_sampling_and_two_walks_per_rollout(task, agent_class) -> None:
    agent = make(agent_class, task.policy(temperature=0.7, top_k=4), task.envs(8), rollout_size=24, n_epochs=2, batch_size=12)
    before = parameters(agent)
    agent.learn(100)
    assert parameters(agent).isfinite().all() and not torch.equal(parameters(agent), before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for its old name
@everyone
def test_an_adapter_is_trained_and_nothing_else(task, agent_class) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    policy = CausalLMPolicy(peft.get_peft_model(tiny_lm(task.tree), config), task.tree.tokenizer(), device=task.device)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    make(agent_class, policy, task.envs(), n_epochs=2, learning_rate=1e-2).learn(200)
    for name, p in policy.model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora" not in name), name


LOGGED = {
    "rebel": {"train/loss", "train/relative_return", "train/approx_kl"},
    "rloo": {
        "train/baseline_mean",
        "train/approx_kl",
        "train/sequence_ratio_mean",
        "train/sequence_clip_fraction",
        "train/policy_gradient_loss",
    },
}


@pytest.mark.parametrize("name", AGENTS)
def test_what_is_logged(task, name: str) -> None:
    options = {} if name == "rebel" else {"clip_range": 0.2}
    agent = make(AGENTS[name], task.policy(), task.envs(), n_epochs=2, **options).learn(1, log_interval=0)
    assert LOGGED[name] | {"train/grad_norm", "rollout/kl_per_sequence"} <= set(agent.logger.name_to_value)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "one completion": ({"num_generations": 1}, r"`num_generations` must be at least 2 for \w+"),
    "half a completion": ({"num_generations": 2.5}, "`num_generations` must be a whole number"),
    "epochs": ({"n_epochs": 0}, "`n_epochs`"),
    "batch": ({"batch_size": 0}, "`batch_size`"),
    "beta": ({"beta": -1.0}, "`beta`"),
    "unknown": ({"epsilon": 0.2}, "Unknown argument"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
@everyone
def test_bad_arguments_are_named(task, agent_class, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(agent_class, task.policy(), task.envs(), **arguments)


def test_bad_arguments_of_one_of_them(task) -> None:
    with pytest.raises(ValueError, match="`clip_range`"):
        RLOO(task.policy(), task.envs(), clip_range=-1.0)
    with pytest.raises(ValueError, match="`num_generations` must divide"):
        RLOO(task.policy(), task.envs(6))
    with pytest.raises(ValueError, match="`eta`"):
        REBEL(task.policy(), task.envs(), eta=0.0)
    with pytest.raises(ValueError, match="`batch_size` must be a multiple of `num_generations`, 2"):
        REBEL(task.policy(), task.envs(), batch_size=7)


def test_rebel_warns_where_it_cannot_converge(task) -> None:
    with pytest.warns(UserWarning, match="`eta` times `beta` is 2"):
        REBEL(task.policy(), task.envs(), beta=0.5, eta=4.0)
    with pytest.warns(UserWarning, match="`eta` times `beta` is 3"):
        REBEL(task.policy(), task.envs(), beta=LinearSchedule(0.3, 0.0, 1.0), eta=10.0)
    REBEL(task.policy(), task.envs(), beta=0.5, eta=3.9)  # a warning would be an error


class PayTokenZero(VectorWrapper):
    """A user's wrapper: pays 1 for every token 0 that is sent."""

    def step(self, actions: Any) -> Any:
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        return observations, rewards + (np.asarray(actions) == 0), terminated, truncated, infos


SMALL: dict[str, tuple[Any, dict[str, Any]]] = {
    "rloo": (RLOO, {"num_generations": 4}),
    "rebel": (REBEL, {"n_epochs": 2}),
}


def falling(start: float) -> Any:
    return lambda left: start * left**2


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_ends_at_the_optimum_of_a_small_hard_tree(name: str, device: str) -> None:
    agent_class, options = SMALL[name]

    def make_agent(setup: Any) -> Any:
        policy = CausalLMPolicy(setup.model, setup.tokenizer, device=device)
        reference = CausalLMPolicy(setup.reference, setup.tokenizer, device=device).reference()
        return agent_class(policy, setup.envs, falling(4e-3), beta=setup.beta, reference=reference, seed=setup.seed, **options)

    tree = hard_tree(0, vocab_size=3, horizon=2)
    point = certify_fixed_point(make_agent, seed=0, num_envs=192, total_timesteps=40_000, tree=tree, device=device)
    assert max(point.start) > 0.4
    assert point.worst < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_users_reward_wrapper_is_learned_to_the_wrapped_optimum(name: str, device: str) -> None:
    import gymnasium as gym

    agent_class, options = SMALL[name]
    tree, beta = hard_tree(0, vocab_size=3, horizon=2), 0.5
    policy = CausalLMPolicy(tiny_lm(tree), tree.tokenizer(), device=device)
    envs = gym.make_vec(
        "textgym:TextGen-v0",
        num_envs=192,
        prompts=tree.prompt_texts,
        tokenizer=tree.tokenizer(),
        reward=tree.reward_function(),
        max_new_tokens=tree.horizon,
    )
    agent = agent_class(policy, PayTokenZero(envs), falling(4e-3), beta=beta, seed=0, **options).learn(30_000)
    bonus = [sum(token == 0 for token in tree.ids(j)) for j in range(tree.num_completions)]
    paying = TokenTree(tree.vocab_size, tree.horizon, tree.eos_token_id, tree.prompts, tree.rewards + np.array(bonus))
    wrapped, plain = (soft_solution(t, agent.reference, beta).policy for t in (paying, tree))
    assert total_variation(tree, plain, wrapped).max() > 0.6
    assert total_variation(tree, policy, wrapped).max() < 0.1
