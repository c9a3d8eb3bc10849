"""The numpy protocol of `textgym.types.TokenPolicy`, optional methods included, on top of the torch scoring."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from textgym.agents.common.acting import ActingState
from textgym.agents.common.backbone import Backbone
from textgym.agents.common.layout import Rows, lay_out
from textgym.agents.common.sampling import Sampling, draw, kept_tokens, scale_logits, token_log_probs
from textgym.agents.common.scoring import (
    divergence,
    full_kl,
    paired_distributions,
    paired_log_probs,
    score_completions,
    spread,
)
from textgym.agents.common.token_mask import TokenMask

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
Observation = Mapping[str, Array]


class NumpyProtocol:
    """What `KLShaping` and Stable-Baselines3 ask of a policy: arrays in, arrays out, no gradients. Mixed into `CausalLMPolicy`.

    Attributes:
        backbone: the model.
        sampling: the distribution that is scored.
        mask: the tokens that are legal before any truncation, state by state; None allows all.
        generator: of the policy's own, where no other is given.
        remembers_rows: see `textgym.types.TokenPolicy`.
    """

    backbone: Backbone
    sampling: Sampling
    mask: TokenMask | None
    _acting: ActingState
    generator: Any  # a property of the policy
    remembers_rows = True  # `_acting` compares row i of a batch with row i of the one before

    @torch.no_grad()
    def log_probs(self, observations: Observation, actions: Array) -> FloatArray:
        """See `textgym.types.TokenPolicy`. Observations that grow by a token per call cost one cached step each."""
        tokens = self._ids(actions)
        logits = scale_logits(self._acting.observe(self.backbone, observations), self.sampling.temperature)
        kept = kept_tokens(logits, self.sampling, self._legal_at(observations))
        if kept is not None:
            logits = logits.masked_fill(~kept.scatter(-1, tokens.unsqueeze(-1), True), -torch.inf)
        return _numpy(token_log_probs(logits, tokens))

    @torch.no_grad()
    def sequence_log_probs(self, prompt_ids: Array, prompt_lengths: Array, actions: Array, lengths: Array) -> FloatArray:
        """See `textgym.types.TokenPolicy`."""
        layout = self._layout(prompt_ids, prompt_lengths, actions, lengths)
        return _numpy(score_completions(self.backbone, layout, self.sampling, legal=self._legal_along(layout)).log_probs)

    @torch.no_grad()
    def paired_log_probs(self, reference: Any, observations: Observation, actions: Array) -> tuple[FloatArray, FloatArray]:
        """See `textgym.types.TokenPolicy`; `reference` is a `CausalLMPolicy` too."""
        tokens, legal = self._ids(actions), self._legal_at(observations)
        first, second = paired_distributions(*self._observe_both(reference, observations), self.sampling, tokens, legal)
        return _numpy(token_log_probs(first, tokens)), _numpy(token_log_probs(second, tokens))

    @torch.no_grad()
    def paired_sequence_log_probs(
        self, reference: Any, prompt_ids: Array, prompt_lengths: Array, actions: Array, lengths: Array
    ) -> tuple[FloatArray, FloatArray]:
        """See `textgym.types.TokenPolicy`; `reference` is a `CausalLMPolicy` too."""
        other = self._other(reference)
        layout = self._layout(prompt_ids, prompt_lengths, actions, lengths)
        pair = _sequence_pair(self.backbone, other, layout)
        legal = self._legal_along(layout)
        first, second = paired_log_probs(self.backbone, pair[0], other, pair[1], layout.targets, self.sampling, legal)
        return _numpy(spread(first, layout.mask)), _numpy(spread(second, layout.mask))

    @torch.no_grad()
    def reference_sequence_log_probs(
        self, reference: Any, prompt_ids: Array, prompt_lengths: Array, actions: Array, lengths: Array
    ) -> FloatArray:
        """The second half of `paired_sequence_log_probs`, for callers that know the first; runs this policy only if it truncates."""
        if self.sampling.truncates:
            return self.paired_sequence_log_probs(reference, prompt_ids, prompt_lengths, actions, lengths)[1]
        layout = self._layout(prompt_ids, prompt_lengths, actions, lengths)
        return _numpy(score_completions(self._other(reference), layout, self.sampling, legal=self._legal_along(layout)).log_probs)

    @torch.no_grad()
    def full_kl(self, reference: Any, observations: Observation) -> FloatArray:
        """See `textgym.types.TokenPolicy`; `reference` is a `CausalLMPolicy` too."""
        pair, legal = self._observe_both(reference, observations), self._legal_at(observations)
        first, second = paired_distributions(*pair, self.sampling, legal=legal)
        return _numpy(divergence(first, second))

    @torch.no_grad()
    def sequence_full_kl(self, reference: Any, prompt_ids: Array, prompt_lengths: Array, actions: Array, lengths: Array) -> FloatArray:
        """See `textgym.types.TokenPolicy`; `reference` is a `CausalLMPolicy` too."""
        other = self._other(reference)
        layout = self._layout(prompt_ids, prompt_lengths, actions, lengths)
        pair = _sequence_pair(self.backbone, other, layout)
        divergences = full_kl(self.backbone, pair[0], other, pair[1], self.sampling, self._legal_along(layout))
        return _numpy(spread(divergences, layout.mask))

    def predict(
        self,
        observation: Observation,
        state: Any = None,
        episode_start: Array | None = None,
        deterministic: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Array, Any]:
        """Chooses the next token, as Stable-Baselines3's policies do.

        Args:
            observation: one observation or a batch.
            state: an `ActingState` of the caller's own, if several loops share this policy; None uses the policy's. A key-value cache is
                reused for rows that have grown by one token since the last call with the same state.
            episode_start: not needed: a row that starts again is recognised by its tokens.
            deterministic: the most probable token instead of a draw.
            generator: the source of the draw, on the policy's device; None: the policy's own.

        Returns:
            the action(s), int64, and the state used.
        """
        del episode_start
        single = np.ndim(observation["input_ids"]) == 1
        batch = {key: np.atleast_2d(np.asarray(observation[key])) for key in ("input_ids", "attention_mask")}
        acting = state if isinstance(state, ActingState) else self._acting
        with torch.no_grad():
            logits = scale_logits(acting.observe(self.backbone, batch), self.sampling.temperature)
            kept = kept_tokens(logits, self.sampling, self._legal_at(batch))
            logits = logits if kept is None else logits.masked_fill(~kept, -torch.inf)
            if deterministic:
                tokens = logits.argmax(-1)
            else:
                uniforms = torch.rand(len(logits), generator=generator or self.generator, device=self.backbone.device, dtype=torch.float64)
                tokens = draw(logits, uniforms)[0]
        actions = tokens.cpu().numpy()
        return (actions[0] if single else actions), acting

    def _observe_both(self, reference: Any, observations: Observation) -> tuple[Tensor, Tensor]:
        """Logits of both models at the observations, each through its own cache."""
        other = self._other(reference)
        acting: ActingState = reference._acting
        return self._acting.observe(self.backbone, observations), acting.observe(other, observations)

    def _legal_at(self, observations: Observation) -> Tensor | None:
        """The legal tokens at observations, (B, V) bool; None if all are."""
        return None if self.mask is None else self.mask.at(observations)

    def _legal_along(self, layout: Rows) -> Tensor | None:
        """The packed sets of legal tokens at the states of completions, (N, ceil(V/8)) uint8; None if all are."""
        return None if self.mask is None else self.mask.along(layout)

    def _ids(self, array: Array | Tensor) -> Tensor:
        return torch.as_tensor(array, dtype=torch.int64, device=self.backbone.device)

    def _layout(self, *arrays: Array | Tensor) -> Rows:
        prompt_ids, prompt_lengths, actions, lengths = (self._ids(array) for array in arrays)
        return lay_out(prompt_ids, prompt_lengths, actions, lengths)

    def _other(self, reference: Any) -> Backbone:
        other = getattr(reference, "backbone", None)
        if not isinstance(other, Backbone):
            raise ValueError(f"`reference` must be a CausalLMPolicy to be compared token by token, got {type(reference).__name__}.")
        if other.vocab_size != self.backbone.vocab_size:
            raise ValueError(
                f"`reference` has a vocabulary of {other.vocab_size} tokens and the policy one of {self.backbone.vocab_size}: "
                "log-probs of the two can only be compared under one tokenizer."
            )
        return other


def _sequence_pair(first: Backbone, second: Backbone, layout: Rows) -> tuple[Tensor, Tensor]:
    return first.predictors(layout)[0], second.predictors(layout)[0]


def _numpy(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.float().cpu().numpy()
    return array
