"""Environments in which generating text is an MDP, and the agents that learn in them."""

__version__ = "0.1.0"
