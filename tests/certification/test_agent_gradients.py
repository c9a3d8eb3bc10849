"""The first-step gradient of every bundled on-policy agent at a policy far from π*, against the exact one.

Most of it without sampling: the agents' own code is given every completion (of one to three tokens) and the gradients are added up
with their probabilities, so a mistake of a thousandth shows.
"""

import copy
import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch

from textgym.agents import PPO, REINFORCE, CausalLMPolicy
from textgym.exact import TokenTree, hard_tree
from textgym.exact.certification import compare_gradients, exact_setup_gradient, expected_gradient, make_setup, sampled_gradients
from textgym.exact.gradients import completion_log_probs, exact_gradient, model_score

BARE = {"max_grad_norm": None, "learning_rate": 1e-3}


def tiny_tree(penalty=0.0):
    """Four completions, two prompts; `penalty` is what a completion without EOS loses."""

    def reward(prompt, ids):
        return float(np.sin(3 * len(ids) + 2 * sum(ids) + prompt)) + 3 * prompt - penalty * (ids[-1] != 1)

    return TokenTree(2, 3, 1, [[0], [0, 0]], reward)


def maker(agent_class, **options):
    """A factory as certification takes it; critics get random heads, so that their values are far from 0 and from right."""

    def make(setup):
        device = setup.model.device
        policy = CausalLMPolicy(setup.model, setup.tokenizer, temperature=setup.temperature, device=device)
        reference = CausalLMPolicy(setup.reference, setup.tokenizer, temperature=setup.temperature, device=device).reference()
        agent = agent_class(policy, setup.envs, beta=setup.beta, reference=reference, seed=setup.seed, **(BARE | options))
        if agent.critic is not None:
            torch.manual_seed(0)
            for parameter in agent.critic.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        return agent

    return make


def preset_average(agent):
    if hasattr(agent, "load_extra_state"):
        agent.load_extra_state({"average_return": 1.5})


ONE_STEP = {"n_epochs": 1, "gae_lambda": 1.0}
# name: (class, options, completions per rollout)
AGENTS = {
    "REINFORCE, no baseline": (REINFORCE, {"baseline": "none"}, 1),
    "REINFORCE, no baseline, whole return": (REINFORCE, {"baseline": "none", "reward_to_go": False}, 1),
    "REINFORCE, batch mean": (REINFORCE, {"baseline": "batch_mean", "num_generations": 2}, 2),
    "REINFORCE, moving average": (REINFORCE, {"baseline": "moving_average"}, 1),
    "REINFORCE, value head": (REINFORCE, {"baseline": "value"}, 1),
    "REINFORCE, value head, whole return": (REINFORCE, {"baseline": "value", "reward_to_go": False}, 1),
    "REINFORCE, leave-one-out": (REINFORCE, {"baseline": "leave_one_out", "num_generations": 2}, 2),
    "REINFORCE, leave-one-out, whole return": (
        REINFORCE,
        {"baseline": "leave_one_out", "reward_to_go": False, "num_generations": 2},
        2,
    ),
    "REINFORCE, micro-batches": (REINFORCE, {"baseline": "none", "num_generations": 2, "micro_batch_size": 1}, 2),
    "PPO, value head": (PPO, ONE_STEP, 1),
    "PPO, separate critic": (PPO, ONE_STEP | {"critic": "separate"}, 1),
    "PPO, value clipping": (PPO, ONE_STEP | {"clip_range_vf": 0.2}, 1),
    "PPO, micro-batches": (PPO, ONE_STEP | {"num_generations": 2, "micro_batch_size": 1}, 2),
}


def relative_error(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", AGENTS)
def test_expected_gradient_is_the_policy_gradient(name, device):
    agent_class, options, group = AGENTS[name]
    setup = make_setup(tiny_tree(), seed=0, num_envs=group, displaced=True, device=device)
    found = expected_gradient(maker(agent_class, **options), setup, group=group, before_rollout=preset_average)
    assert relative_error(found, exact_setup_gradient(setup)) < 1e-4


@pytest.mark.parametrize("name", ["REINFORCE, no baseline", "PPO, value head"])
def test_expected_gradient_at_another_temperature(name, device):
    """Policy and reference both at 0.6, in sampling, penalty and update."""
    agent_class, options, group = AGENTS[name]
    setup = make_setup(tiny_tree(), seed=0, num_envs=group, temperature=0.6, displaced=True, device=device)
    found = expected_gradient(maker(agent_class, **options), setup, group=group)
    assert relative_error(found, exact_setup_gradient(setup)) < 1e-4


def test_expected_gradient_with_a_missing_eos_penalty(device):
    setup = make_setup(tiny_tree(), seed=0, num_envs=1, displaced=True, device=device)
    found = expected_gradient(maker(PPO, **ONE_STEP, missing_eos_penalty=0.7), setup)
    penalised = dataclasses.replace(setup, tree=tiny_tree(penalty=0.7))
    assert relative_error(found, exact_setup_gradient(penalised)) < 1e-4
    assert relative_error(found, exact_setup_gradient(setup)) > 0.1


class TokenCost(gym.vector.VectorRewardWrapper):
    """A user's reward wrapper: every token costs 0.5. No bundled one, so the rollout is stepped token by token."""

    def rewards(self, rewards):
        return rewards - 0.5


@pytest.mark.parametrize("name", ["REINFORCE, leave-one-out", "PPO, value head"])
def test_expected_gradient_through_a_users_wrapper(name, device):
    agent_class, options, group = AGENTS[name]
    setup = make_setup(tiny_tree(), seed=0, num_envs=group, displaced=True, device=device)
    costly = dataclasses.replace(setup, tree=copy.copy(setup.tree), envs=TokenCost(setup.envs))
    costly.tree.rewards = setup.tree.rewards - 0.5 * setup.tree.lengths
    found = expected_gradient(maker(agent_class, **options), costly, group=group)
    assert relative_error(found, exact_setup_gradient(costly)) < 1e-4


def test_samples_follow_the_distribution_that_is_scored(device):
    """What the expected gradients take for granted, at a temperature: frequencies of 30,000 completions, and their log-probs."""
    setup = make_setup(tiny_tree(), seed=0, num_envs=1, temperature=0.6, displaced=True, device=device)
    policy = CausalLMPolicy(setup.model, setup.tokenizer, temperature=0.6, device=device)
    ids, lengths = torch.tensor([[0, 0], [0, 0]]), torch.tensor([1, 2])
    generation = policy.generate_ids(
        ids, lengths, setup.tree.horizon, num_generations=30_000, generator=torch.Generator(device).manual_seed(0)
    )
    numbers = {setup.tree.ids(j): j for j in range(setup.tree.num_completions)}
    found = np.array([numbers[tuple(row)] for row in generation.completion_ids]).reshape(2, -1)
    with torch.no_grad():
        exact = completion_log_probs(setup.tree, model_score(setup.model, 0.6), device).double().cpu().numpy()
    for prompt in range(2):
        frequencies = np.bincount(found[prompt], minlength=setup.tree.num_completions) / found.shape[1]
        errors = np.sqrt(np.exp(exact[prompt]) / found.shape[1])
        assert (np.abs(frequencies - np.exp(exact[prompt])) < 4 * errors).all()
    log_probs = generation.log_probs.sum(dim=1).cpu().numpy().reshape(2, -1)
    np.testing.assert_allclose(log_probs, np.take_along_axis(exact, found, axis=1), atol=1e-4)


@pytest.mark.filterwarnings("ignore::textgym.errors.TrainingWarning")  # the policy is moved behind the agent's back
def test_the_default_reference_is_frozen(device):
    """An agent that is given none penalises the distance from where it began, also after it has moved."""
    setup = make_setup(tiny_tree(), seed=0, num_envs=1, device=device)
    policy = CausalLMPolicy(setup.model, setup.tokenizer, device=device)
    agent = REINFORCE(policy, setup.envs, beta=setup.beta, baseline="none", seed=0, **BARE)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.3)
    found = expected_gradient(lambda _: agent, setup)
    assert relative_error(found, exact_setup_gradient(setup)) < 1e-4


@pytest.mark.parametrize("name", ["REINFORCE, no baseline", "PPO, value head"])
def test_entropy_bonus_adds_the_gradient_of_the_visited_entropies(name, device):
    """E Σ_t ∇H(π(·|s_t)), the states held fixed."""
    agent_class, options, _ = AGENTS[name]
    setup = make_setup(tiny_tree(), seed=0, num_envs=1, displaced=True, device=device)
    found = expected_gradient(maker(agent_class, ent_coef=0.3, **options), setup)

    policy = CausalLMPolicy(setup.model, setup.tokenizer, device=device)
    scores = policy.score(*(torch.as_tensor(part) for part in setup.tree.batch()), entropy=True)
    probabilities = scores.log_probs.sum(dim=1).detach().exp()
    entropy = (probabilities * scores.entropy.sum(dim=1)).sum() / setup.tree.num_prompts
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(entropy, list(setup.model.parameters()))]).double().cpu()
    assert relative_error(found, exact_setup_gradient(setup) + 0.3 * gradient) < 1e-4


def test_a_wrong_beta_is_seen(device):
    """The measure itself: an agent with 1 % more β is off by more than what the tests above allow."""
    setup = make_setup(tiny_tree(), seed=0, num_envs=1, displaced=True, device=device)
    other = dataclasses.replace(setup, beta=setup.beta * 1.01)
    found = expected_gradient(maker(PPO, **ONE_STEP), other)
    assert relative_error(found, exact_setup_gradient(setup)) > 1e-3


SAMPLED = {
    "REINFORCE, leave-one-out": (REINFORCE, {"baseline": "leave_one_out", "num_generations": 4}),
    "REINFORCE, batch mean": (REINFORCE, {"baseline": "batch_mean"}),
    "PPO": (PPO, ONE_STEP),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_mean_sampled_gradient_is_the_policy_gradient(name, device):
    """The agents' own sampling too, several prompts in a batch: the hard tree, 60 rollouts of 192 completions."""
    agent_class, options = SAMPLED[name]
    setup = make_setup(hard_tree(0), seed=0, num_envs=192, displaced=True, device=device)
    samples = sampled_gradients(maker(agent_class, **options), setup, 60)
    comparison = compare_gradients(samples, exact_setup_gradient(setup))
    slope, residual = comparison.deviations()
    assert comparison.norm_error < 0.1
    assert abs(slope) < 4
    assert abs(residual) < 5


def test_comparison_sees_a_bias_and_knows_its_noise():
    """On made-up gradients: half of 200 unbiased comparisons lie within the quartiles, a bias of 3 standard errors is seen."""
    rng = np.random.default_rng(0)
    exact = torch.tensor(rng.standard_normal(50))
    scales = torch.tensor(np.geomspace(0.1, 5.0, 50))
    deviations = []
    for _ in range(200):
        samples = exact + scales * torch.tensor(rng.standard_normal((40, 50)))
        deviations.append(compare_gradients(samples, exact).deviations())
    slopes, residuals = np.array(deviations).T
    for values in (slopes, residuals):
        assert abs(values.mean()) < 0.3
        assert 0.7 < values.std() < 1.4
    samples = 0.9 * exact + 0.01 * scales * torch.tensor(rng.standard_normal((40, 50)))
    slope, residual = compare_gradients(samples, exact).deviations()
    assert slope < -10
    assert residual > 10
    assert abs(compare_gradients(samples, exact, scale=0.9).deviations(scale=0.9)[1]) < 4


def test_gradient_of_the_model_is_that_of_the_policy_score(device):
    """`model_score` and `CausalLMPolicy.score` are independent ways to the same exact gradient."""
    setup = make_setup(hard_tree(0), seed=0, num_envs=1, temperature=0.8, displaced=True, device=device)
    policy = CausalLMPolicy(setup.model, setup.tokenizer, temperature=0.8, device=device)
    parameters = list(setup.model.parameters())
    arguments = (parameters, setup.reference_policy(), setup.beta, device)
    by_policy = exact_gradient(setup.tree, lambda *batch: policy.score(*batch).log_probs, *arguments)
    by_model = exact_gradient(setup.tree, model_score(setup.model, 0.8), *arguments)
    torch.testing.assert_close(by_policy, by_model, atol=1e-5, rtol=1e-4)
