"""The first-step gradient of the agents that compare the completions of a prompt, and their updates on stale samples.

Nothing is sampled: the agents' own code is given every group of completions, or every completion of an older policy, and the gradients
are added up with their probabilities.
"""

import copy
import math

import numpy as np
import pytest
import torch

from textgym.agents import GRPO, REBEL, REINFORCE, RLOO, CausalLMPolicy
from textgym.exact import GroupAdvantages, TokenTree, grpo_token_weights, hard_tree, soft_solution, total_variation
from textgym.exact.certification import exact_setup_gradient, expected_gradient, make_setup, tabular_policy, with_completions
from textgym.exact.gradients import model_score


def tiny_tree():
    """Four completions of one to three tokens, two prompts."""
    return TokenTree(2, 3, 1, [[0], [0, 0]], lambda i, y: float(np.sin(3 * len(y) + 2 * sum(y) + i)) + 3 * i)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def make_agent(setup, agent_class, **options):
    policy = CausalLMPolicy(setup.model, setup.tokenizer, temperature=setup.temperature, device=setup.model.device)
    reference = CausalLMPolicy(setup.reference, setup.tokenizer, temperature=setup.temperature, device=setup.model.device).reference()
    settings = {"learning_rate": 1e-3, "beta": setup.beta, "max_grad_norm": None, "optimizer": sgd, "seed": setup.seed}
    return agent_class(policy, setup.envs, reference=reference, **(settings | options))


def relative_error(found, exact):
    return float((found - exact).norm() / exact.norm())


# name: (class, options, completions per rollout, expected gradient as a multiple of ∇J)
POLICY_GRADIENTS = {
    "RLOO, k = 2": (RLOO, {"num_generations": 2}, 2, 1.0),
    "RLOO, k = 3": (RLOO, {"num_generations": 3}, 3, 1.0),
    "RLOO, micro-batches": (RLOO, {"num_generations": 2, "micro_batch_size": 1}, 2, 1.0),
    "REBEL": (REBEL, {"num_generations": 2, "n_epochs": 1, "eta": 0.5}, 2, 4 / 0.5),
    "REBEL, G = 3": (REBEL, {"num_generations": 3, "n_epochs": 1, "eta": 2.0}, 3, 4 / 2.0),
    "RLOO, clipping": (RLOO, {"num_generations": 2, "clip_range": 0.2}, 2, 1.0),
}


def error_of_the_expected_gradient(name, temperature, device):
    agent_class, options, group, scale = POLICY_GRADIENTS[name]
    setup = make_setup(tiny_tree(), seed=0, num_envs=group, temperature=temperature, displaced=True, device=device)
    found = expected_gradient(lambda setup: make_agent(setup, agent_class, **options), setup, group=group)
    return relative_error(found, scale * exact_setup_gradient(setup))


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_expected_gradient_is_the_policy_gradient(name, device):
    assert error_of_the_expected_gradient(name, 1.0, device) < 1e-4


@pytest.mark.parametrize("name", ["RLOO, k = 2", "REBEL"])
def test_expected_gradient_at_another_temperature(name, device):
    assert error_of_the_expected_gradient(name, 0.6, device) < 1e-4


# name: (options, completions per rollout, the reduction and the scale of the exact form, its constant)
GRPO_STEPS = {
    "grpo": ({"loss_type": "grpo"}, 3, "sequence_mean", True, 1.0),
    "grpo, pairs": ({"loss_type": "grpo", "micro_batch_size": 1}, 2, "sequence_mean", True, 1.0),
    "grpo, not scaled": ({"loss_type": "grpo", "scale_rewards": False}, 2, "sequence_mean", False, 1.0),
    "dr_grpo": ({"loss_type": "dr_grpo", "micro_batch_size": 2}, 3, "sequence_sum", False, 1 / 3),
    "dr_grpo, scaled": ({"loss_type": "dr_grpo", "scale_rewards": "group"}, 2, "sequence_sum", True, 1 / 3),
    "no KL term": ({"loss_type": "grpo", "beta": 0.0}, 2, "sequence_mean", True, 1.0),
}


@pytest.mark.parametrize("name", GRPO_STEPS)
def test_expected_step_of_grpo_is_its_exact_one(name, device):
    """Not ∇J: the form that `textgym.exact.groups` derives by enumeration, and whose zero is GRPO's fixed point."""
    options, group, reduction, scale, constant = GRPO_STEPS[name]
    setup = make_setup(tiny_tree(), seed=0, num_envs=group, displaced=True, device=device)
    found = expected_gradient(lambda setup: make_agent(setup, GRPO, num_generations=group, **options), setup, group=group)
    tree, beta = setup.tree, options.get("beta", setup.beta)
    policy = tabular_policy(setup, setup.model)
    advantages = GroupAdvantages(tree, group, scale=scale)
    weights = grpo_token_weights(advantages, policy, setup.reference_policy(), beta, reduction=reduction)
    log_probs = model_score(setup.model)(*(torch.as_tensor(part, device=device) for part in tree.batch()))
    total = (constant * torch.as_tensor(weights).to(log_probs).view_as(log_probs) * log_probs).sum()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(setup.model.parameters()))]).double().cpu()
    assert relative_error(found, exact) < 1e-4


# Which completions the four rows of a rollout are, two groups of two.
ROWS = {"mixed lengths": (0, 3, 2, 1), "another batch": (1, 2, 3, 3)}


class Update:
    """One rollout of an agent on given completions, `agent.learn` included, and what a second implementation needs."""

    def __init__(self, agent_class, rows, device, rate=0.03, **options):
        self.tree = tiny_tree()
        setup = make_setup(self.tree, seed=0, num_envs=4, displaced=True, device=device)
        self.rate, self.beta, self.device, self.prompts = rate, setup.beta, device, []
        self.reference = copy.deepcopy(setup.reference)
        self.agent = make_agent(setup, agent_class, num_generations=2, learning_rate=self.rate, **options)
        self.model = copy.deepcopy(setup.model)
        policy = self.agent.policy
        generate_ids = policy.generate_ids

        def given(prompt_ids, prompt_lengths, *args, **settings):
            generation = with_completions(policy, generate_ids(prompt_ids, prompt_lengths, *args, **settings), self.tree, rows)
            for ids, length in zip(generation.prompt_ids.tolist(), generation.prompt_lengths.tolist(), strict=True):
                self.prompts.append(ids[len(ids) - length :])
            return generation

        policy.generate_ids = given
        self.agent.learn(1)
        self.completions = [list(self.tree.ids(j)) for j in rows]
        self.scores = [self.tree.rewards[self.tree.prompts.index(tuple(p)), j] for p, j in zip(self.prompts, rows, strict=True)]

    def log_probs(self, model, row):
        """log π of the tokens of a row, (T,)."""
        prompt, ids = self.prompts[row], self.completions[row]
        logits = model(input_ids=torch.tensor([prompt + ids], device=self.device)).logits[0].log_softmax(-1)
        return torch.stack([logits[len(prompt) - 1 + t, token] for t, token in enumerate(ids)])

    def returns(self, model):
        """R of each row, the KL term that of `model`."""
        rows = range(len(self.completions))
        gaps = [(self.log_probs(model, row) - self.log_probs(self.reference, row)).sum().item() for row in rows]
        return [score - self.beta * gap for score, gap in zip(self.scores, gaps, strict=True)]

    def descend(self, loss):
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter -= self.rate * gradient

    def compare(self):
        for (name, p), q in zip(self.agent.policy.model.named_parameters(), self.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("clip_range", [None, 0.1])
@pytest.mark.parametrize("rows", ROWS)
def test_two_epochs_of_rloo(rows, clip_range, device):
    update = Update(RLOO, ROWS[rows], device, n_epochs=2, clip_range=clip_range)
    sampled = update.returns(update.model)
    old = [update.log_probs(update.model, row).sum().item() for row in range(4)]
    clipped = 0
    for _ in range(2):
        # Clipped, the KL term stays that of the policy that sampled.
        present, loss = update.returns(update.model) if clip_range is None else sampled, 0.0
        for row in range(4):
            ratio = (update.log_probs(update.model, row).sum() - old[row]).exp()
            advantage = present[row] - sampled[row ^ 1]
            gain = ratio * advantage
            if clip_range is not None:
                clipped += abs(ratio.item() - 1) > clip_range
                gain = torch.minimum(gain, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
            loss = loss - gain / 4
        update.descend(loss)
    assert clip_range is None or clipped >= 2, "the example must reach the clip range"
    update.compare()


def test_one_step_of_rloo_is_reinforce_with_whole_returns(device):
    """The same seed, the same rollout; γ < 1 too."""
    for options in ({}, {"gamma": 0.9}):
        found = []
        for agent_class, more in ((RLOO, {}), (REINFORCE, {"baseline": "leave_one_out", "reward_to_go": False})):
            setup = make_setup(tiny_tree(), seed=0, num_envs=12, displaced=True, device=device)
            agent = make_agent(setup, agent_class, num_generations=3, learning_rate=0.3, **more, **options).learn(1)
            found.append(torch.cat([p.grad.flatten() for p in agent.policy.parameters()]))
        torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)
        assert found[0].norm() > 0.1


def test_pairs_share_half_the_difference_of_their_returns(device):
    """RLOO, k = 2: the mean of a pair is ½ (R₁ − R₂) (∇log π(y₁) − ∇log π(y₂))."""
    update = Update(RLOO, ROWS["mixed lengths"], device)
    returns = update.returns(update.model)
    sums = [update.log_probs(update.model, row).sum() for row in range(4)]
    loss = -sum(0.5 * (returns[i] - returns[i + 1]) * (sums[i] - sums[i + 1]) for i in (0, 2)) / 2
    update.descend(loss)
    update.compare()


@pytest.mark.parametrize("rows", ROWS)
def test_two_epochs_of_rebel(rows, device):
    """In minibatches of one pair each, of which only the order is left to chance."""
    update = Update(REBEL, ROWS[rows], device, rate=0.003, n_epochs=2, batch_size=2, eta=0.8, micro_batch_size=1)
    returns, old = update.returns(update.model), [update.log_probs(update.model, row).sum().item() for row in range(4)]
    generator = copy.deepcopy(make_agent(make_setup(tiny_tree(), seed=0, num_envs=4), REBEL).minibatch_generator)
    for _ in range(2):
        for pair in generator.permutation(2):
            i, j = 2 * pair, 2 * pair + 1
            gaps = [update.log_probs(update.model, row).sum() - old[row] for row in (i, j)]
            update.descend(((gaps[0] - gaps[1]) / 0.8 - (returns[i] - returns[j])) ** 2)
    update.compare()


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("rows", ROWS)
def test_two_epochs_of_grpo(rows, loss_type, device):
    """In minibatches of two completions, which need not be a group, with different clip ranges above and below."""
    options = {"n_epochs": 2, "batch_size": 2, "micro_batch_size": 1, "clip_range": 0.02, "clip_range_high": 0.2}
    update = Update(GRPO, ROWS[rows], device, loss_type=loss_type, rate=0.02, **options)
    lengths = [len(ids) for ids in update.completions]
    deviation = [0.5 * (update.scores[row] - update.scores[row ^ 1]) for row in range(4)]
    if loss_type != "dr_grpo":  # the standard deviation of a pair is its difference over √2
        deviation = [d / (2**0.5 * abs(d) + 1e-4) for d in deviation]
    old = [update.log_probs(update.model, row).detach() for row in range(4)]
    reference = [update.log_probs(update.reference, row).detach() for row in range(4)]
    generator = copy.deepcopy(make_agent(make_setup(tiny_tree(), seed=0, num_envs=4), REBEL).minibatch_generator)
    clipped = 0
    for _ in range(2):
        for minibatch in generator.permutation(4).reshape(2, 2):
            loss = 0.0
            for row in minibatch:
                log_probs = update.log_probs(update.model, row)
                weight = {
                    "grpo": 1 / (2 * lengths[row]),
                    "bnpo": 1 / sum(lengths[i] for i in minibatch),
                    "dr_grpo": 1 / (2 * 3),
                    "dapo": 1 / (2 * sum(lengths) / 4),
                }[loss_type]
                for t in range(lengths[row]):
                    ratio, away = (log_probs[t] - old[row][t]).exp(), (reference[row][t] - log_probs[t]).exp()
                    gain = torch.minimum(ratio * deviation[row], ratio.clamp(0.98, 1.2) * deviation[row])
                    clipped += (gain != ratio * deviation[row]).item()
                    loss = loss - weight * (gain - update.beta * (away - 1 - away.log()))
            update.descend(loss)
    assert clipped >= 2, "the example must reach the clip ranges"
    update.compare()


def test_one_step_of_grpo_without_scale_and_kl_is_a_share_of_rloo(device):
    """(G − 1)/G, its mean containing the own return, and one over the longest possible completion."""
    found = []
    for agent_class, more in ((RLOO, {}), (GRPO, {"loss_type": "dr_grpo"})):
        setup = make_setup(tiny_tree(), seed=0, num_envs=12, displaced=True, device=device)
        agent = make_agent(setup, agent_class, num_generations=3, beta=0.0, learning_rate=0.3, **more).learn(1)
        found.append(torch.cat([p.grad.flatten() for p in agent.policy.parameters()]))
    torch.testing.assert_close(found[1], found[0] * (2 / 3) / 3, atol=1e-6, rtol=1e-4)
    assert found[0].norm() > 0.1


def test_rebel_with_one_rollout_of_everything_solves_for_the_optimum(device):
    """ηβ = 1: the exact solution of the first regression is π_ref exp(r/β)/Z, whatever the policy that sampled."""
    tree = hard_tree(0, vocab_size=3, horizon=2)  # a model can be right at all of its states: no prompt begins another
    count = tree.num_completions * tree.num_prompts
    setup = make_setup(tree, seed=0, num_envs=count, displaced=True, device=device)
    options = {"num_generations": tree.num_completions, "n_epochs": 400, "eta": 1 / setup.beta}
    agent = make_agent(setup, REBEL, optimizer=torch.optim.Adam, learning_rate=lambda left: 0.003, **options)
    generate_ids = agent.policy.generate_ids
    agent.policy.generate_ids = lambda *args, **settings: with_completions(
        agent.policy, generate_ids(*args, **settings), tree, list(range(tree.num_completions)) * tree.num_prompts
    )
    solution = soft_solution(tree, setup.reference_policy(), setup.beta)
    before = total_variation(tree, agent.policy, solution.policy).max()
    agent.learn(1)
    assert before > 0.4
    assert total_variation(tree, agent.policy, solution.policy).max() < 0.01


def stale_rollout(update_class, setup, behaviour, **options):
    """An agent at the setup's model, and every completion of every prompt as a rollout of `behaviour`, with its probability."""
    agent = make_agent(setup, update_class, num_generations=setup.tree.num_completions, beta=setup.beta, **options)
    tree, sampler = setup.tree, CausalLMPolicy(behaviour, setup.tokenizer, device=setup.model.device)
    agent.kl_shaping[0].set_policy(sampler)
    agent.collector.policy = sampler
    generate_ids = sampler.generate_ids
    sampler.generate_ids = lambda *args, **settings: with_completions(
        sampler, generate_ids(*args, **settings), tree, list(range(tree.num_completions)) * tree.num_prompts
    )
    rollout = agent.collector.walk(np.repeat(np.arange(tree.num_prompts), tree.num_completions), agent.sampling_generator)
    return agent, rollout, rollout.log_probs.sum(1).exp()


@pytest.mark.filterwarnings("ignore::textgym.errors.TrainingWarning")  # the samples are another policy's, which is the point
@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "clipped"])
def test_stale_samples_of_rloo_are_unbiased_without_clipping(biased, device):
    """E over all completions of an older policy, any baseline: ∇J of the present one exactly, its KL term included."""
    from textgym.exact.models import tiny_lm

    tree = tiny_tree()
    setup = make_setup(tree, seed=0, num_envs=tree.num_completions * tree.num_prompts, displaced=True, device=device)
    behaviour = tiny_lm(tree, seed=7).to(device)
    agent, rollout, probabilities = stale_rollout(RLOO, setup, behaviour, n_epochs=2, clip_range=0.2 if biased else None)
    rewards = agent.shaped_rewards(rollout)
    agent.policy.zero_grad()
    for row, weight in enumerate(probabilities.tolist()):
        rows = torch.tensor([row], device=rollout.lengths.device)
        batch = rollout.select(rows)
        width = batch.completion_ids.shape[1]
        baseline = torch.tensor([math.pi], device=rewards.device)
        (weight * agent.loss(batch, rewards[rows, :width], baseline, batch.log_probs, sequences=tree.num_prompts)).backward()
    found = -torch.cat([p.grad.flatten() for p in agent.policy.model.parameters()]).double().cpu()
    error = relative_error(found, exact_setup_gradient(setup))
    assert error > 0.05 if biased else error < 1e-4
