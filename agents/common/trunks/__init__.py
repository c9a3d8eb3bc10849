"""Decoder trunks, from tokens to last hidden states, run by this package on the weights of a transformers model.

transformers' own forward is written for every use; this one knows that it scores completions or decodes them. It takes tokens without
padding between them, runs a prompt once for all its completions, and spends its time in matrix products. A model that is not one of the
known architectures, or that somebody has changed, is run through transformers.
"""

from textgym.agents.common.trunks.base import Trunk
from textgym.agents.common.trunks.gpt2 import GPT2Trunk
from textgym.agents.common.trunks.llama import LlamaTrunk
from textgym.agents.common.trunks.plans import additive, run_trunk
from textgym.agents.common.trunks.probe import find_trunk

__all__ = ["GPT2Trunk", "LlamaTrunk", "Trunk", "additive", "find_trunk", "run_trunk"]
