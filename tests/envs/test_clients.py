"""What clients look for in an environment: legal actions, pictures, infos that keep their keys."""

import itertools
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import RecordVideo
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

import textgym  # noqa: F401
from textgym.vec_env_adapter import as_sb3_vec_env


def test_action_masks_say_that_every_token_is_legal():
    env, envs = gym.make("TextGen-v0", reward="length"), gym.make_vec("TextGen-v0", num_envs=3, reward="length")
    vocabulary = env.action_space.n
    masks = env.get_wrapper_attr("action_masks")()
    assert masks.shape == (vocabulary,) and masks.dtype == np.bool_ and masks.all()
    assert envs.action_masks().shape == (3, vocabulary) and envs.action_masks().all()
    venv = as_sb3_vec_env(envs)
    assert np.stack(venv.env_method("action_masks")).shape == (3, vocabulary)  # as sb3-contrib calls it
    masks[:] = False
    assert env.get_wrapper_attr("action_masks")().all()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_infos_of_the_vector_environment_always_have_the_prompt(mode):
    envs = gym.make_vec("TextGen-v0", num_envs=3, prompts=["the film", "a film"], reward="length", max_new_tokens=3, autoreset_mode=mode)
    _, infos = envs.reset(seed=0)
    assert infos["_prompt_index"].all()
    began = []
    for _ in range(8):
        *_, infos = envs.step(np.full(3, 5))
        assert infos["prompt_index"].shape == infos["_prompt_index"].shape == (3,) and infos["prompt_index"].dtype == np.int64
        began.append(bool(infos["_prompt_index"].any()))
    assert began == [step % 4 == 3 if mode == AutoresetMode.NEXT_STEP else step % 3 == 2 for step in range(8)]


def test_pictures_are_of_one_size_and_show_the_episode():
    env = gym.make("TextGen-v0", reward="length", max_new_tokens=40, render_mode="rgb_array")
    env.reset(seed=0)
    pictures = [env.render()]
    for token in range(4, 40):
        env.step(token)
        pictures.append(env.render())
    assert {picture.shape for picture in pictures} == {pictures[0].shape} and pictures[0].dtype == np.uint8
    assert all((before != after).any() for before, after in itertools.pairwise(pictures))
    envs = gym.make_vec("TextGen-v0", num_envs=2, reward="length", render_mode="rgb_array")
    envs.reset(seed=0)
    assert [one.shape for one in envs.render()] == [pictures[0].shape] * 2
    assert [one.shape for one in as_sb3_vec_env(envs).get_images()] == [pictures[0].shape] * 2


def test_a_long_conversation_keeps_the_size_of_its_picture():
    long = [{"role": "user", "content": "a film " * 300}]
    env = gym.make("TextGen-v0", prompts=["the film"], reward="length", render_mode="rgb_array")
    env.reset()
    short = env.render().shape
    env = gym.make("TextGen-v0", prompts=["\n".join(part["content"] for part in long)], reward="length", render_mode="rgb_array")
    env.reset()
    assert env.render().shape == short


def test_record_video_takes_the_pictures(tmp_path):
    pytest.importorskip("moviepy")
    env = RecordVideo(gym.make("TextGen-v0", reward="length", max_new_tokens=3, render_mode="rgb_array"), str(tmp_path))
    env.reset(seed=0)
    for _ in range(3):
        env.step(5)
    env.close()
    assert list(tmp_path.glob("*.mp4"))


def test_stable_baselines_makes_it_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        venv = make_vec_env("TextGen-v0", n_envs=2, env_kwargs={"reward": "length", "max_new_tokens": 3})
        PPO("MultiInputPolicy", venv, n_steps=4, batch_size=4, device="cpu").learn(8)
    assert all(image is not None for image in venv.get_images())


def test_making_an_environment_with_pictures_loads_nothing_heavy():
    script = (
        "import sys, gymnasium as gym, textgym; "
        "gym.make('TextGen-v0', reward='length', render_mode='rgb_array').reset(); "
        "print([name for name in ('matplotlib', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_masked_ppo_finds_the_masks():
    sb3_contrib = pytest.importorskip("sb3_contrib")
    env = gym.make("TextGen-v0", reward="length", max_new_tokens=3)
    sb3_contrib.MaskablePPO("MultiInputPolicy", env, n_steps=8, batch_size=8, device="cpu").learn(8)
