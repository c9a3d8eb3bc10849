"""Trained to the end on a small hard tree, an agent is at π*: one seed of what `benchmarks/certify.py` does in full."""

import pytest
import torch

from textgym.agents import PPO, REINFORCE, CausalLMPolicy
from textgym.exact import hard_tree
from textgym.exact.certification import FixedPoint, certify_fixed_point

SEED = 0
BOUND = 0.03  # of the total variation; the agents below end at a third of it or less


def quick_adam(parameters):
    return torch.optim.Adam(parameters, lr=0.0, betas=(0.8, 0.95), eps=1e-5)


CRITIC = {"critic": "separate", "critic_learning_rate": lambda left: 5e-3 * left}
# name: (class, options, tokens)
AGENTS = {
    "PPO": (PPO, CRITIC | {"n_epochs": 2}, 25_000),
    "REINFORCE, leave-one-out": (REINFORCE, {"baseline": "leave_one_out", "num_generations": 8, "reward_to_go": False}, 25_000),
    "REINFORCE, value": (REINFORCE, CRITIC | {"baseline": "value"}, 30_000),
}


def train(name: str, device: str, beta_factor: float = 1.0) -> FixedPoint:
    """Trains an agent; `beta_factor` makes a wrong one, for another β than the one it is measured at."""
    agent_class, options, tokens = AGENTS[name]

    def make(setup):
        policy = CausalLMPolicy(setup.model, setup.tokenizer, device=device)
        reference = CausalLMPolicy(setup.reference, setup.tokenizer, device=device).reference()
        return agent_class(
            policy,
            setup.envs,
            learning_rate=lambda left: 3e-3 * left,
            beta=setup.beta * beta_factor,
            reference=reference,
            seed=setup.seed,
            max_grad_norm=None,
            optimizer=quick_adam,
            **options,
        )

    tree = hard_tree(SEED, vocab_size=3, horizon=2)
    return certify_fixed_point(make, seed=SEED, num_envs=192, total_timesteps=tokens, tree=tree, device=device)


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_the_trained_policy_is_the_optimal_one(name, device):
    point = train(name, device)
    assert min(point.start) > 0.3
    assert point.worst < BOUND
    assert point.optimum - 0.01 < point.objective <= point.optimum
    assert point.kl == pytest.approx(point.optimal_kl, rel=0.05)


@pytest.mark.slow
def test_a_wrong_beta_ends_elsewhere(device):
    """The measure itself: who trains just as well for twice the penalty is far from π*."""
    assert train("REINFORCE, leave-one-out", device, beta_factor=2.0).worst > 3 * BOUND
