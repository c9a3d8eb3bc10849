"""A transformers causal LM taken apart: trunk (tokens to hidden states) and head (hidden states to logits over the tokenizer's V).

Everything in this package that runs a model goes through `Backbone`, so the numerical laws are kept in one place: positions are
always given, logits beyond the tokenizer's vocabulary are removed, dropout is off, and a LoRA reference runs with its adapter off.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from textgym.agents.common.kept_rows import KeptRows
from textgym.agents.common.layout import Rows
from textgym.agents.common.target_network import TargetNetwork
from textgym.agents.common.trunks import Trunk, additive, find_trunk, run_trunk

_NOTHING = contextlib.nullcontext()


class Backbone:
    """Trunk and head of one model.

    Args:
        model: a transformers causal LM, or a peft model around one.
        vocab_size: V, `len(tokenizer)`; the model must have at least as many outputs.
        without_adapter: run with the LoRA adapter off (the frozen reference of a LoRA policy).
        autocast: the dtype of matrix products, as `torch.autocast` has it; None for that of the weights.
        frozen: weights to run with in the place of the model's own (the frozen reference of a policy with a trained adapter).

    Attributes:
        model: as given.
        vocab_size: V.
        exact_head: the logits are head(trunk(x)) up to a known scaling, so the head can be applied to chosen positions, in chunks. Where
            that is not so, the whole model is run and its logits are sliced, at the memory cost of (B, T, V) in the model's dtype.
        dense_mask: attention masks can be handed over ready-made, (B, 1, queries, keys). Otherwise the model builds its own from a
            (B, keys) one (sliding windows, linear biases, attention kernels other than sdpa and eager).
        kept_rows: buffers and captured steps of past decode loops.
    """

    def __init__(
        self,
        model: nn.Module,
        vocab_size: int,
        without_adapter: bool = False,
        autocast: torch.dtype | None = None,
        frozen: TargetNetwork | None = None,
    ) -> None:
        self.model: Any = model
        self.vocab_size = vocab_size
        self.without_adapter, self.frozen = without_adapter, frozen
        self.autocast: torch.dtype | None = None  # what follows compares in the weights' own precision
        self._base = without_peft(model)
        self._trunk: Any = self._base.base_model
        head = self._base.get_output_embeddings()
        outputs = _output_size(self._base, head)
        if outputs < vocab_size:
            raise ValueError(
                f"`model` has {outputs} outputs, fewer than the {vocab_size} tokens of `tokenizer`: some tokens could never be produced. "
                "Use the tokenizer that the model was trained with, or call `model.resize_token_embeddings(len(tokenizer))` first."
            )
        self._takes_positions = "position_ids" in inspect.signature(self._trunk.forward).parameters
        self.dense_mask = self._takes_positions and _plain_attention(self._base.config)
        self._head: nn.Module | None = head
        self._rescale: Callable[[Tensor], Tensor] | None = None
        self.exact_head = self._find_rescaling()
        self._fast_trunk = find_trunk(self._trunk) if self.exact_head else None
        self.autocast = autocast
        self.kept_rows = KeptRows()

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self._base.config

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        return next(self._base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        dtype: torch.dtype = self._base.dtype
        return dtype

    @property
    def max_positions(self) -> int | None:
        """The longest sequence a table of learned positions allows; None for the rest (rotary positions go on)."""
        for name in ("wpe", "embed_positions", "position_embeddings"):
            table = getattr(self._trunk, name, None)
            if isinstance(table, nn.Embedding):
                return int(self.config.max_position_embeddings)
        return None

    def check_length(self, tokens: int, source: str) -> None:
        """Raises if a sequence of so many tokens has no position for each, before an index error deep in the model says it worse."""
        limit = self.max_positions
        if limit is not None and tokens > limit:
            raise ValueError(
                f"{source} needs {tokens} positions (prompt and completion together), but the model has {limit}. "
                "Use shorter prompts or fewer new tokens."
            )

    def without_dropout(self) -> None:
        """Puts the model in evaluation mode if anything left it: with dropout on, the policy that is scored is not the one that sampled."""
        if any(module.training for module in self.model.modules()):
            self.model.eval()

    def features(self, input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, cache: Cache | None = None) -> Tensor:
        """Runs the trunk.

        Args:
            input_ids: (B, S) int64.
            position_ids: (B, S) int64, or None for 0..S-1 in every row.
            attention_mask: (B, keys), or ready-made (B, 1, S, keys), or None for plain causal attention.
            cache: filled and read if given.

        Returns:
            What `logits` takes, one vector per position: hidden states (B, S, H), or (B, S, V) logits where `exact_head` is False.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": cache is not None}
        if cache is not None:
            inputs["past_key_values"] = cache
        if self._takes_positions and position_ids is not None:
            inputs["position_ids"] = position_ids
        with self.running():
            if self.exact_head:
                states: Tensor = self._trunk(**inputs).last_hidden_state
                return states
            logits: Tensor = self._base(**inputs).logits
            return logits

    def predictors(self, layout: Rows) -> tuple[Tensor, Tensor]:
        """Runs the trunk over the rows of a layout.

        Returns:
            What `logits` takes and the last hidden states, (M, ...) and (M, H), of the positions that predict its M completion tokens.
        """
        self.without_dropout()
        positions = layout.position_ids
        self.check_length(layout.input_ids.shape[1] if positions is None else int(positions.max()) + 1, "Scoring")
        if self.fast_trunk is not None:
            with self.running():
                states = run_trunk(self.fast_trunk, layout)
            return states, states
        attention = None if layout.visible is None else self.attention(layout.visible)
        features, states = self.features_and_hidden(layout.input_ids, positions, attention)
        return features[layout.rows, layout.columns], states[layout.rows, layout.columns]

    @property
    def fast_trunk(self) -> Trunk | None:
        """This package's own trunk for the model; None where transformers' forward must be used."""
        return self._fast_trunk if self._fast_trunk is not None and self._fast_trunk.unchanged else None

    def features_and_hidden(self, input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns `features` and the last hidden states (B, S, H); the two are the same tensor where `exact_head` holds."""
        if self.exact_head:
            features = self.features(input_ids, position_ids, attention_mask)
            return features, features
        positions = {"position_ids": position_ids} if self._takes_positions and position_ids is not None else {}
        with self.running():
            outputs = self._base(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True, **positions
            )
        return outputs.logits, outputs.hidden_states[-1]

    def logits(self, features: Tensor) -> Tensor:
        """Returns the logits over the tokenizer's vocabulary, (..., V), in the model's dtype."""
        if not self.exact_head or self._head is None:
            return features[..., : self.vocab_size]
        with self.running():
            logits = self._head(features)[..., : self.vocab_size]
        return logits if self._rescale is None else self._rescale(logits)

    def attention(self, visible: Tensor) -> Tensor:
        """Turns a boolean mask (B, 1, queries, keys), True = visible, into what the attention kernels add. Needs `dense_mask`.

        Eager attention takes nothing else; scaled-dot-product attention would turn a boolean mask into this one in every layer.
        """
        return additive(visible, self.dtype)

    def copy_trunk(self) -> PreTrainedModel:
        """Returns a copy of the trunk, without the adapters where there are some."""
        with self.holding():
            if self._base is self.model:
                trunk: PreTrainedModel = copy.deepcopy(self._trunk)
                return trunk
            peft_model: Any = copy.deepcopy(self.model)
        trunk = peft_model.unload().base_model
        return trunk

    def new_cache(self) -> Cache:
        """Returns transformers' own growing cache for this architecture."""
        return DynamicCache(config=self.config)

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """What the model runs in: the dtype of `autocast`, and as a reference without its adapter, or with the weights of its start."""
        precision = mixed_precision(self.device.type, self.autocast)
        if not self.without_adapter and self.frozen is None:
            return precision
        context = contextlib.ExitStack()
        context.enter_context(self.holding())
        context.enter_context(precision)
        return context

    def holding(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, the modules hold the weights that this backbone runs with; of a reference that shares them with a policy, its own."""
        context = contextlib.ExitStack()
        if self.frozen is not None:
            context.enter_context(self.frozen.lent())
        if self.without_adapter:
            context.enter_context(self.model.disable_adapter())
        return context

    @torch.no_grad()
    def _find_rescaling(self) -> bool:
        """Finds how the model's logits follow from its head's outputs, by comparing them on two tokens.

        A few architectures scale or cap the logits after the head (Cohere, Granite, Gemma). The attribute's name says what is done, and
        comparing shows whether it is so; an architecture that does something else still works, through its own forward.
        """
        if self._head is None or self._trunk is self._base:
            return False
        self.without_dropout()
        ids = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
        expected = self._base(input_ids=ids, use_cache=False).logits
        raw = self._head(self._trunk(input_ids=ids, use_cache=False).last_hidden_state)
        for rescale in (None, *_rescalings(self.config)):
            scaled = raw if rescale is None else rescale(raw)
            if scaled.shape == expected.shape and torch.allclose(scaled.float(), expected.float(), rtol=1e-5, atol=1e-5):
                self._rescale = rescale
                return True
        return False


class _Rescaling:
    """Picklable logits -> logits function of an architecture: multiply, divide, or cap with a hyperbolic tangent."""

    def __init__(self, kind: str, value: float) -> None:
        self.kind, self.value = kind, value

    def __call__(self, logits: Tensor) -> Tensor:
        """Applies it to (..., V)."""
        if self.kind == "logit_scale":
            return logits * self.value
        if self.kind == "logits_scaling":
            return logits / self.value
        return torch.tanh(logits / self.value) * self.value


def _rescalings(config: Any) -> list[_Rescaling]:
    kinds = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    return [_Rescaling(kind, getattr(config, kind)) for kind in kinds if isinstance(getattr(config, kind, None), (int, float))]


def mixed_precision(device_type: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """What a model runs in whose matrix products are to be of `dtype`; None: of the dtype of its weights."""
    return _NOTHING if dtype is None else torch.autocast(device_type, dtype)


def without_peft(model: nn.Module) -> PreTrainedModel:
    """Returns the transformers model inside; adapters that are injected into its layers stay active."""
    if isinstance(model, PreTrainedModel):
        return model
    peft_model: Any = model
    if not hasattr(model, "get_base_model"):
        raise ValueError(f"`model` must be a transformers causal LM or a peft model around one, got {type(model).__name__}.")
    if peft_model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"`model` uses peft's {peft_model.active_peft_config.peft_type}, which puts virtual tokens before the prompt; "
            "only adapters inside the layers (LoRA and its kin) are supported."
        )
    base: PreTrainedModel = peft_model.get_base_model()
    return base


def _output_size(base: PreTrainedModel, head: nn.Module | None) -> int:
    """The number of logits the model has: the head's own, since a configuration can be out of date."""
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else int(base.config.vocab_size)


def _plain_attention(config: Any) -> bool:
    """Whether every layer attends to the whole past, through a kernel that takes a ready-made mask."""
    if config._attn_implementation not in ("sdpa", "eager") or getattr(config, "alibi", False):
        return False
    if getattr(config, "position_embedding_type", None) == "alibi" or config.model_type in ("bloom", "mpt"):
        return False
    layers = DynamicCache(config=config).layers
    return all(type(layer) is DynamicLayer for layer in layers)
