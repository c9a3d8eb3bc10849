"""Trying a model once, before anything is computed with it: which ways of running it agree with transformers' plain passes.

Positions, caches, windows, padding and masks are treated differently by every architecture, and what goes wrong there goes wrong in
silence. So every way that this package has is compared with passes over single rows, without padding, cache or mask, on random tokens:
a short row beside a long one. The first way that agrees is taken; a model none agrees with is refused.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from textgym.agents.common.acting import ActingState
from textgym.agents.common.backbone import Backbone
from textgym.agents.common.decoders import Decoder, decoder_of
from textgym.agents.common.kv_cache import PreallocatedLayer, SlotCursor, SlotLayer, preallocated_cache, slot_cache
from textgym.agents.common.layout import Rows, lay_out
from textgym.agents.common.trunk_decoder import TrunkDecoder
from textgym.agents.common.ways import Batching, Decoding, Ways

LONG, SHORT = 16, 7  # tokens of the rows
STEPS = 2  # of these, taken one by one
GAP = 300  # columns between a short row's end and the present one; windows that are longer must be known from the configuration
# Largest difference of log-probs over the tokenizer's vocabulary, as a share of how far they go apart from state to state.
TOLERANCE = 1e-4
# In half precision rounding alone makes much more at single states, so a float32 copy is tried in its place up to so many parameters;
# beyond, it is the root mean square over all states that may be so large a share.
LARGEST_COPY = 5 * 10**8
HALF_TOLERANCE = 0.2
DECISIVE = 1e-2  # a first token that changes less than this share of what is said at a row's end leaves a trial nothing to see
REMEMBERED = 64  # outcomes
NO_MATTER = ("_name_or_path", "name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")  # of a configuration

Pairs = Iterable[tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Attributes:
        ways: of transformers' forward.
        fast_trunk: whether the package's own trunk agrees.
        exact_head: whether logits follow from the trunk's last hidden states.
    """

    ways: Ways
    fast_trunk: bool
    exact_head: bool


_outcomes: "OrderedDict[Any, Outcome]" = OrderedDict()


def choose_ways(backbone: Backbone) -> None:
    """Tries a model and makes its backbone run it only in ways that agree with plain passes.

    Nothing is left behind: random states, gradients, hooks and caches are as before. What was found for a model of the same class,
    configuration and dtype is taken over.

    Raises:
        ValueError: the model cannot be run on token ids alone; later tokens change what it says of earlier ones; or no way agrees.
    """
    key = _key(backbone)
    outcome = None if key is None else _outcomes.get(key)
    if outcome is None:
        outcome = _tried(backbone)
        if key is not None:
            _outcomes[key] = outcome
            while len(_outcomes) > REMEMBERED:
                _outcomes.popitem(last=False)
    backbone.settle(outcome.ways, fast_trunk=outcome.fast_trunk, exact_head=outcome.exact_head)


def _key(backbone: Backbone) -> Any:
    """Returns what decides an outcome; None where somebody's hooks or replaced methods do, too."""
    model: nn.Module = backbone.model
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return None
    settings = {name: value for name, value in backbone.config.to_dict().items() if name not in NO_MATTER}
    kinds = tuple(sorted({f"{type(module).__module__}.{type(module).__qualname__}" for module in model.modules()}))
    attention = backbone.config._attn_implementation
    return (
        json.dumps(settings, sort_keys=True, default=str),
        (kinds, attention, backbone.dtype, backbone.device.type, backbone.vocab_size, backbone.without_adapter),
        (backbone.fast_trunk is None, backbone.exact_head),
    )


@torch.no_grad()
def _tried(backbone: Backbone) -> Outcome:
    backbone.without_dropout()
    devices = [backbone.device] if backbone.device.type == "cuda" else []
    before, autocast = backbone.ways, backbone.autocast
    backbone.autocast = None
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rows = _runnable_rows(backbone)
            limit = _table_limit(backbone)
            trial = _Trial(_in_float32(backbone), rows)
            if not trial.is_decisive():
                trial = _Trial(_with_other_weights(trial.backbone), rows)
            outcome = trial.outcome()
        finally:
            backbone.ways, backbone.autocast = before, autocast
            backbone.forget_warnings()
    return dataclasses.replace(outcome, ways=dataclasses.replace(outcome.ways, max_positions=limit))


class _Trial:
    """Compares ways with plain passes.

    Args:
        backbone: whose `ways` are changed on the way.
        rows: a long row, a short one, and one as short, (S,) int64 each.
    """

    def __init__(self, backbone: Backbone, rows: list[Tensor]) -> None:
        self.backbone, self.rows = backbone, rows
        self.expected = [backbone.plain_log_probs(row) for row in rows]
        everything = torch.cat(self.expected)
        deviation = everything - everything.mean(0)
        self.half = backbone.dtype not in (torch.float32, torch.float64)
        self.spread = float(deviation.abs().max())
        self.typical = float(deviation.square().mean().sqrt())
        self.steps = max(1, min(STEPS, len(rows[1]) - 1))

    def is_decisive(self) -> bool:
        """Whether a row's end depends on its beginning, in numbers: with weights of zero every way agrees."""
        row = self.rows[1].clone()
        row[0] = self.rows[0][0]
        change = float((self.backbone.plain_log_probs(row)[-1] - self.expected[1][-1]).abs().max())
        return len(row) == 1 or change > max(DECISIVE * self.spread, 1e-5)

    def outcome(self) -> Outcome:
        """Tries everything, the fastest first."""
        self._check_causality()
        ways = dataclasses.replace(self.backbone.ways, batching=self._batching())
        self.backbone.ways = ways
        trunk = self.backbone.fast_trunk is not None and self._agrees(self._fast_trunk)
        dense = ways.dense_mask and ways.batching == "together" and self._dense()
        ways = self.backbone.ways = dataclasses.replace(ways, dense_mask=dense)
        orders = [way for way in get_args(Decoding) if way != "ready-made masks" or dense]
        decoding = next(way for way in orders if self._agrees(lambda way=way: self._decoded(way)))  # type: ignore[misc]
        return Outcome(dataclasses.replace(ways, decoding=decoding), trunk, self.backbone.exact_head)

    def _agrees(self, run: Callable[[], Pairs]) -> bool:
        """Whether all that a way gives is as expected; a way that fails is none."""
        try:
            with _silence():
                return all(self._close(found.float().log_softmax(-1), expected) for found, expected in run())
        except Exception:  # whatever a model raises when it is run in a way that it does not know
            return False

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        # A model that is broken is left to those who look at its numbers; it is run as its configuration suggests.
        broken = not bool(expected.isfinite().all())
        difference = found - expected
        if self.half:
            return broken or float(difference.square().mean().sqrt()) <= HALF_TOLERANCE * self.typical
        return broken or float(difference.abs().max()) <= TOLERANCE * self.spread

    def _check_causality(self) -> None:
        """Raises if the beginning of a row is read differently where the row goes on."""
        row = self.rows[0]
        part = self.backbone.plain_log_probs(row[: (len(row) + 1) // 2])
        if not self._close(part, self.expected[0][: len(part)]):
            raise ValueError(
                f"`model` must be causal, but in {type(self.backbone.model).__name__} later tokens change the log-probs of earlier ones, "
                "so what it says of a completion is no probability. Set `is_decoder=True` in the configuration of an encoder that was "
                "trained as a decoder; otherwise use another model."
            )

    # -- without a cache ---------------------------------------------------------------------------------------------

    def _batching(self) -> Batching:
        for exact in (True, False) if self.backbone.exact_head else (False,):
            self.backbone.exact_head = exact
            for batching in get_args(Batching):
                self.backbone.ways = dataclasses.replace(self.backbone.ways, batching=batching)
                if self._agrees(self._whole_rows):
                    return batching  # type: ignore[no-any-return]
        raise ValueError(
            f"`model`: {type(self.backbone.model).__name__} gives other log-probs each time that it is run, or for its logits than for its "
            "hidden states, so it cannot be scored. Use another model."
        )

    def _whole_rows(self) -> Pairs:
        layout = self._layout()
        lengths = torch.tensor([len(row) for row in self.rows], device=layout.input_ids.device)
        ids = torch.nn.utils.rnn.pad_sequence(self.rows, batch_first=True)
        rows, columns = (torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)).nonzero(as_tuple=True)
        features, _ = self.backbone.states_of(ids, lengths, rows, columns)
        yield self.backbone.logits(features), torch.cat(self.expected)

    def _layout(self) -> Rows:
        """The rows as prompts and completions; two of them share a prompt."""
        prompts, lengths, index = self._prompts()
        completions = torch.stack([self.rows[row][-self.steps :] for row in index.tolist()])
        return lay_out(prompts[index], lengths[index], completions, torch.full_like(index, self.steps))

    def _fast_trunk(self) -> Pairs:
        layout = self._layout()
        features, _ = self.backbone.predictors(layout)
        index = self._prompts()[2].tolist()
        yield self.backbone.logits(features), torch.cat([self.expected[row][-self.steps - 1 : -1] for row in index])
        trunk = self.backbone.fast_trunk
        assert trunk is not None, "asked before"
        yield from self._grown(lambda *prompts: TrunkDecoder(self.backbone, trunk, *prompts))

    # -- with ready-made masks ---------------------------------------------------------------------------------------

    def _dense(self) -> bool:
        return self._agrees(self._packed) and self._agrees(self._far_away) and self._agrees(self._acted)

    def _packed(self) -> Pairs:
        """Two rows in one that do not see each other."""
        first, second = self.rows[:2]
        ids = torch.cat((first, second))
        part = torch.arange(len(ids), device=ids.device) >= len(first)
        visible = (part.unsqueeze(1) == part) & torch.ones(len(ids), len(ids), dtype=torch.bool, device=ids.device).tril()
        positions = torch.cat([torch.arange(len(row), device=ids.device) for row in (first, second)])
        features, _ = self.backbone.features_and_hidden(
            ids.unsqueeze(0), positions.unsqueeze(0), self.backbone.attention(visible[None, None])
        )
        yield self.backbone.logits(features[0]), torch.cat(self.expected[:2])

    def _far_away(self) -> Pairs:
        """A row whose end stands far before the present column, as beside rows that are much longer."""
        backbone, row = self.backbone, self.rows[1]
        columns = min(GAP, backbone.trained_positions or GAP)
        end = len(row) - 1
        prefilled, cursor = preallocated_cache(backbone.num_layers, end), SlotCursor()
        backbone.features(row[:end].unsqueeze(0), None, None, prefilled)
        cache = slot_cache(backbone.num_layers, cursor, columns)
        first = torch.zeros(1, dtype=torch.int64, device=row.device)
        for layer, source in zip(cache.layers, prefilled.layers, strict=True):
            assert isinstance(layer, SlotLayer) and isinstance(source, PreallocatedLayer), "made by slot_cache and preallocated_cache"
            layer.load(first, source.keys, source.values, 1)
        cursor.rows, cursor.slots, cursor.width = first, first + end, columns
        mask = backbone.attention((torch.arange(columns, device=row.device) <= end)[None, None, None, :])
        features = backbone.features(row[end:].unsqueeze(0), (first + end).unsqueeze(0), mask, cache)
        yield backbone.logits(features[0]), self.expected[1][-1:]

    def _acted(self) -> Pairs:
        """Observations of which first one row grows and then the other."""
        state = ActingState()
        lengths = [len(row) - self.steps for row in self.rows[:2]]
        ids = np.stack([np.pad(row.cpu().numpy(), (0, len(self.rows[0]) - len(row))) for row in self.rows[:2]])
        for grown in (None, 0, 1):
            if grown is not None:
                lengths[grown] += 1
            mask = np.arange(ids.shape[1]) < np.array(lengths)[:, None]
            found = state.observe(self.backbone, {"input_ids": ids, "attention_mask": mask})
            yield found, torch.stack([self.expected[row][length - 1] for row, length in enumerate(lengths)])

    # -- token by token ----------------------------------------------------------------------------------------------

    def _decoded(self, way: Decoding) -> Pairs:
        return self._grown(lambda *prompts: decoder_of(way, self.backbone, *prompts))

    def _grown(self, make: Callable[[Tensor, Tensor, Tensor, int], Decoder]) -> Pairs:
        """Rows that grow by given tokens; one of them leaves, and the others change places."""
        prompts, lengths, index = self._prompts()
        decoder = make(prompts, lengths, index, self.steps)
        rows = index.tolist()
        for step in range(self.steps):
            yield decoder.logits, torch.stack([self.expected[row][step - self.steps - 1] for row in rows])
            if step == 1:
                decoder.select(torch.tensor([3, 0, 1], device=index.device))
                rows = [rows[3], rows[0], rows[1]]
            decoder.step(torch.stack([self.rows[row][step - self.steps] for row in rows]))
        yield decoder.logits, torch.stack([self.expected[row][-1] for row in rows])

    def _prompts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows without their last tokens, left-padded, (3, P); lengths (3,); and the prompt of each of four rows."""
        prompts = [row[: len(row) - self.steps] for row in self.rows]
        width = max(map(len, prompts))
        device = prompts[0].device
        padded = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
        return padded, torch.tensor([len(prompt) for prompt in prompts], device=device), torch.tensor([0, 1, 1, 2], device=device)


# -- the rows --------------------------------------------------------------------------------------------------------


def _runnable_rows(backbone: Backbone) -> list[Tensor]:
    """Returns a long row and two short ones that the model can be run on."""
    longest = min(LONG, backbone.trained_positions or LONG, LONG if backbone.turn is None else backbone.turn.length)
    error: Exception | None = None
    for seed, size in enumerate(size for size in (longest, longest, longest * 3 // 4, longest // 2) if size > 0):
        short = min(SHORT, (size + 1) // 2)
        rows = list(_random_ids(backbone, size + 2 * short, seed).split([size, short, short]))
        # The padding token is a token as any other, which some architectures count differently.
        padding = getattr(backbone.config.get_text_config(), "pad_token_id", None)
        if isinstance(padding, int) and 0 <= padding < backbone.vocab_size and size > 2:
            rows[0][1] = padding
        try:
            backbone.plain_log_probs(rows[0])
        except Exception as problem:  # whatever the model raises
            error = problem
        else:
            return rows
    raise ValueError(
        f"`model` must run on token ids alone, as a causal language model does, but {type(backbone.model).__name__} does not: "
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    ) from error


def _random_ids(backbone: Backbone, count: int, seed: int) -> Tensor:
    """Returns tokens of the vocabulary, (count,) int64, each once before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(backbone.vocab_size, generator=generator)[:count] for _ in range(-(-count // backbone.vocab_size))]
    return torch.cat(rounds)[:count].to(backbone.device)


def _table_limit(backbone: Backbone) -> int | None:
    """Returns what `positions.table_limit` says; None also for models whose operations cannot be watched."""
    padding = getattr(backbone.config.get_text_config(), "pad_token_id", None)
    longest = min(17, backbone.trained_positions or 17)
    for width in (longest, longest * 3 // 4, longest // 2):  # a short table, of which some entries lie before the first token's
        ids = _random_ids(backbone, 2 * width, 0)
        ids = ids[ids != (-1 if padding is None else padding)][:width]
        if len(ids) < 3:
            return None
        with contextlib.suppress(Exception):
            return backbone.table_limit(ids.unsqueeze(0))
    return None


def _in_float32(backbone: Backbone) -> Backbone:
    """Returns a float32 copy of a half-precision model that is small enough and has nothing against it, else the model as it is."""
    config = backbone.config
    size = sum(parameter.numel() for parameter in backbone.model.parameters())
    plain = config._attn_implementation in ("sdpa", "eager") and getattr(config, "quantization_config", None) is None
    if backbone.dtype not in (torch.float16, torch.bfloat16) or size > LARGEST_COPY or not plain:
        return backbone
    return Backbone(copy.deepcopy(backbone.model).float(), backbone.vocab_size, without_adapter=backbone.without_adapter)


def _with_other_weights(backbone: Backbone) -> Backbone:
    """Returns the same architecture with large random weights: new ones, or zeros, show nothing of how they are used."""
    model = copy.deepcopy(backbone.model)
    generator = torch.Generator(backbone.device).manual_seed(0)
    for parameter in _floating(model):
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device).to(parameter.dtype)
        if parameter.ndim > 1:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(parameter.nan_to_num(1.0) + 0.1 * noise)
    return Backbone(model, backbone.vocab_size, without_adapter=backbone.without_adapter)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps what transformers logs about ways that are only tried from the user."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _floating(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.is_floating_point())
