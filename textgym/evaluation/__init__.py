"""Evaluation: which of two policies writes better, what its texts look like, and whether the reward is being hacked.

Numbers of numbers and texts: nothing here loads torch when imported.
"""
