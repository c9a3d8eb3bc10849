"""Wrappers of text environments. The vector forms are in `textgym.wrappers.vector`."""

from textgym.wrappers.actor_critic import ActorCriticAdapter
from textgym.wrappers.finding import find_kl_shaping
from textgym.wrappers.kl_shaping import KLShaping

__all__ = ["ActorCriticAdapter", "KLShaping", "find_kl_shaping"]
