"""NLPO as a user meets it: refreshes, checkpoints, LoRA, arguments. Its numbers are in certification/test_nlpo_exact.py."""

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from peft import LoraConfig
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from textgym.agents import NLPO, PPO, CausalLMPolicy
from textgym.agents.common.sampling import Sampling, TokenRule, count_kept, pack_kept
from textgym.exact import TokenTree, restrict, soft_solution, total_variation
from textgym.exact.models import tiny_lm

MASK = {"top_p": 0.6, "min_tokens_to_keep": 1}


def make(task: Any, **options: Any) -> NLPO:
    return NLPO(task.policy(), task.envs(), **({"learning_rate": 1e-3, "seed": 1} | MASK | options))


def parameters(module: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class AtRollouts(BaseCallback):
    """Calls a function before every rollout."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.function(self.model)


@pytest.mark.parametrize("interval", [1, 3, None])
def test_the_mask_is_refreshed_at_its_interval(task, interval: int | None) -> None:
    agent = make(task, mask_refresh_interval=interval)
    masks, policies, ages = [], [], []

    def note(agent: NLPO) -> None:
        masks.append(parameters(agent.mask.model))
        policies.append(parameters(agent.policy))
        ages.append(agent.mask_age)

    agent.learn(700, callback=AtRollouts(note))
    assert len(masks) > 6
    for iteration, mask in enumerate(masks):
        last_refresh = 0 if interval is None else iteration - iteration % interval
        assert ages[iteration] == iteration - last_refresh
        assert torch.equal(mask, policies[last_refresh])
        assert iteration == last_refresh or not torch.equal(mask, policies[iteration])


def test_age_and_size_of_the_mask_are_logged(task) -> None:
    agent = make(task, mask_refresh_interval=None)
    rollouts = []

    class Keep(AtRollouts):
        def _on_rollout_end(self) -> None:
            rollouts.append(self.locals["rollout"])

    agent.learn(200, callback=Keep(lambda _: None), log_interval=0)
    assert agent.logger.name_to_value["train/mask_age"] == len(rollouts) - 1 > 0
    bits = np.unpackbits(rollouts[-1].kept.cpu().numpy(), axis=-1).sum(-1)
    size = bits[rollouts[-1].completion_mask.cpu().numpy()].mean()
    assert agent.logger.name_to_value["train/mask_size"] == pytest.approx(size)
    assert 1 < size < task.tree.vocab_size


def test_a_resumed_run_equals_an_uninterrupted_one(task, tmp_path: Path) -> None:
    """Saved between two refreshes, so that the copy is neither the policy's start nor its present."""
    whole = make(task, learning_rate=LinearSchedule(1e-3, 0.0, 1.0), batch_size=8, mask_refresh_interval=3)
    rollouts = []

    def save_before_the_sixth(agent: NLPO) -> None:
        rollouts.append(None)
        if len(rollouts) == 6:
            agent.save(tmp_path)

    whole.learn(1000, callback=AtRollouts(save_before_the_sixth))
    resumed = NLPO.load(tmp_path, env=task.envs(), device=task.device)
    assert resumed.mask_age == 2 and resumed.num_timesteps < 1000
    assert not torch.equal(parameters(resumed.mask.model), parameters(resumed.policy))
    assert (resumed.top_p, resumed.min_tokens_to_keep, resumed.mask_refresh_interval) == (0.6, 1, 3)
    resumed.learn(1000 - resumed.num_timesteps, reset_num_timesteps=False)
    assert torch.equal(parameters(resumed.policy), parameters(whole.policy))
    assert torch.equal(parameters(resumed.mask.model), parameters(whole.mask.model))


def test_generation_is_masked_until_the_mask_is_taken_off(task, tmp_path: Path) -> None:
    """What is saved for transformers is the model; a checkpoint has the mask too, and `policy.mask` is it."""
    agent = make(task, mask_refresh_interval=2).learn(300)
    prompts = task.tree.prompt_texts
    masked = agent.policy.generate(prompts, 3, num_generations=64, seed=0)
    assert masked.kept is not None
    agent.save(tmp_path)
    again = NLPO.load(tmp_path, device=task.device).policy.generate(prompts, 3, num_generations=64, seed=0)
    assert torch.equal(again.ids, masked.ids) and torch.equal(again.kept, masked.kept)
    model = CausalLMPolicy.from_pretrained(tmp_path / "model", device=task.device)
    plain = model.generate(prompts, 3, num_generations=64, seed=0)
    assert plain.kept is None and not torch.equal(plain.ids, masked.ids)
    by_hand = model.generate(prompts, 3, num_generations=64, seed=0, action_mask=agent.mask.masker())
    assert torch.equal(by_hand.ids, masked.ids)
    agent.policy.mask = None
    assert torch.equal(agent.policy.generate(prompts, 3, num_generations=64, seed=0).ids, plain.ids)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks transformers for its old name
def test_the_copy_of_a_lora_policy_is_its_adapter(task, tmp_path: Path) -> None:
    base = CausalLMPolicy(tiny_lm(task.tree), task.tree.tokenizer(), device=task.device)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, fan_in_fan_out=True)
    torch.manual_seed(0)
    policy = CausalLMPolicy.from_pretrained(tmp_path / "base", lora=config, device=task.device)
    agent = NLPO(policy, task.envs(), learning_rate=1e-2, seed=1, mask_refresh_interval=2, **MASK)
    own = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    twins = zip(policy.model.named_parameters(), agent.mask.model.model.named_parameters(), strict=True)
    for (name, parameter), (_, twin) in twins:
        assert (parameter is twin) == (name not in own)
    assert set(agent.extra_tensors()) == own and own
    agent.learn(32 * 3 * 3)
    agent.save(tmp_path / "agent")
    loaded = NLPO.load(tmp_path / "agent", env=task.envs(), device=task.device)
    for name, tensor in agent.extra_tensors().items():
        assert torch.equal(tensor, loaded.extra_tensors()[name])
    goes_on = agent.learn(100, reset_num_timesteps=False)
    also = loaded.learn(100, reset_num_timesteps=False)
    for a, b in zip(goes_on.policy.parameters(), also.policy.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", [{"micro_batch_size": 5}, {"micro_batch_size": 1}])
def test_micro_batches_change_no_gradient(task, change: dict[str, int]) -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.0)

    plain, split = (make(task, optimizer=sgd, max_grad_norm=None, **extra).learn(1) for extra in ({}, change))
    torch.testing.assert_close(parameters(split.policy), parameters(plain.policy), atol=1e-6, rtol=1e-5)


def test_the_environments_end_tokens_are_legal(task) -> None:
    """Also after the environment was exchanged for one with other end tokens, and the policy's were."""
    agent = make(task, top_p=0.1)
    assert agent.mask.rule.always == (task.tree.eos_token_id,)
    agent.policy.eos_token_ids = (0, 4)
    arguments = task.arguments() | {"reward": lambda completions, **columns: [0.0] * len(completions), "eos_token_ids": [0, 4]}
    agent.set_env(gym.make_vec("TextGen-v0", num_envs=32, **arguments))
    assert agent.mask.rule.always == (0, 4)
    rollout = agent.collector.walk(np.arange(32) % 3, agent.sampling_generator)
    sets = np.unpackbits(rollout.kept.cpu().numpy(), axis=-1, bitorder="little")[rollout.completion_mask.cpu().numpy()]
    assert sets[:, [0, 4]].all() and not sets[:, 1:4].all()


def test_the_default_floor_fits_the_vocabulary(task) -> None:
    assert make(task, min_tokens_to_keep=None).min_tokens_to_keep == 1


BAD = {
    "top_p": ({"top_p": 0.0}, "`top_p`"),
    "more than everything": ({"top_p": 1.5}, "`top_p`"),
    "floor": ({"min_tokens_to_keep": 0}, "`min_tokens_to_keep`"),
    "floor above V": ({"min_tokens_to_keep": 6}, "`min_tokens_to_keep` must be .* at most 5"),
    "interval": ({"mask_refresh_interval": 0}, "`mask_refresh_interval`"),
    "one of PPO's": ({"n_epochs": 0}, "`n_epochs`"),
    "unknown": ({"target_update_iterations": 20}, "NLPO has no argument `target_update_iterations`. It has: .*top_p, .*n_epochs, "),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(task, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(task, **arguments)


def test_a_policy_has_one_mask(task) -> None:
    agent = make(task)
    for agent_class in (NLPO, PPO):
        with pytest.raises(ValueError, match=r"policy\.mask = None"):
            agent_class(agent.policy, task.envs())
    assert agent.policy.reference().mask is None
    assert copy.deepcopy(agent.policy).mask is not None


def test_an_agent_that_is_refused_leaves_no_mask(task) -> None:
    policy = task.policy()
    with pytest.raises(ValueError, match="`env`"):
        NLPO(policy, 3, **MASK)
    assert policy.mask is None


def test_the_rule_by_hand() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.97, 0.01, 0.01, 0.01]]).log()
    cases = [
        (TokenRule(Sampling(top_p=0.6)), [[1, 1, 0, 0], [1, 0, 0, 0]]),
        (TokenRule(Sampling(top_p=0.6), always=[3]), [[1, 1, 0, 1], [1, 0, 0, 1]]),
        (TokenRule(Sampling(top_p=0.6), 3), [[1, 1, 1, 0], [1, 1, 1, 1]]),  # equal probabilities share one fate
        (TokenRule(Sampling(top_p=0.6), 9), [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (TokenRule(Sampling(temperature=0.25, top_p=0.6)), [[1, 0, 0, 0], [1, 0, 0, 0]]),
        (TokenRule(Sampling()), [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ]
    for rule, expected in cases:
        assert torch.equal(rule(logits), torch.tensor(expected).bool())


def test_packed_sets_are_counted() -> None:
    kept = torch.rand((4, 3, 1000), generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(count_kept(pack_kept(kept)), kept.sum(-1))
    assert count_kept(pack_kept(torch.ones(77, dtype=torch.bool))) == 77


class PayTokenZero(gym.vector.VectorWrapper):
    """A user's wrapper: pays 1 for every token 0 that is sent."""

    def step(self, actions: Any) -> Any:
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        return observations, rewards + (np.asarray(actions) == 0), terminated, truncated, infos


@pytest.mark.slow
def test_a_reward_wrapper_leads_to_the_wrapped_optimum_inside_the_mask(small_task) -> None:
    task, beta, policy = small_task, 0.5, small_task.policy()
    agent = NLPO(
        policy,
        PayTokenZero(task.envs(96)),
        LinearSchedule(3e-3, 0.0, 1.0),
        beta=beta,
        n_epochs=2,
        gae_lambda=1.0,
        top_p=0.8,
        min_tokens_to_keep=1,
        mask_refresh_interval=None,
        seed=0,
    )
    sets = legal_sets(task.tree, agent)
    agent.learn(20_000)
    reference = restrict(task.tree.tabular(task.tree.log_probs(agent.reference)), sets)
    learned = restrict(raw_policy(task.tree, policy), sets)
    plain, wrapped = (soft_solution(tree, reference, beta).policy for tree in (task.tree, paying(task.tree)))
    assert total_variation(task.tree, learned, wrapped).max() < 0.15
    assert total_variation(task.tree, plain, wrapped).max() > 0.3


def legal_sets(tree: TokenTree, agent: NLPO) -> Any:
    """What the mask allows in each state, (N, S, V)."""
    rows = []
    for prompt in tree.prompts:
        for state in tree.states:
            ids = np.array([[*prompt, *state]])
            rows.append(agent.mask.at({"input_ids": ids, "attention_mask": np.ones_like(ids)})[0].cpu().numpy())
    return np.array(rows).reshape(tree.num_prompts, tree.num_states, tree.vocab_size)


def raw_policy(tree: TokenTree, policy: CausalLMPolicy) -> Any:
    """The model over the whole vocabulary."""
    mask, policy.mask = policy.mask, None
    table = tree.tabular(tree.log_probs(policy))
    policy.mask = mask
    return table


def paying(tree: TokenTree) -> TokenTree:
    """The tree whose rewards are those under `PayTokenZero`."""
    bonus = np.array([sum(token == 0 for token in tree.ids(i)) for i in range(tree.num_completions)])
    return TokenTree(tree.vocab_size, tree.horizon, tree.eos_token_id, tree.prompts, tree.rewards + bonus)
