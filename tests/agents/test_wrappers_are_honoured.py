"""Whatever a user puts on the stack, agents learn in it: rewards, observations, actions, early ends, time limits."""

import warnings
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import LinearSchedule

from textgym.agents import PPO, REINFORCE
from textgym.agents.common.rollout_scores import score_rollout
from textgym.exact import soft_solution, total_variation


class PayTokenZero(gym.vector.VectorWrapper):
    """Vector form: pays 1 for every token 0 that is sent."""

    def step(self, actions: Any) -> Any:
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        return observations, rewards + (np.asarray(actions) == 0), terminated, truncated, infos


class PayTokenZeroSingle(gym.Wrapper):
    """Single form of the same."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward) + float(action == 0), terminated, truncated, info


class NextToken(gym.vector.VectorActionWrapper):
    """Sends another token than the policy chose."""

    def actions(self, actions: Any) -> Any:
        return (np.asarray(actions) + 1) % self.single_action_space.n


class HideFirstColumn(gym.vector.VectorObservationWrapper):
    """Shows a wrong last token, so an observation is no concatenation."""

    def observations(self, observations: Any) -> Any:
        ids = np.array(observations["input_ids"])
        mask = observations["attention_mask"].astype(bool)
        last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
        rows = np.arange(len(ids))
        ids[rows, last] = (ids[rows, last] + 1) % 4
        return {**observations, "input_ids": ids}


class StopAfterTwo(gym.vector.VectorWrapper):
    """Ends every episode after two steps: an outer time limit."""

    def reset(self, **kwargs: Any) -> Any:
        self.taken = np.zeros(self.num_envs, dtype=int)
        return self.env.reset(**kwargs)

    def step(self, actions: Any) -> Any:
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        self.taken += 1
        return observations, rewards, terminated, truncated | ((self.taken >= 2) & ~terminated), infos


def paying(tree: Any) -> Any:
    """The tree whose rewards are those under `PayTokenZero`."""
    from textgym.exact import TokenTree

    bonus = np.array([sum(token == 0 for token in tree.ids(i)) for i in range(tree.num_completions)])
    return TokenTree(tree.vocab_size, tree.horizon, tree.eos_token_id, tree.prompts, tree.rewards + bonus)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_a_vector_reward_wrapper_changes_what_is_learned_to_the_wrapped_optimum(small_task, algorithm: str) -> None:
    task, beta, rows = small_task, 0.5, 96
    policy = task.policy()
    envs = PayTokenZero(task.envs(rows))
    if algorithm == "ppo":
        agent: Any = PPO(policy, envs, LinearSchedule(2e-3, 0.0, 1.0), beta=beta, n_epochs=2, gae_lambda=1.0, vf_coef=1.0, seed=0)
    else:
        schedule = LinearSchedule(2e-3, 0.0, 1.0)
        agent = REINFORCE(policy, envs, schedule, beta=beta, baseline="leave_one_out", num_generations=8, seed=0)
    agent.learn(30_000)
    wrapped = soft_solution(paying(task.tree), agent.reference, beta).policy
    plain = soft_solution(task.tree, agent.reference, beta).policy
    # At most 0.05 was measured for both, on four seeds; an agent that does not see the wrapper ends 0.6 away.
    assert total_variation(task.tree, policy, wrapped).max() < 0.15
    assert total_variation(task.tree, plain, wrapped).max() > 0.5
    # One question to the environment's own reward per episode, filler steps included.
    assert task.reward.rows == rows * (agent._n_updates // (2 if algorithm == "ppo" else 1))


def test_both_forms_of_a_reward_wrapper_pay_the_same(task) -> None:
    policy = task.policy()
    vector = REINFORCE(policy, PayTokenZero(task.envs(8)), seed=0)
    single = REINFORCE(
        policy, gym.make_vec("TextGen-v0", num_envs=8, vectorization_mode="sync", wrappers=[PayTokenZeroSingle], **task.arguments()), seed=0
    )
    generators = [torch.Generator(device=policy.device).manual_seed(3) for _ in range(2)]
    indices = np.arange(8) % task.tree.num_prompts
    a, b = (agent.collector.walk(indices, generator) for agent, generator in zip((vector, single), generators, strict=True))
    torch.testing.assert_close(a.rewards, b.rewards)
    zeros = ((a.completion_ids == 0) & a.completion_mask).sum(1)
    expected = [task.reward.reward(prompts=[i["prompt"]], completion_ids=[i["completion_ids"]])[0] for i in a.infos]
    torch.testing.assert_close(a.unshaped_returns.cpu(), torch.tensor(expected) + zeros.cpu(), atol=1e-4, rtol=1e-4)
    assert zeros.any()


@pytest.mark.parametrize("wrapper", [NextToken, HideFirstColumn])
def test_a_wrapper_that_changes_tokens_is_acted_on_in_closed_loop(task, wrapper: Any) -> None:
    agent = PPO(task.policy(), wrapper(task.envs(8)), seed=0)
    with pytest.warns(UserWarning, match="what it sees"):
        first = agent.collector.walk(np.arange(8) % 3, agent.sampling_generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        second = agent.collector.walk(np.arange(8) % 3, agent.sampling_generator)
    for rollout in (first, second):
        assert rollout.steps is not None
        # Every row came to its end in the environment, those whose planned completion was shorter included.
        assert all("completion_ids" in info for info in rollout.infos)
        # Law 3, on what the policy really saw: its log-probs of the tokens it chose, one observation at a time.
        for t in range(rollout.completion_ids.shape[1]):
            live = rollout.lengths > t
            seen = {
                "input_ids": rollout.steps.input_ids[live, t].cpu().numpy(),
                "attention_mask": rollout.steps.attention_mask[live, t].cpu().numpy(),
            }
            alone = agent.policy.log_probs(seen, rollout.completion_ids[live, t].cpu().numpy())
            np.testing.assert_allclose(rollout.log_probs[live, t].cpu().numpy(), alone, atol=1e-4)
        torch.testing.assert_close(score_rollout(agent.policy, rollout).log_probs, rollout.log_probs, atol=1e-4, rtol=0)
    agent.learn(100)


def test_an_action_wrapper_sends_what_it_says(task) -> None:
    agent = REINFORCE(task.policy(), NextToken(task.envs(8)), seed=0)
    with pytest.warns(UserWarning, match="what it sees"):
        agent.collector.walk(np.arange(8) % 3, agent.sampling_generator)
    rollout = agent.collector.walk(np.arange(8) % 3, agent.sampling_generator)
    for row, info in enumerate(rollout.infos):
        chosen = rollout.completion_ids[row, : rollout.lengths[row]].tolist()
        assert [(token + 1) % task.tree.vocab_size for token in chosen] == info["completion_ids"]


def test_rows_cut_by_a_time_limit_bootstrap_the_critics_value(task) -> None:
    agent = PPO(task.policy(), StopAfterTwo(task.envs(16)), seed=0, gae_lambda=1.0, beta=0.0)
    rollout = agent.collector.walk(np.arange(16) % 3, agent.sampling_generator)
    assert rollout.truncated.any()
    assert (rollout.lengths[rollout.truncated] == 2).all()
    torch.nn.init.normal_(agent.critic.network.output.weight)
    scores, advantages = agent.estimate(rollout)
    cut = rollout.truncated.nonzero()[0].item()
    # By hand: the value of the state after the two tokens, from the policy's hidden state there.
    longer = torch.cat([rollout.completion_ids[cut : cut + 1, :2], torch.zeros((1, 1), dtype=torch.long, device=rollout.lengths.device)], 1)
    hidden = agent.policy.score(
        rollout.prompt_ids[cut : cut + 1], rollout.prompt_lengths[cut : cut + 1], longer, torch.tensor([3]), hidden=True
    ).hidden
    value = agent.critic.from_hidden(hidden)[0, 2]
    expected = rollout.rewards[cut, :2].sum() + value - scores.values[cut, 0]
    assert advantages[cut, 0].item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_native_time_limit_truncates_too(task) -> None:
    agent = PPO(task.policy(), task.envs(16, max_episode_steps=1), seed=0)
    rollout = agent.collector.walk(np.arange(16) % 3, agent.sampling_generator)
    assert rollout.truncated.any() and (rollout.lengths == 1).all()
    agent.learn(40)


def test_the_closed_loop_keeps_the_sets_it_sampled_from(task) -> None:
    """Truncated sampling: once the policy has moved, both sides of the ratio are still over the tokens that could be drawn."""
    agent = PPO(task.policy(top_k=2), NextToken(task.envs(8)), seed=0)
    with pytest.warns(UserWarning, match="what it sees"):
        agent.collector.walk(np.arange(8) % 3, agent.sampling_generator)
    rollout = agent.collector.walk(np.arange(8) % 3, agent.sampling_generator)
    assert rollout.steps is not None and rollout.kept is not None
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.mul_(-1.0)
        scores = score_rollout(agent.policy, rollout, return_kept=True)
        moved = score_rollout(agent.policy, replace(rollout, kept=None), return_kept=True)
    mask = rollout.completion_mask
    assert torch.equal(scores.kept[mask], rollout.kept[mask])
    assert not torch.equal(moved.kept[mask], rollout.kept[mask])
    assert not torch.allclose(moved.log_probs, scores.log_probs)
