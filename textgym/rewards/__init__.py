"""Rewards for text."""
