"""PPO-ptx: the pretraining term by hand and exactly, its order in a checkpoint, and what it is for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from textgym.agents import PPO, CausalLMPolicy
from textgym.agents.common.pretraining import PretrainingMix
from textgym.exact import TokenTree, expected_reward
from textgym.exact.certification import exact_setup_gradient, expected_gradient, make_setup

TEXTS = [[2, 3, 2, 3, 2, 3], [3, 1, 3], [2, 4], [3, 3, 1, 1, 3], [2, 2, 0, 1]]


def log_probs_by_hand(model: Any, ids: list[int]) -> torch.Tensor:
    """log π(x_t|x_{<t}) for t ≥ 2, from the model itself at temperature 1."""
    logits = model(torch.tensor([ids], device=model.device)).logits[0].log_softmax(-1)
    return torch.stack([logits[t, token] for t, token in enumerate(ids[1:])])


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_the_loss_is_the_mean_over_all_tokens_of_the_batch(task, micro_batch_size: int | None) -> None:
    policy = task.policy(temperature=0.5, top_k=2)  # of no concern: the texts are the model's
    mix = PretrainingMix(policy, TEXTS, 0.7, batch_size=5, seed=0)
    logger = PPO(policy, task.envs(), seed=0).logger
    losses = list(mix.losses(policy, micro_batch_size, logger))
    assert len(losses) == {None: 1, 1: 5, 2: 3}[micro_batch_size]
    terms = torch.cat([log_probs_by_hand(policy.model, ids) for ids in TEXTS])
    assert len(terms) == 15
    torch.testing.assert_close(sum(losses), -0.7 * terms.mean(), atol=1e-5, rtol=1e-4)
    assert logger.name_to_value["train/ptx_loss"] == pytest.approx(-terms.mean().item(), abs=1e-4)


def test_texts_are_read_by_the_policys_tokenizer_and_taken_in_turn(task) -> None:
    policy = task.policy()
    words = ["w2 w3 w2", "w3 w1 </s>", "w1 w1"]
    mix = PretrainingMix(policy, words, 1.0, batch_size=2, seed=0)
    assert mix.rows == [[2, 3, 2], [3, 1, 4], [1, 1]]
    logger = PPO(policy, task.envs(), seed=0).logger
    seen = []
    mix.order.take = lambda count, take=mix.order.take: seen.extend(take(count)) or seen[-count:]  # type: ignore[method-assign]
    for _ in range(3):
        list(mix.losses(policy, None, logger))
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]


def test_expected_gradient_is_that_of_ppo_plus_that_of_the_texts(device) -> None:
    """Exactly: PPO's by giving it every completion with its probability, the other by differentiating the mean log-probability."""
    tree = TokenTree(2, 3, 1, [[0], [0, 0]], lambda i, y: float(len(y)) + 3 * i)
    setup = make_setup(tree, seed=0, num_envs=1, displaced=True, device=device)
    texts = [[0, 1, 1, 0], [1, 0]]

    def make(setup: Any) -> PPO:
        policy = CausalLMPolicy(setup.model, setup.tokenizer, device=device)
        reference = CausalLMPolicy(setup.reference, setup.tokenizer, device=device).reference()
        mix = {"ptx_coef": 2.5, "ptx_texts": texts, "ptx_batch_size": 2}
        plain = {"beta": setup.beta, "n_epochs": 1, "gae_lambda": 1.0, "max_grad_norm": None, "learning_rate": 1e-3, "micro_batch_size": 1}
        return PPO(policy, setup.envs, reference=reference, seed=0, **plain, **mix)

    found = expected_gradient(make, setup)
    mean = torch.cat([log_probs_by_hand(setup.model, ids) for ids in texts]).mean()
    of_texts = torch.cat([g.flatten() for g in torch.autograd.grad(mean, list(setup.model.parameters()))]).double().cpu()
    of_ppo = exact_setup_gradient(setup)
    assert ((found - of_ppo - 2.5 * of_texts).norm() / of_ppo.norm()).item() < 1e-4
    assert (2.5 * of_texts).norm() > 0.1 * of_ppo.norm()


def parameters(agent: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in agent.trainable_parameters()])


class SaveAt(BaseCallback):
    """Saves the agent before a rollout."""

    def __init__(self, rollout: int, path: Path) -> None:
        super().__init__()
        self.left, self.path = rollout, path

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.left == 0:
            self.model.save(self.path)
        self.left -= 1


def test_a_resumed_run_goes_on_with_the_next_texts(task, tmp_path: Path) -> None:
    mix = {"ptx_coef": 1.0, "ptx_texts": TEXTS, "ptx_batch_size": 3}
    whole = PPO(task.policy(), task.envs(), 1e-3, seed=1, n_epochs=2, **mix).learn(600, callback=SaveAt(3, tmp_path))
    with pytest.raises(ValueError, match="`ptx_texts` must be given"):
        PPO.load(tmp_path, env=task.envs(), device=task.device)
    with pytest.raises(ValueError, match="the 5 texts"):
        PPO.load(tmp_path, env=task.envs(), device=task.device, ptx_texts=TEXTS[:4])
    resumed = PPO.load(tmp_path, env=task.envs(), device=task.device, ptx_texts=TEXTS)
    assert resumed.num_timesteps < 600
    resumed.learn(600 - resumed.num_timesteps, reset_num_timesteps=False)
    assert torch.equal(parameters(resumed), parameters(whole))
    without = PPO(task.policy(), task.envs(), 1e-3, seed=1, n_epochs=2).learn(600)
    assert not torch.equal(parameters(without), parameters(whole))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no texts": ({"ptx_coef": 1.0}, "`ptx_texts` must be given if and only if"),
    "no coefficient": ({"ptx_texts": TEXTS}, "`ptx_texts` must be given if and only if"),
    "negative": ({"ptx_coef": -1.0, "ptx_texts": TEXTS}, "`ptx_coef`"),
    "batch": ({"ptx_coef": 1.0, "ptx_texts": TEXTS, "ptx_batch_size": 0}, "`ptx_batch_size`"),
    "a string": ({"ptx_coef": 1.0, "ptx_texts": "w1 w2"}, "non-empty list"),
    "none": ({"ptx_coef": 1.0, "ptx_texts": []}, "non-empty list"),
    "one token": ({"ptx_coef": 1.0, "ptx_texts": ["w1 w2", "w1"]}, "number 1 has 1"),
    "too long": ({"ptx_coef": 1.0, "ptx_texts": [[1] * 7]}, "from 2 to 6 tokens"),
    "no such id": ({"ptx_coef": 1.0, "ptx_texts": [[1, 5]]}, "ids from 0 to 4"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(task, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPO(task.policy(), task.envs(), **arguments)


def pretrained(task: Any, texts: list[list[int]]) -> CausalLMPolicy:
    """A policy that knows `texts`."""
    policy = task.policy()
    mix = PretrainingMix(policy, texts, 1.0, len(texts), seed=0)
    logger = PPO(policy, task.envs(), seed=0).logger
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        sum(mix.losses(policy, None, logger)).backward()
        optimizer.step()
    return policy


@pytest.mark.slow
def test_the_texts_stay_likely_where_ppo_forgets_them(task) -> None:
    """The same number of rewards for both; the model was trained on the texts before, and they begin as no prompt does."""
    texts = [[2, 3, 2, 3, 2, 3], [3, 1, 3, 1, 3, 1], [2, 2, 4]]
    gains, nats = {}, {}
    for name, mix in {"ppo": {}, "ptx": {"ptx_coef": 3.0, "ptx_texts": texts, "ptx_batch_size": 3}}.items():
        gains[name], nats[name] = [], []
        for seed in range(4):
            policy = pretrained(task, texts)
            start = expected_reward(task.tree, policy).mean()
            assert text_loss(policy, texts) < 0.3
            task.reward.rows = 0
            agent = PPO(policy, task.envs(96), 2e-3, beta=0.05, batch_size=48, gae_lambda=1.0, seed=seed, **mix)
            for _ in range(40):
                agent.learn(1, reset_num_timesteps=False, log_interval=0)
            assert task.reward.rows == 40 * 96
            gains[name].append(expected_reward(task.tree, policy).mean() - start)
            nats[name].append(text_loss(policy, texts))
    # On six seeds: 2.5 to 6.6 nats per token without the texts, 0.12 with them as at the start. The gain differs much from seed to seed,
    # 0.01 to 1.52 without and 0.73 to 1.15 with them; the means over four are 0.87 and 0.98.
    assert min(nats["ppo"]) > 1.0 and max(nats["ptx"]) < 0.3
    assert np.mean(gains["ptx"]) > 0.8 * np.mean(gains["ppo"]) > 0.4


def text_loss(policy: CausalLMPolicy, texts: list[list[int]]) -> float:
    """Nats per token of the texts."""
    with torch.no_grad():
        return -float(torch.cat([log_probs_by_hand(policy.model, ids) for ids in texts]).mean())
