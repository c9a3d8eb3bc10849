"""Stable-Baselines3's wrappers under the agents: around every kind of environment they work, and count what was done and nothing else."""

import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import NormalizeObservation, RecordEpisodeStatistics
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

import textgym
from textgym.agents import DQN, GRPO, PPO, REINFORCE, RLOO, CausalLMPolicy
from textgym.bundled import bundled_model_path
from textgym.sequences import SequenceWalk
from textgym.vec_env_adapter import as_gymnasium_vector_env, as_sb3_vec_env

N = 4


def one(completions, **columns):
    return [1.0] * len(completions)


class Own(VecEnvWrapper):
    """A user's wrapper that passes everything on."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


class OwnNormalize(VecNormalize):
    """A user's subclass."""


def batched(mode=AutoresetMode.NEXT_STEP):
    return as_sb3_vec_env(gym.make_vec("TextGen-v0", num_envs=N, reward=one, max_new_tokens=6, autoreset_mode=mode))


def rows():
    return DummyVecEnv([lambda: gym.make("TextGen-v0", reward=one, max_new_tokens=6)] * N)


def synchronous():
    return as_sb3_vec_env(SyncVectorEnv([lambda: gym.make("TextGen-v0", reward=one, max_new_tokens=6)] * N))


def normalize(venv, **options):
    return VecNormalize(venv, norm_obs=False, **options)


def policy():
    return CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu")


WRAPPERS = {
    "monitor": VecMonitor,
    "normalize": normalize,
    "check nan": VecCheckNan,
    "own": Own,
    "two monitors": lambda venv: VecMonitor(VecMonitor(venv)),
    "three kinds": lambda venv: VecMonitor(normalize(Own(venv))),
}


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_around_the_native_environment(wrap, mode):
    """The agent chooses the prompts and learns through the wrapper as without it."""
    plain = REINFORCE(policy(), batched(mode), learning_rate=1e-4, seed=0).learn(16)
    agent = REINFORCE(policy(), wrap(batched(mode)), learning_rate=1e-4, seed=0).learn(16)
    assert agent.num_timesteps == plain.num_timesteps
    assert [episode["l"] for episode in agent.ep_info_buffer] == [episode["l"] for episode in plain.ep_info_buffer]


@pytest.mark.parametrize("agent", [PPO, RLOO, GRPO, DQN])
@pytest.mark.parametrize("make", [batched, rows, synchronous])
def test_every_agent_under_vec_normalize(agent, make):
    options = {"num_generations": 2} if agent in (RLOO, GRPO) else {"learning_starts": 4, "batch_size": 2} if agent is DQN else {}
    envs = normalize(VecMonitor(make()))
    learner = agent(policy(), envs, learning_rate=1e-4, seed=0, **options).learn(16)
    assert round(envs.ret_rms.count) == learner.num_timesteps


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("make", [batched, rows, synchronous])
@pytest.mark.parametrize("kind", [VecNormalize, OwnNormalize])
def test_vec_normalize_counts_real_steps(make, gamma, kind):
    """The moments of the discounted returns against a loop by hand, over ragged rows, two walks long."""
    envs = VecMonitor(kind(make(), norm_obs=False, gamma=gamma))
    right, lengths = RunningMeanStd(shape=()), np.array([6, 2, 4, 1])
    view = as_gymnasium_vector_env(envs)
    for _ in range(2):
        view.reset(seed=0)
        eos = view.get_attr("eos_token_ids")[0][0]
        actions = np.full((N, 6), 5)
        actions[np.arange(N), lengths - 1] = eos
        textgym.step_sequence(view, actions, lengths)
        returns = np.zeros(N)
        for step in range(6):
            acts = lengths > step
            returns = returns * gamma + (lengths == step + 1)
            right.update(returns[acts])
            returns[lengths == step + 1] = 0.0
    moments = envs.venv.ret_rms
    assert type(moments) is RunningMeanStd and moments.count == pytest.approx(right.count)
    assert (moments.mean, moments.var) == (pytest.approx(right.mean), pytest.approx(right.var))


def test_moments_of_observations_and_saving_in_the_middle_of_a_walk(tmp_path):
    envs = VecNormalize(rows(), norm_obs=True, norm_reward=False, norm_obs_keys=["input_ids"])
    view = as_gymnasium_vector_env(envs)
    view.reset(seed=0)
    with SequenceWalk(view) as walk:
        walk.step(np.full(N, 5))
        walk.stop(np.array([True, True, True, False]))
        for _ in range(2):
            walk.step(np.full(N, 5))
        envs.save(tmp_path / "normalize.pkl")
        assert isinstance(envs.ret_rms, RunningMeanStd)
    assert round(envs.obs_rms["input_ids"].count) == N + N + 2  # the reset, a step of all rows, two of one
    loaded = VecNormalize.load(tmp_path / "normalize.pkl", rows())
    assert type(loaded.obs_rms["input_ids"]) is RunningMeanStd and type(loaded.ret_rms) is RunningMeanStd
    assert loaded.obs_rms["input_ids"].count == envs.obs_rms["input_ids"].count
    assert pickle.loads(pickle.dumps(envs.ret_rms)).count == envs.ret_rms.count


def test_gymnasium_s_normalised_observations_and_a_user_s_statistics():
    class Statistics(RecordEpisodeStatistics):
        pass

    envs = Statistics(NormalizeObservation(SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 3)))
    envs.reset(seed=0)
    before = envs.env.obs_rms.count
    with SequenceWalk(envs) as walk:
        walk.step(np.ones(3, dtype=int))
        walk.stop(np.array([True, True, False]))
        walk.step(np.ones(3, dtype=int))
        assert envs.episode_lengths.tolist()[2] == 2
    assert envs.env.obs_rms.count - before == pytest.approx(4)


def test_observations_that_an_agent_cannot_read_are_refused():
    numbers = VecNormalize(batched(), norm_obs=True, norm_obs_keys=["input_ids"])
    with pytest.raises(ValueError, match="must show `input_ids` that are integers"):
        REINFORCE(policy(), numbers, learning_rate=1e-4).learn(8)
    with pytest.raises(ValueError, match="must show `input_ids` and `attention_mask`"):
        REINFORCE(policy(), VecExtractDictObs(batched(), "input_ids"), learning_rate=1e-4).learn(8)
    with pytest.raises(Exception, match="Box"):
        VecFrameStack(batched(), 2)


def test_attributes_anywhere_on_a_row_s_stack():
    venv = VecMonitor(batched())
    assert venv.env_method("has_wrapper_attr", "next_prompt_index") == [True] * N
    assert venv.env_method("has_wrapper_attr", "nothing", indices=[1]) == [False]
    venv.env_method("set_wrapper_attr", "next_prompt_index", 3, indices=[1])
    assert venv.env_method("get_wrapper_attr", "next_prompt_index") == [None, 3, None, None]
    as_gymnasium_vector_env(venv).set_attr("next_prompt_index", [0, 1, 2, 3])
    _, infos = as_gymnasium_vector_env(venv).reset()
    assert infos["prompt_index"].tolist() == [0, 1, 2, 3]
