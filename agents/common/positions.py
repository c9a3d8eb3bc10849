"""How far a model's positions go: tables that end, the range it was trained on, and lengths at which rotary frequencies change."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_TRAINED = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx", "context_length")


def trained_positions(config: Any) -> int | None:
    """Returns the longest sequence that a configuration says the model is made for; None where it says nothing."""
    config = config.get_text_config()
    for name in _TRAINED:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


@dataclass(frozen=True)
class Turn:
    """Rotary frequencies that depend on the longest position in a call: what a state reads there is not what it reads in a longer row.

    Attributes:
        length: rows of up to so many tokens are all read with the same frequencies.
        once: beyond it all are read with another set (longrope); otherwise every length has its own (dynamic).
    """

    length: int
    once: bool

    def reach(self, states: Tensor, lengths: Tensor) -> Tensor:
        """Returns how many tokens of its row must be run to read each state as its model does when the row ends there.

        Args:
            states: tokens up to and including the state's own, (M,) int64.
            lengths: of the state's row, (M,) int64.
        """
        beyond = lengths if self.once else states
        return torch.where(states <= self.length, lengths.clamp(max=self.length), beyond)


def find_turn(config: Any) -> Turn | None:
    """Returns the turn that a configuration asks for; None for frequencies that stay."""
    config = config.get_text_config()
    found = [turn for turn in map(lambda one: _turn(one, config), _rotary_settings(config)) if turn is not None]
    return min(found, key=lambda turn: (turn.length, turn.once), default=None)


def _rotary_settings(config: Any) -> list[dict[str, Any]]:
    """The settings of all kinds of layers."""
    settings: list[dict[str, Any]] = []
    for name in ("rope_parameters", "rope_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, dict):
            settings += [value, *(one for one in value.values() if isinstance(one, dict))]
    return settings


def _turn(settings: dict[str, Any], config: Any) -> Turn | None:
    kind = settings.get("rope_type", settings.get("type"))
    if kind not in ("dynamic", "longrope"):
        return None
    original = settings.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if kind == "dynamic":  # this kind begins behind the whole range
        original = config.max_position_embeddings
    return Turn(int(original or config.max_position_embeddings), once=kind == "longrope")


def forget_lengths(trunk: nn.Module) -> None:
    """Makes dynamic rotary frequencies those of the next call: transformers keeps the ones of the longest call so far."""
    for module in trunk.modules():
        if hasattr(module, "original_max_seq_len"):
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                setattr(module, name, 0)


@torch.no_grad()
def table_limit(base: Any, ids: Tensor) -> int | None:
    """Returns for how many tokens a model's tables of positions suffice; None without a table.

    A table is whatever is looked up in with consecutive numbers, one for each token, whatever its name and wherever in the model.

    Args:
        base: the transformers causal LM.
        ids: (1, S) int64, different tokens and not the one for padding, S at least 3.
    """
    found = []
    for width in (max(3, ids.shape[1] // 2), ids.shape[1]):  # what is made for one call is no table: it differs in size
        with _Lookups(width) as lookups:
            base(input_ids=ids[:, :width], use_cache=False)
        found.append(lookups.limits)
    return min(found[0] & found[1], default=None)


class _Lookups(TorchDispatchMode):
    """Watches for tables that are looked up in with consecutive numbers.

    Args:
        width: how many tokens are run.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.limits: set[int] = set()
        self._width = width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation as it is."""
        self._look(func, args)
        return func(*args, **(kwargs or {}))

    def _look(self, func: Any, args: Any) -> None:
        aten = torch.ops.aten
        if func is aten.embedding.default:
            self._note(args[0].shape[0], args[1])
        elif func is aten.index_select.default:
            self._note(args[0].shape[args[1]], args[2])
        elif func is aten.index.Tensor and isinstance(args[1][0], Tensor) and all(one is None for one in args[1][1:]):
            self._note(args[0].shape[0], args[1][0])
        elif func is aten.gather.default:
            index = args[2].movedim(args[1], -1)
            if bool((index == index.reshape(-1, index.shape[-1])[0]).all()):
                self._note(args[0].shape[args[1]], index.reshape(-1, index.shape[-1])[0])

    def _note(self, entries: int, index: Tensor) -> None:
        if index.dtype not in (torch.int32, torch.int64) or index.numel() != self._width:
            return
        index = index.flatten()
        first = int(index[0])
        if bool((index == torch.arange(first, first + self._width, device=index.device)).all()) and entries >= first + self._width:
            self.limits.add(entries - first)
