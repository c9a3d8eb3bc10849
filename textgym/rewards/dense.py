"""Rewards inside a completion: the decorators `token_level` and `segment_level`, and where segments end.

With several rewards of segments

    r_t = Σ_k Σ_j 1[t = T_j^k] w_k R_k(x, y_≤t, j)

reward k scores its segment j from the prefix that ends with it, and the score is paid at the segment's last token T_j^k. A token-level
reward is the case in which every token is a segment.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from textgym.rewards.episodes import EpisodeBatch, as_completion
from textgym.rewards.segmenters import Segmenter, find_segmenter
from textgym.tokenizers import Decode, common_length

F = TypeVar("F", bound=Callable[..., Any])
_Key: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # the ids of (the end of) a prompt, and of a prefix of its completion
_MARK = "__textgym_dense__"
_REMEMBERED_PREFIXES = 2048  # at least; and twice the rows of the largest batch


@dataclass(frozen=True)
class TokenLevel:
    """The mark of a token-level reward."""


@dataclass(frozen=True)
class SegmentLevel:
    """The mark of a segment-level reward.

    Args:
        segmenter: says after each token whether a segment ends there (see `textgym.rewards.segmenters`).
        at_end: the scores of all segments are paid together at the completion's last token, not each at its segment's.
    """

    segmenter: Segmenter
    at_end: bool = False


DenseKind = TokenLevel | SegmentLevel


def token_level(function: F) -> F:
    """Marks a reward that gives one number per token.

    The function is called as any other reward (`prompts`, `completions`, `completion_ids`, columns) and returns, per row, a list with
    one number per id of `completion_ids` (None for the row: nothing is paid in it). It must be *causal*: the number of a token may not
    depend on later tokens, because an agent that steps the environment is paid before they exist. `check_causal` tests that.

    The mark is put on the function itself, which is returned.
    """
    return marked(function, TokenLevel())


def segment_level(segmenter: str | Segmenter, *, at_end: bool = False) -> Callable[[F], F]:
    """Marks a reward that scores one segment of a completion at a time; the score is paid at the segment's last token.

    The function is called as any other reward, with one row per *segment* that has ended: `completions` and `completion_ids` are the
    completion up to and including the segment, `segments` the text of the segment alone, `segment_ids` its tokens, `segment_index` its
    number in the completion, from 0; the columns are those of the segment's prompt. It returns one number per row (None: nothing is
    paid for that segment).

    Args:
        segmenter: `"sentence"`, `"sub_sentence"`, `"whole"`, or a function `segmenter(segment, segment_ids) -> bool` such as
            `TokenCount(8)`, asked after every token whether the segment ends with it. The end of the episode closes the last segment,
            unless that is only white space; a completion without any text is one segment.
        at_end: pay the scores of all segments together at the completion's last token: the same reward without the credit.
    """
    kind = SegmentLevel(find_segmenter(segmenter), at_end)
    return lambda function: marked(function, kind)


def marked(function: F, kind: DenseKind) -> F:
    """Returns a function with a mark (a bound method: a partial of it)."""
    if not callable(function):
        raise ValueError(f"a dense reward must be a function, got {type(function).__name__} {function!r}.")
    try:
        setattr(function, _MARK, kind)
    except AttributeError:  # a bound method takes no attributes, a partial does
        function = functools.partial(function)  # type: ignore[assignment]
        setattr(function, _MARK, kind)
    return function


def dense_kind(function: object) -> DenseKind | None:
    """Returns the mark that `token_level` or `segment_level` put on a function (on `__call__` of a class, under a partial), or None."""
    kind = getattr(function, _MARK, None)
    if kind is None and isinstance(function, functools.partial):
        return dense_kind(function.func)
    if kind is None and not isinstance(function, type):
        kind = getattr(type(function).__call__, _MARK, None) if callable(function) else None
    return kind


@dataclass(frozen=True)
class Segment:
    """A closed segment of one completion.

    Attributes:
        start: number of tokens before the segment.
        end: number of tokens of the completion up to and including the segment.
        text: its text.
        prefix: the text of the completion up to and including the segment.
        index: how many segments closed before it.
    """

    start: int
    end: int
    text: str
    prefix: str
    index: int


@dataclass(frozen=True)
class _Open:
    """Where the open segment of a prefix begins: after `start` tokens, which read `text_before`; `index` segments closed before it."""

    start: int
    text_before: str
    index: int


class Segmentation:
    """Cuts completions into segments; what it says of a prefix depends on that prefix alone.

    Stepping asks about every prefix of a completion in turn. So that this is not quadratic, the open segment of recent prefixes is
    remembered; a prefix that is not there is walked from its beginning.

    Args:
        segmenter: says whether a segment ends with the last token it is shown.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self._open: OrderedDict[_Key, _Open] = OrderedDict()
        self._decode: Decode | None = None
        self._capacity = _REMEMBERED_PREFIXES

    def __getstate__(self) -> dict[str, Any]:
        """Leaves what is remembered out of pickles."""
        return {"segmenter": self.segmenter}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["segmenter"])  # type: ignore[misc]

    def last_segments(self, batch: EpisodeBatch, finished: list[bool]) -> list[Segment | None]:
        """Returns, per row, the segment that the row's last token closed, or None."""
        if not _same_decode(batch.decode, self._decode):  # another tokenizer: the texts of the same ids may differ
            self._open.clear()
            self._decode = batch.decode
        self._capacity = max(self._capacity, 2 * len(batch))
        before = self._open_before_last(batch)
        return [
            self._close(prompt, ids, text, opened, end)
            for prompt, ids, text, opened, end in zip(batch.prompt_ids, batch.completion_ids, batch.texts, before, finished, strict=True)
        ]

    def all_segments(self, batch: EpisodeBatch, finished: list[bool]) -> list[list[Segment]]:
        """Returns, per row, every segment of a whole completion, in order."""
        texts = iter(_prefix_texts(batch))
        result = []
        for ids, end in zip(batch.completion_ids, finished, strict=True):
            opened, segments = _Open(0, "", 0), []
            for t in range(1, len(ids) + 1):
                text = next(texts)
                segment = self._ask(ids, t, text, opened, end and t == len(ids))
                if segment is not None:
                    segments.append(segment)
                    opened = _Open(t, text, segment.index + 1)
            result.append(segments)
        return result

    def _close(self, prompt: Sequence[int], ids: list[int], text: str, opened: _Open, finished: bool) -> Segment | None:
        segment = self._ask(ids, len(ids), text, opened, finished)
        if not finished:
            self._remember((tuple(prompt), tuple(ids)), _Open(segment.end, text, segment.index + 1) if segment else opened)
        return segment

    def _ask(self, ids: list[int], t: int, text: str, opened: _Open, finished: bool) -> Segment | None:
        # The text of a longer prefix need not begin with that of a shorter one (half a character decodes to a replacement mark).
        new_text = text[common_length(text, opened.text_before) :]
        closes = self.segmenter(new_text, ids[opened.start : t]) or (finished and (opened.start == 0 or bool(new_text.strip())))
        return Segment(opened.start, t, new_text, text, opened.index) if closes else None

    def _remember(self, key: _Key, opened: _Open) -> None:
        self._open[key] = opened
        if len(self._open) > self._capacity:
            self._open.popitem(last=False)

    def _open_before_last(self, batch: EpisodeBatch) -> list[_Open]:
        known = [
            self._open.get((tuple(prompt), tuple(ids[:-1]))) if len(ids) > 1 else _Open(0, "", 0)
            for prompt, ids in zip(batch.prompt_ids, batch.completion_ids, strict=True)
        ]
        unknown = [row for row, opened in enumerate(known) if opened is None]
        if unknown:
            heads = batch.select(unknown, [batch.completion_ids[row][:-1] for row in unknown])
            for row, segments in zip(unknown, self.all_segments(heads, [False] * len(heads)), strict=True):
                last = segments[-1] if segments else None
                known[row] = _Open(last.end, last.prefix, last.index + 1) if last else _Open(0, "", 0)
        return [opened for opened in known if opened is not None]


def _same_decode(a: Decode | None, b: Decode | None) -> bool:
    """Returns whether the two decode alike for certain: environments that share a tokenizer make a partial of it each."""
    if isinstance(a, functools.partial) and isinstance(b, functools.partial):
        same_arguments = len(a.args) == len(b.args) and all(x is y for x, y in zip(a.args, b.args, strict=True))
        return a.func == b.func and same_arguments and a.keywords == b.keywords
    return a == b


def _prefix_texts(batch: EpisodeBatch) -> list[str]:
    """Returns the texts of the prefixes of length 1, 2, ... of the first row, then of the second, and so on."""
    prefixes = [ids[:t] for ids in batch.completion_ids for t in range(1, len(ids) + 1)]
    prompts = [prompt for prompt, ids in zip(batch.prompt_ids, batch.completion_ids, strict=True) for _ in ids]
    return list(batch.decode(prompts, prefixes)) if prefixes else []


def segment_batch(batch: EpisodeBatch, rows: list[int], segments: list[Segment]) -> tuple[EpisodeBatch, dict[str, list[Any]]]:
    """Returns what a segment-level reward sees of `segments`, the i-th of which belongs to row `rows[i]` of `batch`.

    Returns:
        a batch with one row per segment, its texts given, and the further arguments `segments`, `segment_ids` and `segment_index`.
    """
    view = batch.select(rows, [batch.completion_ids[row][: segment.end] for row, segment in zip(rows, segments, strict=True)])
    view.texts = [segment.prefix for segment in segments]  # known already; fills the cached property
    view.completions = [as_completion(prompt, text) for prompt, text in zip(view.prompts, view.texts, strict=True)]
    return view, {
        "segments": [segment.text for segment in segments],
        "segment_ids": [batch.completion_ids[row][segment.start : segment.end] for row, segment in zip(rows, segments, strict=True)],
        "segment_index": [segment.index for segment in segments],
    }
