"""Whole updates of the agents against a second implementation: one completion at a time, token by token, in plain Python.

What an expected gradient cannot show is here: which baseline was taken (any is unbiased), the critic's targets, clipping and importance
weights from the second epoch on.
"""

import copy
import math

import pytest
import torch

from textgym.agents import PPO, REINFORCE, CausalLMPolicy
from textgym.exact import TokenTree
from textgym.exact.certification import make_setup, with_completions

STEP = 0.3  # large enough for ratios beyond the clip range
CLIP, GAMMA, LAMBDA, VALUE_COEFFICIENT, ENTROPY_COEFFICIENT = 0.1, 0.9, 0.8, 0.7, 0.2


@pytest.fixture(params=[(0, 3, 2, 1), (1, 2, 3, 3)], ids=["mixed lengths", "another batch"])
def rows(request):
    """Which completions the four rows of the rollout are."""
    return request.param


class Update:
    """One rollout of an agent on given completions, `agent.learn` included, and what the second implementation needs."""

    def __init__(self, agent_class, rows, device, **options):
        tree = TokenTree(2, 3, 1, [[0], [0, 0]], lambda i, y: math.sin(3 * len(y) + 2 * sum(y) + i) + 3 * i)
        setup = make_setup(tree, seed=0, num_envs=4, displaced=True, device=device)
        policy = CausalLMPolicy(setup.model, setup.tokenizer, device=device)
        self.reference = copy.deepcopy(setup.reference)
        reference = CausalLMPolicy(setup.reference, setup.tokenizer, device=device).reference()
        self.agent = agent_class(
            policy,
            setup.envs,
            beta=setup.beta,
            reference=reference,
            seed=0,
            num_generations=2,
            learning_rate=STEP,
            max_grad_norm=None,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
            gamma=GAMMA,
            **options,
        )
        if self.agent.critic is not None:
            torch.manual_seed(1)
            torch.nn.init.normal_(self.agent.critic.network.head.output.weight, std=0.3)
        self.model, self.critic = copy.deepcopy(setup.model), copy.deepcopy(self.agent.critic)
        self.beta, self.device, self.prompts = setup.beta, device, []
        generate_ids = policy.generate_ids

        def given(prompt_ids, prompt_lengths, *args, **settings):
            generation = with_completions(policy, generate_ids(prompt_ids, prompt_lengths, *args, **settings), tree, rows)
            for ids, length in zip(generation.prompt_ids.tolist(), generation.prompt_lengths.tolist(), strict=True):
                self.prompts.append(ids[len(ids) - length :])
            return generation

        policy.generate_ids = given
        self.agent.learn(1)
        self.completions = [list(tree.ids(j)) for j in rows]
        self.scores = [tree.rewards[tree.prompts.index(tuple(p)), j] for p, j in zip(self.prompts, rows, strict=True)]

    def log_probs(self, model, row):
        """log π of the tokens of a row, as a list of scalars, and the entropies."""
        prompt, ids = self.prompts[row], self.completions[row]
        logits = model(input_ids=torch.tensor([prompt + ids], device=self.device)).logits[0].log_softmax(-1)
        states = [logits[len(prompt) - 1 + t] for t in range(len(ids))]
        return [state[token] for state, token in zip(states, ids, strict=True)], [-(s.exp() * s).sum() for s in states]

    def values(self, row):
        prompt, ids = self.prompts[row], self.completions[row]
        tensors = (torch.tensor(part, device=self.device) for part in ([prompt], [len(prompt)], [ids], [len(ids)]))
        return list(self.critic.network(*tensors)[0])

    def rewards(self, row):
        old, _ = self.log_probs(self.model, row)
        reference, _ = self.log_probs(self.reference, row)
        rewards = [-self.beta * (p - q).item() for p, q in zip(old, reference, strict=True)]
        rewards[-1] += self.scores[row]
        return rewards

    def descend(self, loss):
        networks = [self.model] + ([self.critic] if self.critic is not None else [])
        parameters = [p for network in networks for p in network.parameters()]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter -= STEP * gradient

    def compare(self):
        pairs = [(self.agent.policy.model, self.model)] + ([(self.agent.critic, self.critic)] if self.critic is not None else [])
        for found, expected in pairs:
            for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def to_go(rewards, t):
    return sum(GAMMA ** (u - t) * rewards[u] for u in range(t, len(rewards)))


def others_mean(returns, row, t):
    """Leave-one-out in a group of two: the partner's return-to-go at t, or at its last token if it ended before."""
    partner = returns[row ^ 1]
    return partner[min(t, len(partner) - 1)]


@pytest.mark.parametrize("value_clip", [None, 0.05])
@pytest.mark.parametrize("reduction", ["sequence_sum", "token_mean"])
def test_two_epochs_of_ppo(rows, reduction, value_clip, device):
    update = Update(
        PPO,
        rows,
        device,
        critic="separate",
        n_epochs=2,
        gae_lambda=LAMBDA,
        clip_range=CLIP,
        clip_range_vf=value_clip,
        vf_coef=VALUE_COEFFICIENT,
        ent_coef=ENTROPY_COEFFICIENT,
        loss_reduction=reduction,
    )
    old, targets, advantages, old_values = [], [], [], []
    for row in range(4):
        rewards, values = update.rewards(row), [v.item() for v in update.values(row)]
        deltas = [r + GAMMA * following - v for r, v, following in zip(rewards, values, [*values[1:], 0.0], strict=True)]
        advantages.append([sum((GAMMA * LAMBDA) ** (u - t) * deltas[u] for u in range(t, len(deltas))) for t in range(len(deltas))])
        targets.append([a + v for a, v in zip(advantages[row], values, strict=True)])
        old.append([p.item() for p in update.log_probs(update.model, row)[0]])
        old_values.append(values)
    count = 4 if reduction == "sequence_sum" else sum(len(ids) for ids in update.completions)
    clipped = 0
    for _ in range(2):
        loss = 0.0
        for row in range(4):
            log_probs, entropies = update.log_probs(update.model, row)
            values = update.values(row)
            for t in range(len(log_probs)):
                ratio, advantage = (log_probs[t] - old[row][t]).exp(), advantages[row][t]
                clipped += abs(ratio.item() - 1) > CLIP
                error = (values[t] - targets[row][t]) ** 2
                if value_clip is not None:
                    near = old_values[row][t] + (values[t] - old_values[row][t]).clamp(-value_clip, value_clip)
                    error = torch.maximum(error, (near - targets[row][t]) ** 2)
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
                loss = loss + (-surrogate + VALUE_COEFFICIENT * 0.5 * error - ENTROPY_COEFFICIENT * entropies[t]) / count
        update.descend(loss)
    assert clipped >= 2, "the example must reach the clip range"
    update.compare()


@pytest.mark.parametrize("importance", ["cumulative", "truncated", "token"])
def test_two_epochs_of_reinforce_with_leave_one_out(rows, importance, device):
    update = Update(
        REINFORCE, rows, device, baseline="leave_one_out", n_epochs=2, importance=importance, max_weight=1.05, ent_coef=ENTROPY_COEFFICIENT
    )
    sampled = [update.rewards(row) for row in range(4)]
    returns = [[to_go(rewards, t) for t in range(len(rewards))] for rewards in sampled]
    old = [[p.item() for p in update.log_probs(update.model, row)[0]] for row in range(4)]
    for _ in range(2):
        loss = 0.0
        for row in range(4):
            log_probs, entropies = update.log_probs(update.model, row)
            ratios = [math.exp(p.item() - q) for p, q in zip(log_probs, old[row], strict=True)]
            weights = [math.prod(ratios[: t + 1]) for t in range(len(ratios))]
            if importance == "truncated":
                weights = [min(w, 1.05) for w in weights]
            rewards = [r - update.beta * math.log(ratio) for r, ratio in zip(sampled[row], ratios, strict=True)]
            for t in range(len(log_probs)):
                baseline = others_mean(returns, row, t)
                if importance == "token":
                    advantage = ratios[t] * (to_go(rewards, t) - baseline)
                else:
                    advantage = to_go([w * r for w, r in zip(weights, rewards, strict=True)], t) - weights[t] * baseline
                loss = loss - (log_probs[t] * advantage + ENTROPY_COEFFICIENT * entropies[t]) / 4
        update.descend(loss)
    update.compare()


def test_one_step_of_reinforce_with_a_critic(rows, device):
    update = Update(REINFORCE, rows, device, baseline="value", critic="separate", vf_coef=VALUE_COEFFICIENT)
    loss = 0.0
    for row in range(4):
        rewards, values = update.rewards(row), update.values(row)
        for t, log_prob in enumerate(update.log_probs(update.model, row)[0]):
            advantage = to_go(rewards, t) - values[t].item()
            loss = loss + (-advantage * log_prob + VALUE_COEFFICIENT * 0.5 * (values[t] - to_go(rewards, t)) ** 2) / 4
    update.descend(loss)
    update.compare()


@pytest.mark.parametrize("baseline", ["batch_mean", "leave_one_out", "moving_average", "none"])
def test_one_step_of_reinforce_with_whole_returns(rows, baseline, device):
    update = Update(REINFORCE, rows, device, baseline=baseline, reward_to_go=False)
    returns = [to_go(update.rewards(row), 0) for row in range(4)]
    loss = 0.0
    for row in range(4):
        others = {"batch_mean": [0, 1, 2, 3], "leave_one_out": [row, row ^ 1], "moving_average": [row], "none": [row]}[baseline]
        mean = sum(returns[j] for j in others if j != row) / max(len(others) - 1, 1)  # the moving average starts at 0
        loss = loss - (returns[row] - mean) * sum(update.log_probs(update.model, row)[0]) / 4
    update.descend(loss)
    update.compare()


def test_groups_share_a_prompt(rows, device):
    """Neighbouring rows of a rollout are the completions of one prompt."""
    prompts = Update(REINFORCE, rows, device, baseline="leave_one_out").prompts
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
