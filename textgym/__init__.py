"""Environments in which generating text is an MDP, and the agents that learn in them."""

import textgym.envs as envs  # registers the environment ids
from textgym.model_inputs import model_inputs as model_inputs
from textgym.sequences import step_sequence as step_sequence

__version__ = "0.1.0"
__all__ = ["__version__", "envs", "model_inputs", "step_sequence"]
