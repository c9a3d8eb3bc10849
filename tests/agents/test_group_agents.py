"""What the agents that compare the completions of a prompt promise of their loop, their arguments, and where they end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import VectorWrapper
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from textgym.agents import GRPO, REBEL, RLOO, CausalLMPolicy
from textgym.exact import (
    GroupAdvantages,
    TokenTree,
    expected_reward,
    frontier_reward,
    grpo_fixed_point,
    hard_tree,
    kl_divergence,
    soft_solution,
    total_variation,
)
from textgym.exact.certification import certify_fixed_point, make_setup
from textgym.exact.models import tiny_lm
from textgym.kl import AdaptiveKLController
from textgym.wrappers.vector import KLShaping

AGENTS: dict[str, Any] = {"rloo": RLOO, "rebel": REBEL, "grpo": GRPO}
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
    "grpo": {
        "train/approx_kl",
        "train/clip_fraction_low",
        "train/clip_fraction_high",
        "train/kl_loss",
        "train/policy_gradient_loss",
        "rollout/group_reward_std",
        "rollout/frac_reward_zero_std",
    },
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
    "unknown": ({"epsilon": 0.2}, "has no argument `epsilon`"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "mean"}, "`loss_type` must be one of 'grpo', 'bnpo', 'dr_grpo', 'dapo'"),
        ({"scale_rewards": "all"}, "`scale_rewards` must be one of 'group', 'batch', 'none'"),
        ({"clip_range": -0.1}, "`clip_range`"),
        ({"clip_range_high": "wide"}, "`clip_range_high`"),
    ],
)
def test_bad_arguments_of_grpo_are_named(task, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPO(task.policy(), task.envs(), **arguments)


def test_grpo_refuses_a_shaped_environment(task) -> None:
    policy = task.policy()
    with pytest.raises(ValueError, match="must not have KLShaping for GRPO"):
        GRPO(policy, KLShaping(task.envs(), policy=policy, reference=policy.reference(), beta=0.04))


def test_scale_of_grpo_in_every_spelling(task) -> None:
    spellings = {None: "group", True: "group", False: "none", "batch": "batch"}
    for given, meant in spellings.items():
        assert GRPO(task.policy(), task.envs(), scale_rewards=given).scale_rewards == meant
    assert GRPO(task.policy(), task.envs(), loss_type="dr_grpo").scale_rewards == "none"
    assert GRPO(task.policy(), task.envs(), loss_type="dr_grpo", scale_rewards=True).scale_rewards == "group"


def test_grpo_without_a_kl_term_and_with_one_that_adapts(task) -> None:
    free = GRPO(task.policy(), task.envs(), beta=0.0, learning_rate=1e-3, seed=0).learn(200, log_interval=0)
    assert "train/kl_loss" not in free.logger.name_to_value
    adaptive = AdaptiveKLController(0.04, target=0.01, horizon=1000)
    GRPO(task.policy(), task.envs(), beta=adaptive, learning_rate=1e-2, seed=0).learn(400)
    assert adaptive.value > 0.04


def test_share_of_groups_without_a_difference(task) -> None:
    """A reward that knows only the prompt tells a group nothing: every deviation is zero, and so is the step."""
    envs = gym.make_vec("TextGen-v0", num_envs=32, **(task.arguments() | {"reward": lambda prompts, **_: [len(p) / 7 for p in prompts]}))
    agent = GRPO(task.policy(), envs, beta=0.0, seed=0)
    before = parameters(agent)
    agent.learn(1, log_interval=0)
    assert agent.logger.name_to_value["rollout/frac_reward_zero_std"] == 1.0
    assert torch.equal(parameters(agent), before)


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


# name: (class, options, its fixed point on a tree, (tree, reference, β) to a tabular policy)
SMALL: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "rloo": (RLOO, {"num_generations": 4}, lambda tree, *rest: soft_solution(tree, *rest).policy),
    "rebel": (REBEL, {"n_epochs": 2}, lambda tree, *rest: soft_solution(tree, *rest).policy),
    "grpo": (GRPO, {"num_generations": 4}, lambda tree, *rest: grpo_fixed_point(GroupAdvantages(tree, 4), *rest)),
}


def falling(left: float) -> float:
    return 4e-3 * left**2


def make_for(setup: Any, agent_class: Any, learning_rate: Any = falling, **options: Any) -> Any:
    policy = CausalLMPolicy(setup.model, setup.tokenizer, device=setup.model.device)
    reference = CausalLMPolicy(setup.reference, setup.tokenizer, device=setup.model.device).reference()
    return agent_class(policy, setup.envs, learning_rate, reference=reference, seed=setup.seed, **({"beta": setup.beta} | options))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_ends_at_its_fixed_point_on_a_small_hard_tree(name: str, device: str) -> None:
    agent_class, options, solve = SMALL[name]
    tree = hard_tree(0, vocab_size=3, horizon=2)
    point = certify_fixed_point(
        lambda setup: make_for(setup, agent_class, **options),
        seed=0,
        num_envs=192,
        total_timesteps=40_000,
        tree=tree,
        target=lambda setup: solve(tree, setup.reference_policy(), setup.beta),
        device=device,
    )
    assert max(point.start) > 0.4
    assert point.worst < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_users_reward_wrapper_is_learned_to_the_wrapped_fixed_point(name: str, device: str) -> None:
    agent_class, options, solve = SMALL[name]
    tree = hard_tree(0, vocab_size=3, horizon=2)
    setup = make_setup(tree, seed=0, num_envs=192, device=device)
    agent = make_for(replace(setup, envs=PayTokenZero(setup.envs)), agent_class, **options).learn(30_000)
    bonus = [sum(token == 0 for token in tree.ids(j)) for j in range(tree.num_completions)]
    paying = TokenTree(tree.vocab_size, tree.horizon, tree.eos_token_id, tree.prompts, tree.rewards + np.array(bonus))
    wrapped, plain = (solve(t, agent.reference, setup.beta) for t in (paying, tree))
    assert total_variation(tree, plain, wrapped).max() > 0.5
    assert total_variation(tree, agent.policy, wrapped).max() < 0.1


@pytest.mark.slow
def test_grpo_comes_near_the_frontier(device: str) -> None:
    """At β = 0.04 it gains at least 95 % of what any policy could gain over the reference at the KL that it ends with."""
    tree = hard_tree(0, vocab_size=3, horizon=2)
    setup = make_setup(tree, seed=3, num_envs=192, device=device)  # from where no agent's seed was seen to stay at a worse completion
    agent = make_for(setup, GRPO, lambda left: 2e-3 * left, beta=0.04, max_grad_norm=None).learn(25_000)
    reference = setup.reference_policy()
    start, reward = expected_reward(tree, reference).mean(), expected_reward(tree, agent.policy).mean()
    best = frontier_reward(tree, reference, kl_divergence(tree, agent.policy, reference).mean())
    assert best - start > 0.8
    assert 0.95 < (reward - start) / (best - start) <= 1 + 1e-3
