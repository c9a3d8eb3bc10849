"""What a transformers model does with texts of several lengths, tried when it is loaded: how long they may be, and which share a batch.

Neither is written down anywhere. Positions of RoBERTa begin behind the pad id, so a table of 514 takes 512 tokens; FNet mixes the padding
into every token, ConvBERT's convolutions reach into it. Torch is imported when a model is tried.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from textgym.errors import RewardError

if TYPE_CHECKING:
    import torch

Batching: TypeAlias = Literal["any", "same length", "alone"]
"""Which texts may share a forward pass, so that no score depends on the others: any, padded; those of one length; none."""

Read: TypeAlias = "Callable[[Sequence[Sequence[int]]], Sequence[torch.Tensor] | torch.Tensor]"
"""A forward pass: from N id lists to N tensors, what the model makes of each text."""

_SHORT, _LONG = 5, 37  # 32 apart: more than the buckets of relative positions, which must not be taken for positions
_TOLERANCE = 1e-4  # of float32, relative; a dependence on the padding is far larger, rounding far smaller


class Reading(NamedTuple):
    """How a model reads texts.

    Attributes:
        limit: the longest text in tokens, None without a limit.
        batching: which texts share a forward pass.
    """

    limit: int | None
    batching: Batching


def try_reading(model: Any, read: Read, name: str, tokenizer: Any, max_length: int | None = None) -> Reading:
    """Tries a model on texts of a few lengths.

    Args:
        model: a transformers model, in evaluation mode.
        read: its forward pass.
        name: what error messages call it, with a word such as "reward `x`".
        tokenizer: its tokenizer.
        max_length: the longest text that is asked for; None for what the tokenizer, the configuration and the model allow.

    Raises:
        ValueError: the model cannot read a text, not one of `max_length`, or not a text twice alike.
    """
    import torch

    _check_attention(model, name)
    announced = min(max_length or announced_limit(model, tokenizer), _rotary_limit(model.config))
    with torch.no_grad():
        limit = min(announced, _table_limit(model, read, announced))
        if max_length is not None and limit < max_length:
            raise ValueError(f"{name}: `max_length` must be at most {limit:.0f}, the positions that the model has, got {max_length}.")
        batching = _batching(model, read, int(min(limit, 1e9)), name)
    if batching == "any" and _rotary_kind(model.config, "longrope"):
        batching = "same length"  # which of its two sets of frequencies is taken depends on the longest text of the batch
    return Reading(int(limit) if limit < 1e9 else None, batching)


def announced_limit(model: Any, tokenizer: Any) -> float:
    """Returns how many tokens a text may have by what tokenizer and configuration say; infinity where they say nothing."""
    # a tokenizer without a limit says 1e30
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or math.inf)
    return float(limit) if limit < 1e9 else math.inf


@contextlib.contextmanager
def readable(name: str, model: Any) -> Iterator[None]:
    """Makes a `RewardError` of what a model raises about a text, other than that memory runs out."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        kind, reason = type(model).__name__, (str(error).strip().splitlines() or ["no reason given"])[0]
        raise RewardError(f"{name}: the {kind} cannot read one of the texts: {reason}") from error


def batches(lengths: Sequence[int], batch_size: int, batching: Batching) -> Iterator[list[int]]:
    """Yields the places of texts, those that share a forward pass together: of like length, which makes little padding.

    Args:
        lengths: tokens of each text.
        batch_size: the largest batch.
        batching: which texts may share one.
    """
    size = 1 if batching == "alone" else batch_size
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if batch and (len(batch) == size or (batching == "same length" and lengths[place] != lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _texts(model: Any, *lengths: int) -> list[list[int]]:
    """Texts of the given lengths, none of whose tokens is the pad token (from which some models count positions)."""
    config = model.config.get_text_config()
    pad, known = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None) or 256
    ids = [token for token in range(known // 2, known) if token != pad][:7] or [0]
    return [[ids[(place + start) % len(ids)] for place in range(length)] for start, length in enumerate(lengths)]


def _table_limit(model: Any, read: Read, announced: float) -> float:
    """The longest text for which the tables of positions have rows; infinity for a model without such tables."""
    longer = int(min(announced, _LONG))
    shorter = min(_SHORT, longer - 1)
    if shorter < 1:
        return announced
    (before, _), (after, _) = _rows_read(model, read, shorter), _rows_read(model, read, longer)
    grown = [key for key in before.keys() & after.keys() if after[key][0] - before[key][0] == longer - shorter]
    for limit in sorted(before[key][1] - before[key][0] - 1 + shorter for key in grown):
        # One token more fails, unless positions beyond the table are read as its last one.
        if limit < announced and _rows_read(model, read, limit + 1)[1]:
            return limit
    return math.inf


def _rows_read(model: Any, read: Read, length: int) -> "tuple[dict[Any, tuple[int, int]], bool]":
    """Of each table that a text of this length reads by index: the last row that is asked for, and how many there are; and did it fail?"""
    import torch
    from torch.overrides import TorchFunctionMode

    seen: dict[Any, tuple[int, int]] = {}

    def note(key: Any, index: torch.Tensor, rows: int) -> None:
        most = int(index.max()) if index.numel() else 0
        seen[key] = (max(most, seen.get(key, (0, 0))[0]), rows)
        if most >= rows:  # on a GPU the kernel would end the process's use of it
            raise IndexError(f"row {most} of a table of {rows}")

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function is torch.nn.functional.embedding:
                index, table = (*args, *kwargs.values())[:2]
                note(id(table), index, len(table))
            elif function in (torch.gather, torch.Tensor.gather):  # the types of tokens, which are buffers
                given = {**dict(zip(("input", "dim", "index"), args, strict=False)), **kwargs}
                rows = given["input"].shape[given["dim"]]
                note(("gather", rows), given["index"], rows)
            return function(*args, **kwargs)

    try:
        with Watch():
            read(_texts(model, length))
    except (IndexError, RuntimeError, ValueError):
        return seen, True
    return seen, False


def _batching(model: Any, read: Read, limit: int, name: str) -> Batching:
    """Which texts may share a forward pass."""
    long = min(_LONG, limit)
    short, other, longer = _texts(model, min(_SHORT, limit), min(_SHORT, limit), long)
    try:
        alone, again, alone_longer = read([short])[0], read([short])[0], read([longer])[0]
    except Exception as error:
        raise ValueError(
            f"{name}: {type(model).__name__} cannot be read here: on a text of {len(short)} or {long} tokens it fails "
            f"({type(error).__name__}: {_first_line(error)})."
        ) from error
    if not _close(alone, again):
        raise ValueError(
            f"{name}: {type(model).__name__} cannot be read here: a text gets another result each time; use a model that is not random."
        )
    if _reads_alike(read, [short, longer], [alone, alone_longer]):
        return "any"
    return "same length" if _reads_alike(read, [short, other], [alone]) else "alone"


def _reads_alike(read: Read, rows: Sequence[Sequence[int]], alone: "Sequence[torch.Tensor]") -> bool:
    """Does a batch give what its texts give alone?"""
    try:
        together = read(rows)
    except (IndexError, RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    return all(_close(one, other) for one, other in zip(alone, together, strict=False))


def _close(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    import torch

    tolerance = max(_TOLERANCE, 8 * torch.finfo(one.dtype).eps)
    one, other = one.float(), other.float()
    return one.shape == other.shape and bool(((one - other).abs() <= tolerance * max(float(one.abs().max()), 1e-6)).all())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _check_attention(model: Any, name: str) -> None:
    """Refuses BigBird's sparse attention, which ends for good with the first short text: scores would hang on the order of texts."""
    if getattr(model.config, "attention_type", None) == "block_sparse":
        raise ValueError(
            f"{name}: a {type(model).__name__} must have `attention_type='original_full'`, got 'block_sparse', with which the result for a "
            "text depends on the texts before it; load it with `from_pretrained(path, attention_type='original_full')`."
        )


def _rotary_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """The settings of rotary positions: one dict, or one per kind of layer."""
    found = getattr(config.get_text_config(), "rope_parameters", None)
    if isinstance(found, dict):
        yield from [found, *(one for one in found.values() if isinstance(one, dict))]


def _rotary_kind(config: Any, kind: str) -> bool:
    return any(one.get("rope_type") == kind for one in _rotary_parameters(config))


def _rotary_limit(config: Any) -> float:
    """Dynamic rotary positions stay stretched, once a longer text was read: texts end where the stretching begins."""
    if not _rotary_kind(config, "dynamic"):
        return math.inf
    text = config.get_text_config()
    stated = [one.get("original_max_position_embeddings") for one in _rotary_parameters(config)]
    return float(min([limit for limit in stated if limit] or [text.max_position_embeddings]))
