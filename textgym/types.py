"""The types every part of textgym shares. Numpy only: this module must not import torch.

Dimension letters, used in every docstring and shape comment:

==  =====================================================================
B   rows of a batch: sequences
T   tokens of a completion (`max_new_tokens`, or the longest of the batch)
P   columns of the prompt (`max_prompt_tokens`); prompts are left-padded
L   P + T, columns of an observation
G   completions sampled for one prompt (`num_generations`)
V   vocabulary, `len(tokenizer)`
==  =====================================================================
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Observation: TypeAlias = dict[str, npt.NDArray[Any]]
Info: TypeAlias = dict[str, Any]

FinishReason: TypeAlias = Literal["eos", "length"]


class SequenceResult(NamedTuple):
    """What the environment made of one whole completion per row (see `textgym.step_sequence`).

    Attributes:
        rewards: (B, T) float32, zero from `lengths_used` on.
        terminated: (B,) bool, the environment ended the row within its steps.
        truncated: (B,) bool, an outer time limit (or a wrapper) cut the row.
        lengths_used: (B,) int64, the steps that were taken; at most the length that was asked for.
        infos: one dict per row, the info of its last step.
    """

    rewards: FloatArray
    terminated: BoolArray
    truncated: BoolArray
    lengths_used: IntArray
    infos: list[Info]


@runtime_checkable
class TokenPolicy(Protocol):
    """Anything that can say how probable tokens are: the numpy protocol of `KLShaping`.

    Implementations may also offer, for speed and for truncated sampling (each is optional and looked up by name):

    `sequence_log_probs(prompt_ids, prompt_lengths, actions, lengths) -> (B, T)`
        log-probs of whole completions in one pass. `prompt_ids` is (B, P), left-padded: the prompt of row i is
        `prompt_ids[i, P - prompt_lengths[i]:]`; `actions` is (B, T), of which the first `lengths[i]` count; the result is zero elsewhere.
    `paired_log_probs(reference, observations, actions) -> ((B,), (B,))` and
    `paired_sequence_log_probs(reference, prompt_ids, prompt_lengths, actions, lengths) -> ((B, T), (B, T))`
        log-probs under this policy and under `reference`, both at this policy's temperature and renormalised over the set of
        tokens that this policy keeps (top-k, top-p, min-p).
    `reference_sequence_log_probs(reference, prompt_ids, prompt_lengths, actions, lengths) -> (B, T)`
        the second half of `paired_sequence_log_probs`, asked for where the first half is known already.
    `full_kl(reference, observations) -> (B,)` and
    `sequence_full_kl(reference, prompt_ids, prompt_lengths, actions, lengths) -> (B, T)`
        the exact KL(self ‖ reference) over the whole vocabulary at each visited state, in nats.
    `remembers_rows` (an attribute, True)
        the policy keeps what it computed for row i of the last batch (a key-value cache), so it is asked with all rows in their
        places every time, also where only some are of interest; those others repeat what they last showed.
    """

    def log_probs(self, observations: Mapping[str, npt.NDArray[Any]], actions: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Returns log π(a|s), (B,), of `actions` (B,) at batched `observations` of the environment, in nats."""
        ...
