"""Equalities between the algorithms at special settings, and unbiased updates on stale samples."""

from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents import PPO, REINFORCE
from textgym.agents.common.batches import RolloutBatch
from textgym.agents.common.rollout_scores import score_in_parts, values_in_parts


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def gradient(agent: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in agent.policy.parameters()])


def test_ppo_with_one_epoch_and_batch_is_reinforce_with_a_value_baseline(task) -> None:
    plain = {"optimizer": sgd, "max_grad_norm": None, "seed": 4, "learning_rate": 1e-9}
    ppo = PPO(task.policy(), task.envs(), n_epochs=1, gae_lambda=1.0, critic="head", **plain)
    reinforce = REINFORCE(task.policy(), task.envs(), baseline="value", reward_to_go=True, critic="head", **plain)
    reinforce.critic.load_state_dict(ppo.critic.state_dict())
    for agent in (ppo, reinforce):
        torch.nn.init.constant_(agent.critic.network.output.bias, 0.3)
        agent.learn(1)
    torch.testing.assert_close(gradient(ppo), gradient(reinforce), atol=1e-6, rtol=1e-4)


def test_one_update_needs_no_importance_weights(task) -> None:
    plain = {"optimizer": sgd, "max_grad_norm": None, "seed": 4, "learning_rate": 0.0}
    once = REINFORCE(task.policy(), task.envs(), **plain).learn(1)
    for importance in ("cumulative", "truncated", "token"):
        for reward_to_go in (True, False):
            again = REINFORCE(task.policy(), task.envs(), n_epochs=2, importance=importance, reward_to_go=reward_to_go, **plain).learn(1)
            whole = once if reward_to_go else REINFORCE(task.policy(), task.envs(), reward_to_go=False, **plain).learn(1)
            torch.testing.assert_close(gradient(again), gradient(whole), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_values_alone_are_those_of_a_whole_scoring(task, monkeypatch, critic: str) -> None:
    """In parts of any size; and a critic with a trunk of its own costs no pass of the policy."""
    agent = REINFORCE(task.policy(), task.envs(), baseline="value", critic=critic, seed=0)
    for parameter in agent.critic.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rollouts: list[RolloutBatch] = []
    monkeypatch.setattr(agent, "train", rollouts.append)
    agent.learn(1)
    whole = score_in_parts(agent.policy, rollouts[0], agent.critic).values
    if critic == "separate":
        monkeypatch.setattr(agent.policy, "score", None)
    for part_size in (None, 7):
        values = values_in_parts(agent.policy, rollouts[0], agent.critic, part_size)
        torch.testing.assert_close(values, whole, atol=1e-5, rtol=1e-5)


def all_completions(task: Any, agent: Any, behaviour: Any, prompt: int) -> tuple[RolloutBatch, torch.Tensor]:
    """Every completion of one prompt as a rollout of `behaviour`, and its probability under it: expectations without sampling."""
    envs = task.envs(task.tree.num_completions)
    completions = [task.tree.ids(i) for i in range(task.tree.num_completions)]
    lengths = np.array([len(c) for c in completions])
    actions = np.array([list(c) + [0] * (task.tree.horizon - len(c)) for c in completions])
    from textgym.agents.common.environments import reset_to_prompts, split_prompts
    from textgym.agents.common.shaping import ensure_kl_shaping
    from textgym.sequences import step_sequence

    shaped, _ = ensure_kl_shaping(envs, behaviour, agent.reference, agent.beta)
    prompt_ids, prompt_lengths = split_prompts(reset_to_prompts(shaped, np.full(len(completions), prompt)))
    result = step_sequence(shaped, actions, lengths)
    log_probs = torch.from_numpy(behaviour.sequence_log_probs(prompt_ids, prompt_lengths, actions, lengths))
    batch = RolloutBatch(
        prompt_ids=torch.from_numpy(prompt_ids),
        prompt_lengths=torch.from_numpy(prompt_lengths),
        completion_ids=torch.from_numpy(actions),
        lengths=torch.from_numpy(lengths),
        log_probs=log_probs,
        rewards=torch.from_numpy(result.rewards),
        truncated=torch.zeros(len(completions), dtype=torch.bool),
        unshaped_returns=torch.zeros(len(completions)),
        kl_per_sequence=torch.zeros(len(completions)),
    )
    return batch, log_probs.sum(1).exp()


@pytest.mark.parametrize("reward_to_go", [True, False])
@pytest.mark.parametrize("baseline", ["none", "value", "moving_average"])
def test_cumulative_weights_make_stale_samples_unbiased_exactly(task, baseline: str, reward_to_go: bool) -> None:
    """Expectation over *all* completions of an older policy = the exact gradient of J at the current one, the KL term included."""
    from textgym.exact.gradients import exact_gradient, model_score

    behaviour = task.policy(seed=11)
    agent = REINFORCE(task.policy(seed=7), task.envs(), beta=0.3, baseline=baseline, reward_to_go=reward_to_go, n_epochs=2, seed=0)
    agent.reference = task.policy(seed=2).reference()
    agent._average_return = 0.7
    total: Any = 0.0
    biased: Any = 0.0
    for prompt in range(task.tree.num_prompts):
        batch, probabilities = all_completions(task, agent, behaviour, prompt)
        expectation(agent, batch, probabilities)
        total = total + gradient(agent)
        agent.importance = "token"
        expectation(agent, batch, probabilities)
        biased = biased + gradient(agent)
        agent.importance = "cumulative"
    exact = exact_gradient(task.tree, model_score(agent.policy.model), list(agent.policy.parameters()), agent.reference, 0.3)
    exact = torch.as_tensor(exact).flatten() * task.tree.num_prompts
    torch.testing.assert_close(-total, exact.to(total.dtype), atol=2e-4, rtol=1e-3)
    assert (biased - total).norm() > 0.05 * total.norm()  # the named approximation is one


def expectation(agent: Any, batch: RolloutBatch, probabilities: torch.Tensor) -> None:
    """Leaves in `.grad` the loss gradient averaged over `batch` with weights `probabilities`."""
    from textgym.agents.common.advantages import rewards_to_go

    returns = rewards_to_go(batch.rewards, batch.lengths)
    _, baselines = agent.estimate(batch, returns, rescore=False)
    agent.policy.zero_grad()
    for row, weight in enumerate(probabilities.tolist()):
        rows = torch.tensor([row])
        width = int(batch.lengths[row])
        tables = [table[rows, :width] for table in (batch.rewards, returns, baselines, batch.log_probs)]
        agent.vf_coef = 0.0
        (weight * agent.loss(batch.select(rows), *tables, sequences=1, stale=True)).backward()
