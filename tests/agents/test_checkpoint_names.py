"""Checkpoints under the names that Stable-Baselines3 gives them: a zip file's, with or without the ending."""

import gymnasium as gym
import pytest
from stable_baselines3.common.callbacks import CheckpointCallback

from textgym.agents import REINFORCE, CausalLMPolicy
from textgym.bundled import bundled_model_path


@pytest.fixture
def agent():
    envs = gym.make_vec("TextGen-v0", num_envs=2, max_new_tokens=4)
    return REINFORCE(CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu"), envs, learning_rate=1e-4, seed=0)


def test_checkpoint_callback_writes_folders_that_load_by_both_names(agent, tmp_path):
    agent.learn(8, callback=CheckpointCallback(save_freq=3, save_path=str(tmp_path), name_prefix="m"))
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders and all(name.startswith("m_") and name.endswith("_steps") for name in folders)
    for name in (folders[0], f"{folders[0]}.zip"):
        assert REINFORCE.load(tmp_path / name, env=agent.env, device="cpu").num_timesteps == int(folders[0].split("_")[1])


def test_a_folder_that_was_named_as_a_zip_file_loads_too(agent, tmp_path):
    agent.save(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "old.zip")
    for name in ("old", "old.zip"):
        assert REINFORCE.load(tmp_path / name, env=agent.env, device="cpu").num_timesteps == 0


def test_names_with_dots_keep_them(agent, tmp_path):
    agent.save(tmp_path / "beta_0.05")
    assert (tmp_path / "beta_0.05" / "agent.json").is_file()
    assert REINFORCE.load(tmp_path / "beta_0.05", env=agent.env, device="cpu").num_timesteps == 0


def test_a_file_is_no_checkpoint(agent, tmp_path):
    agent.save(tmp_path / "run")
    for file in (__file__, tmp_path / "run" / "agent.json"):
        with pytest.raises(ValueError, match="`path` must be the folder that `save` wrote, got the file"):
            REINFORCE.load(file, env=None)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        REINFORCE.load(tmp_path / "nothing", env=None)
