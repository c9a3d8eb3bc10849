"""The expected first step of DQN against its own exact form: every completion enumerated, targets from backward induction or by hand.

DQN's gradient is not ∇J, so a second implementation stands in: log-probs by `model_score`, V from the critic, all of it in plain torch.
"""

import copy
import math

import pytest
import torch

from textgym.agents import DQN, CausalLMPolicy
from textgym.exact import TokenTree
from textgym.exact.certification import expected_gradient, make_setup
from textgym.exact.gradients import model_score

GAMMA, SCALE = 0.9, 0.6
CASES = {
    "path": {"consistency": "path"},
    "path of two": {"consistency": "path", "n_steps": 2},
    "one step": {"consistency": "one_step"},
    "hard": {"n_steps": 1},
    "hard, two steps": {"n_steps": 2},
    "hard, not double": {"n_steps": 1, "double_q": False},
}


def tiny_tree() -> TokenTree:
    """Four completions, two prompts."""
    return TokenTree(2, 3, 1, [[0], [0, 0]], lambda i, y: math.sin(3 * len(y) + 2 * sum(y) + i) + 3 * i)


def make(setup, soft, options):
    """The agent at a policy far from its reference, with a random critic and a target network that is elsewhere again."""
    policy = CausalLMPolicy(setup.model, setup.tokenizer, device=setup.model.device)
    reference = CausalLMPolicy(setup.reference, setup.tokenizer, device=setup.model.device).reference()
    kind = {"beta": setup.beta} if soft else {"advantage_scale": SCALE, "exploration_initial_eps": 0.0, "exploration_final_eps": 0.0}
    agent = DQN(
        policy, setup.envs, 1e-3, reference=reference, gamma=GAMMA, critic="separate", max_grad_norm=None, seed=0, batch_size=1,
        learning_starts=0, **kind, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.nn.init.normal_(agent.critic.network.head.output.weight, std=0.3)
    if agent.target is not None:
        for tensor in agent.target.tensors().values():
            tensor.add_(0.1 * torch.randn(tensor.shape).to(tensor))
    return agent


def forget(agent) -> None:
    """The next rollout is learned from alone."""
    agent.replay.size = agent.replay.position = 0


class Model:
    """log π(·|s) and V(s), one state at a time."""

    def __init__(self, model, trunk, head) -> None:
        self.model, self.trunk, self.head = model, trunk, head

    def log_probs(self, ids):
        return self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits[0, -1].log_softmax(-1)

    def value(self, ids):
        return self.head(self.trunk(input_ids=torch.tensor([ids], device=self.model.device)).last_hidden_state[0, -1])


def lagged(agent, setup) -> Model:
    copies = {"policy": copy.deepcopy(agent.policy), "critic": copy.deepcopy(agent.critic)}
    for part, module in copies.items():
        for name, parameter in module.named_parameters():
            parameter.data = agent.target.tensors()[f"{part}.{name}"].clone()
    return Model(copies["policy"].model, copies["critic"].network.trunk, copies["critic"].network.head)


def loss_of(online, target, reference, prompt, ids, reward, beta, options):
    """The loss of one completion, written down from the docstring of `DQN`."""
    states = [[*prompt, *ids[:t]] for t in range(len(ids))]
    log_probs = [online.log_probs(state)[token] for state, token in zip(states, ids, strict=True)]
    values = [online.value(state) for state in states]
    rewards = [0.0] * (len(ids) - 1) + [reward]
    ratios = [p - reference.log_probs(s)[a].detach() for p, s, a in zip(log_probs, states, ids, strict=True)]
    total = 0.0
    for t in range(len(ids)):
        end = min(t + (options.get("n_steps") or 99), len(ids))
        if options.get("consistency") == "path":
            path = sum(GAMMA ** (k - t) * (rewards[k] - beta * ratios[k]) for k in range(t, end))
            after = GAMMA ** (end - t) * values[end] if end < len(ids) else 0.0
            residual = -values[t] + path + after
        elif options.get("consistency") == "one_step":
            after = GAMMA * target.value(states[t + 1]).detach() if t + 1 < len(ids) else 0.0
            residual = values[t] + beta * ratios[t] - rewards[t] - after
        else:
            after = 0.0
            if end < len(ids):
                lagged_log_probs = target.log_probs(states[end]).detach()
                chooser = online.log_probs(states[end]) if options.get("double_q", True) else lagged_log_probs
                after = target.value(states[end]).detach() + SCALE * lagged_log_probs[chooser.argmax()]
            goal = sum(GAMMA ** (k - t) * rewards[k] for k in range(t, end)) + GAMMA ** (end - t) * after
            residual = values[t] + SCALE * log_probs[t] - goal
        total = total + 0.5 * residual**2
    return total


@pytest.mark.parametrize("name", CASES)
def test_expected_first_step_is_the_exact_one(name, device):
    options = CASES[name]
    soft = "consistency" in options
    tree = tiny_tree()
    setup = make_setup(tree, seed=0, num_envs=1, displaced=True, device=device)
    made = []

    def factory(given):
        made.append(make(given, soft, options))
        return made[0]

    found = expected_gradient(factory, setup, before_rollout=forget)
    agent = made[0]
    online = Model(setup.model, agent.critic.network.trunk, agent.critic.network.head)
    target = None if agent.target is None else lagged(agent, setup)
    reference = Model(setup.reference, None, None)
    with torch.no_grad():
        score = model_score(setup.model)
        weights = score(*(torch.as_tensor(part, device=device) for part in tree.batch())).sum(1).exp().view(tree.num_prompts, -1)
    expected = 0.0
    for i, prompt in enumerate(tree.prompts):
        for j in range(tree.num_completions):
            one = loss_of(online, target, reference, list(prompt), list(tree.ids(j)), float(tree.rewards[i, j]), setup.beta, options)
            expected = expected + weights[i, j] * one / tree.num_prompts
    gradients = torch.autograd.grad(expected, list(setup.model.parameters()), allow_unused=True)
    exact = -torch.cat([g.reshape(-1) for g in gradients]).double().cpu()
    assert float((found - exact).norm() / exact.norm()) < 1e-4
