"""A language model as the policy of Stable-Baselines3's own agents: the numbers of `CausalLMPolicy`, gradients, learning, saving."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO

import textgym  # noqa: F401
from textgym.agents import CausalLMActorCriticPolicy, CausalLMPolicy
from textgym.bundled import bundled_model_path
from textgym.vec_env_adapter import as_sb3_vec_env
from textgym.wrappers import ActorCriticAdapter
from textgym.wrappers.vector import KLShaping

GOOD = 21  # " and", which is said now and then


def one_token(completion_ids, **columns):
    """How often a token is said."""
    return [ids.count(GOOD) / len(ids) for ids in completion_ids]


def make(num_envs=8, **options):
    return gym.make_vec("TextGen-v0", num_envs=num_envs, reward=one_token, max_new_tokens=4, max_prompt_tokens=8, **options)


def language_model(**options):
    return CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu", **options)


def stock(policy, envs=None, agent=PPO, **options):
    sizes = {"n_steps": 8} | ({"batch_size": 32, "n_epochs": 2} if agent is PPO else {})
    venv = as_sb3_vec_env(make() if envs is None else envs)
    kwargs = {"language_model": policy}
    return agent(CausalLMActorCriticPolicy, venv, policy_kwargs=kwargs, gamma=1.0, seed=0, device="cpu", **sizes, **options)


def ragged_observations():
    envs = make(4, prompts=["the film", "a", "the plot of this film was", "we saw"])
    envs.reset(options={"prompt_index": [0, 1, 2, 3]})
    observations, *_ = envs.step(np.array([5, 6, 7, 8]))
    return observations


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_values(temperature):
    policy = language_model(temperature=temperature)
    agent, observations = stock(policy), ragged_observations()
    actions = np.array([3, 9, 5, 11])
    tensors, _ = agent.policy.obs_to_tensor(observations)
    values, log_probs, entropy = agent.policy.evaluate_actions(tensors, torch.tensor(actions))
    assert log_probs.detach().numpy() == pytest.approx(policy.log_probs(observations, actions), abs=1e-5)
    assert values.shape == (4, 1) and not values.any() and entropy.shape == (4,)
    # Each row by itself, by transformers alone.
    for row in range(4):
        ids = observations["input_ids"][row][observations["attention_mask"][row] == 1]
        logits = policy.model(torch.tensor(ids[None])).logits[0, -1, : policy.backbone.vocab_size] / temperature
        assert log_probs[row].item() == pytest.approx(logits.log_softmax(-1)[actions[row]].item(), abs=1e-5)
    assert (ActorCriticAdapter(agent.policy).log_probs(observations, actions)) == pytest.approx(log_probs.detach().numpy(), abs=1e-5)


def test_gradients_reach_model_and_head():
    policy = language_model()
    agent = stock(policy)
    tensors, _ = agent.policy.obs_to_tensor(ragged_observations())
    values, log_probs, _ = agent.policy.evaluate_actions(tensors, torch.tensor([3, 9, 5, 11]))
    (log_probs.sum() + ((values - 1) ** 2).sum()).backward()
    assert agent.policy.value_head.output.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in policy.parameters() if parameter.requires_grad)
    known = {id(parameter) for group in agent.policy.optimizer.param_groups for parameter in group["params"]}
    assert known == {id(parameter) for parameter in agent.policy.parameters()}


@pytest.mark.parametrize(("agent", "learning_rate"), [(PPO, 1e-3), (A2C, 3e-3)])
def test_the_reward_rises(agent, learning_rate):
    policy = language_model()
    learner = stock(policy, make(16), agent, learning_rate=learning_rate)

    def measured():
        return np.mean(one_token(policy.generate(["the film"] * 64, max_new_tokens=4, seed=1).completion_ids))

    before = measured()
    learner.learn(1_500)
    assert measured() > before + 0.2


def test_with_kl_shaping():
    """The log-ratio in the infos is that of the language model to where it began."""
    envs = KLShaping(make(), beta=0.05)
    agent = stock(language_model(), envs, learning_rate=3e-3)
    adapter = ActorCriticAdapter(agent.policy)
    envs.set_policy(adapter)
    envs.set_reference(adapter.frozen_copy())
    agent.learn(64)
    observations, _ = envs.reset(seed=0)
    actions = np.full(8, GOOD)
    expected = agent.policy.language_model.log_probs(observations, actions) - language_model().log_probs(observations, actions)
    *_, infos = envs.step(actions)
    assert np.abs(expected).max() > 0.01 and infos["log_ratio"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("by_path", [True, False])
def test_saving_and_loading(tmp_path, by_path):
    agent = stock(str(bundled_model_path()) if by_path else language_model(), learning_rate=3e-3).learn(64)
    agent.save(tmp_path / "agent")
    agent.policy.save(tmp_path / "policy")
    agent.policy.language_model.save_pretrained(tmp_path / "model")
    observations = ragged_observations()
    expected = pytest.approx(agent.policy.language_model.log_probs(observations, np.full(4, GOOD)), abs=1e-5)
    loaded = PPO.load(tmp_path / "agent", env=as_sb3_vec_env(make()), device="cpu")
    assert loaded.policy.language_model.log_probs(observations, np.full(4, GOOD)) == expected
    alone = CausalLMActorCriticPolicy.load(tmp_path / "policy", device="cpu")
    assert alone.language_model.log_probs(observations, np.full(4, GOOD)) == expected
    model = CausalLMPolicy.from_pretrained(tmp_path / "model", device="cpu")
    assert model.log_probs(observations, np.full(4, GOOD)) == expected
    values = [one.policy.predict_values(one.policy.obs_to_tensor(observations)[0]).detach().numpy() for one in (agent, loaded)]
    assert values[0] == pytest.approx(values[1], abs=1e-6) and np.abs(values[0]).max() > 0
    assert loaded.learn(64, reset_num_timesteps=False).num_timesteps == 128
    actions, _ = loaded.predict(observations, deterministic=True)
    assert actions.shape == (4,)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`language_model` must sample from its whole distribution"):
        stock(language_model(top_k=5))
    with pytest.raises(ValueError, match="must show `input_ids` and `attention_mask`"):
        PPO(CausalLMActorCriticPolicy, "CartPole-v1", policy_kwargs={"language_model": language_model()}, device="cpu")
    other = gym.make_vec("TextGen-v0", num_envs=2, tokenizer=other_tokenizer(), prompts=["a"], reward="length")
    with pytest.raises(ValueError, match=r"must have one action per token of the language model, Discrete\(\d+\), got Discrete\(3\)"):
        stock(language_model(), other, A2C)


def other_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "end": 2}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end")
