"""Environments in which generating text is an MDP, and the agents that learn in them."""

from pathlib import Path

# In a checkout that is used without an installation `agents/` and `envs/` stand beside this folder, not in it.
_here = Path(__file__).resolve().parent
if not (_here / "envs").exists() and (_here.parent / "envs" / "text_gen.py").exists():
    __path__.append(str(_here.parent))

import textgym.envs as envs  # noqa: E402  (registers the environment ids)
from textgym.model_inputs import model_inputs as model_inputs  # noqa: E402
from textgym.sequences import step_sequence as step_sequence  # noqa: E402

__version__ = "0.1.0"
__all__ = ["__version__", "envs", "model_inputs", "step_sequence"]
