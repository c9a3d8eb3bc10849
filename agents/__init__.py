"""Agents: language-model policies and the algorithms that train them."""
