"""A transformers causal LM taken apart: trunk (tokens to hidden states) and head (hidden states to logits over the tokenizer's V).

Everything in this package that runs a model goes through `Backbone`, so the numerical laws are kept in one place: positions are
always given, logits beyond the tokenizer's vocabulary are removed, dropout is off, and a LoRA reference runs with its adapter off.
"""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from textgym.agents.common.adapters import merged_layers
from textgym.agents.common.head_scaling import find_rescaling
from textgym.agents.common.kept_rows import KeptRows
from textgym.agents.common.layout import Rows
from textgym.agents.common.positions import find_turn, forget_lengths, table_limit, trained_positions
from textgym.agents.common.target_network import TargetNetwork
from textgym.agents.common.trunks import Trunk, additive, find_trunk, run_trunk
from textgym.agents.common.ways import Ways, plan_calls

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
        ways: how the model may be run; what its configuration suggests until `trial.choose_ways` has tried it.
        turn: at which length the model's rotary frequencies change; None for never.
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
        self._merged = merged_layers(model)
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
        parameters = inspect.signature(self._trunk.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self._cache_argument = "cache_params" if "cache_params" in parameters else "past_key_values"
        self.turn = find_turn(self._base.config)
        self._head: nn.Module | None = head
        self._rescale: Callable[[Tensor], Tensor] | None = None
        self.exact_head = self._find_rescaling()
        self._fast_trunk = find_trunk(self._trunk) if self.exact_head else None
        dense = self.takes_positions and _plain_attention(self._base.config)
        self.ways = Ways(decoding="ready-made masks" if dense else "padding", dense_mask=dense)
        self.autocast = autocast
        self.kept_rows = KeptRows()
        self._said: set[str] = set()

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
    def dense_mask(self) -> bool:
        """Whether masks can be handed over ready-made; otherwise the model builds its own from a (B, keys) one, or from nothing."""
        return self.ways.dense_mask

    @property
    def num_layers(self) -> int:
        """Of the trunk."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that a table of positions allows; None for the rest (rotary positions go on)."""
        return self.ways.max_positions

    @property
    def trained_positions(self) -> int | None:
        """The longest sequence that the configuration says the model is made for; beyond it rotary models run, but were never trained."""
        return trained_positions(self.config)

    def settle(self, ways: Ways, *, fast_trunk: bool, exact_head: bool) -> None:
        """Takes over what a trial has found; what was assumed and did not hold is dropped."""
        self.ways, self.exact_head = ways, self.exact_head and exact_head
        if not (fast_trunk and self.exact_head):
            self._fast_trunk = None

    def shared(self, *, without_adapter: bool, frozen: TargetNetwork | None) -> "Backbone":
        """Returns the same model run without its adapter or with other weights, in the ways that were found for it as it is."""
        backbone = Backbone(self.model, self.vocab_size, without_adapter, self.autocast, frozen)
        backbone.settle(self.ways, fast_trunk=self._fast_trunk is not None, exact_head=self.exact_head)
        return backbone

    def forget_warnings(self) -> None:
        """Lets every warning be given again."""
        self._said = set()

    def table_limit(self, ids: Tensor) -> int | None:
        """Returns what the tables of positions allow, by a pass over ids (1, S); see `positions.table_limit`."""
        with self.running():
            return table_limit(self._base, ids)

    def check_length(self, tokens: int, source: str) -> None:
        """Raises if a sequence of so many tokens has no position for each, before an index error deep in the model says it worse.

        Where positions go on behind those that the model was trained for, one warning says so.
        """
        limit, trained = self.max_positions, self.trained_positions
        if limit is not None and tokens > limit:
            raise ValueError(
                f"{source} needs {tokens} positions (prompt and completion together), but the model has {limit}. "
                "Use shorter prompts or fewer new tokens."
            )
        if trained is not None and tokens > trained:
            self.say_once(
                "trained positions",
                f"{source} needs {tokens} positions (prompt and completion together), but the model was trained on 0 to {trained - 1}: "
                "it runs, but what it says beyond them is not to be trusted. Use shorter prompts or fewer new tokens.",
            )

    def say_once(self, cause: str, message: str) -> None:
        """Warns, once for each cause."""
        if cause not in self._said:
            self._said.add(cause)
            warnings.warn(message, stacklevel=3)

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
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": cache is not None}
        # Left out where there is none: some classes do not take it.
        inputs |= {} if attention_mask is None else {"attention_mask": attention_mask}
        inputs |= {} if cache is None else {self._cache_argument: cache}
        inputs |= self._positions(position_ids)
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
        if layout.visible is None:
            assert layout.lengths is not None, "packed rows bring a mask"
            return self.states_of(layout.input_ids, layout.lengths, layout.rows, layout.columns)
        if self.turn is not None and positions is not None and int(positions.max()) >= self.turn.length:
            raise ValueError(
                f"`packing` must be False for rows of more than {self.turn.length} tokens with this model, whose rotary frequencies depend "
                f"on the length of a row from there on; a row here has {int(positions.max()) + 1}."
            )
        features, states = self.features_and_hidden(layout.input_ids, positions, self.attention(layout.visible))
        return features[layout.rows, layout.columns], states[layout.rows, layout.columns]

    def states_of(self, input_ids: Tensor, lengths: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the trunk over rows without a cache, each as if it were alone.

        Args:
            input_ids: (B, S) int64, rows from column 0.
            lengths: tokens of each row, (B,) int64.
            rows: of each state that is wanted, (M,) int64.
            columns: where it stands in its row, (M,) int64.

        Returns:
            What `logits` takes and the last hidden states, (M, ...) and (M, H).
        """
        calls = plan_calls(lengths, rows, columns, self.ways.batching, self.turn)
        pieces = []
        for call in calls:
            ids = input_ids[:, : call.width]
            found = self.features_and_hidden(ids if len(call.members) == len(ids) else ids[call.members], None, None)
            pieces.append(tuple(one[call.rows, call.columns] for one in found))
        features, states = (torch.cat(kind) for kind in zip(*pieces, strict=True)) if len(calls) != 1 else pieces[0]
        if len(calls) < 2:
            return features, states
        self.say_once(
            "batching",
            f"{type(self._base).__name__} does not read a row beside {'others' if self.ways.batching == 'alone' else 'longer ones'} as it "
            f"reads it alone: rows are run {'one at a time' if self.ways.batching == 'alone' else 'with those of their own length'}, which "
            "is right and slower.",
        )
        order = torch.cat([call.places for call in calls]).argsort()
        return features[order], states[order]

    @property
    def fast_trunk(self) -> Trunk | None:
        """This package's own trunk for the model; None where transformers' forward must be used."""
        return self._fast_trunk if self._fast_trunk is not None and self._fast_trunk.unchanged else None

    def features_and_hidden(self, input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns `features` and the last hidden states (B, S, H); the two are the same tensor where `exact_head` holds."""
        if self.exact_head:
            features = self.features(input_ids, position_ids, attention_mask)
            return features, features
        masks = {} if attention_mask is None else {"attention_mask": attention_mask}
        with self.running():
            outputs = self._base(input_ids=input_ids, use_cache=False, output_hidden_states=True, **masks, **self._positions(position_ids))
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
            if not self.frozen.is_lent and merged_layers(self.model) != self._merged:
                raise ValueError(
                    "The adapter was merged into its model, or taken out of it, after this reference was made, whose weights the model "
                    "does not hold any more. Call `model.unmerge_adapter()`, or merge before `policy.reference()`."
                )
            context.enter_context(self.frozen.lent())
        if self.without_adapter:
            context.enter_context(self.model.disable_adapter())
        return context

    def plain_log_probs(self, ids: Tensor) -> Tensor:
        """What everything here has to agree with: transformers' own pass over one row alone, (S, V) float32, from ids (S,) int64."""
        self._forget_lengths()
        with self.running():
            logits: Tensor = self._base(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
        return logits[:, : self.vocab_size].float().log_softmax(-1)

    def _positions(self, position_ids: Tensor | None) -> dict[str, Tensor]:
        self._forget_lengths()
        return {"position_ids": position_ids} if self.takes_positions and position_ids is not None else {}

    def _forget_lengths(self) -> None:
        if self.turn is not None and not self.turn.once:
            forget_lengths(self._trunk)

    def _find_rescaling(self) -> bool:
        """Finds how the model's logits follow from its head's outputs; an architecture of its own kind still works, by its own forward."""
        if self._head is None or self._trunk is self._base:
            return False
        self.without_dropout()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocab_size, (1, 2), generator=generator).to(self.device)
        found, self._rescale = find_rescaling(self._base, self._head, self._trunk, ids)
        return found


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
    return int(weight.shape[0]) if isinstance(weight, Tensor) else int(base.config.get_text_config().vocab_size)


def _plain_attention(config: Any) -> bool:
    """Whether every layer attends to the whole past, through a kernel that takes a ready-made mask."""
    if config._attn_implementation not in ("sdpa", "eager") or getattr(config, "alibi", False):
        return False
    if getattr(config, "position_embedding_type", None) == "alibi" or config.model_type in ("bloom", "mpt"):
        return False
    if _windows(config):
        return False
    layers = DynamicCache(config=config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def _windows(config: Any) -> bool:
    """Whether layers look at a window that transformers' caches know nothing of, as GPT-Neo's: no trial is as long as every window."""
    known = ("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern")  # those the caches know
    for name, value in vars(config.get_text_config()).items():
        size = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if name not in known and size and ("window" in name or "local_att" in name or name == "attention_chunk_size"):
            return True
    return getattr(config, "attention_type", None) == "block_sparse"
