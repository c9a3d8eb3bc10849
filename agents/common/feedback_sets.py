"""Feedback as a data set: the texts of all records tokenised once, each record as places among their pieces, and batches of records.

Letters: N records, B of them in a batch, U different texts in it, I pieces of those that are scored, K answers or S segments of a record,
C outputs of the reward model.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from textgym.agents.common.offline_batches import TokenRows
from textgym.agents.common.pieces import Piece
from textgym.agents.common.segments import segment_pieces
from textgym.agents.reward_model import RewardModel
from textgym.conversations import template_columns
from textgym.feedback.records import Comparison, Judgements, Label, Marking, Ranking, Record, Segment, SegmentPair, Text
from textgym.rewards.segmenters import Segmenter

Pair: TypeAlias = tuple[int, int, float, float]  # i, j, P(i ≻ j), margin
Answered: TypeAlias = Comparison | Ranking | Judgements | Label


class LeftOut(NamedTuple):
    """How many records of a source are not in a data set, by the reason.

    Attributes:
        too_long: have a text of more than `max_tokens`.
        same_answers: compare answers that are the same tokens, whose rewards are equal whatever the model says.
        comments: words, which a judge must turn into another form first.
    """

    too_long: int = 0
    same_answers: int = 0
    comments: int = 0


@dataclass(frozen=True)
class Entry:
    """One record, read.

    Attributes:
        kind: "compared", "ranked", "labelled" or "marked".
        pieces: what is scored: the K answers, the text, or the S segments.
        pairs: the comparisons that it holds, places among `pieces`; ties of a ranking are none.
        ranks: of the K answers, where they are ranked.
        clean: (S, C) bool of a marking, (1, 1) of a label: z = 1.
        prompt: what tells its prompt from others; a text that answers nothing is one of its own.
        weight: how much it counts.
    """

    kind: str
    pieces: list[Piece]
    prompt: str
    weight: float
    pairs: list[Pair] = field(default_factory=list)
    ranks: tuple[int, ...] = ()
    clean: npt.NDArray[np.bool_] | None = None

    @property
    def longest(self) -> int:
        """Tokens of its longest text."""
        return max(len(piece.ids) for piece in self.pieces)

    @property
    def same_answers(self) -> bool:
        """Whether it compares a piece with itself only."""
        return self.kind in ("compared", "ranked") and all(piece == self.pieces[0] for piece in self.pieces)

    @property
    def is_tie(self) -> bool:
        """Whether it compares, and finds nothing better than anything else."""
        return self.kind in ("compared", "ranked") and all(preference == 0.5 for _, _, preference, _ in self.pairs)


def read_entry(record: Record, model: RewardModel, segmenter: Segmenter) -> Entry:
    """Reads one record.

    Args:
        record: any but a `Comment`.
        model: whose tokenizer reads the texts, and whose outputs are the categories of markings.
        segmenter: where the segments of markings end.

    Raises:
        ValueError: the record does not suit the model.
    """
    if isinstance(record, Comparison):
        pieces = _encode(model, record, [record.chosen, record.rejected])
        pairs = [(0, 1, record.preference, record.margin)]
        return Entry("compared", pieces, repr(record.prompt), record.weight, pairs)
    if isinstance(record, Ranking):
        pieces = _encode(model, record, record.completions)
        ranked = [sorted(pair, key=record.ranks.__getitem__) for pair in combinations(range(len(pieces)), 2)]
        pairs = [(i, j, 1.0, 0.0) for i, j in ranked if record.ranks[i] < record.ranks[j]]
        return Entry("ranked", pieces, repr(record.prompt), record.weight, pairs, record.ranks)
    if isinstance(record, Judgements):
        pieces = _encode(model, record, record.completions)
        pairs = [(one.first, one.second, (one.z + 1) / 2, 0.0) for one in record.judgements]
        return Entry("compared", pieces, repr(record.prompt), record.weight, pairs)
    if isinstance(record, SegmentPair):
        if not model.per_token:
            raise ValueError("is a pair of segments, which only a reward model with a score per token reads (`per_token=True`)")
        pieces = [_piece(segment) for segment in (record.first, record.second)]
        return Entry("compared", pieces, repr(record.first.prompt_ids), record.weight, [(0, 1, record.preference, 0.0)])
    if isinstance(record, Label):
        pieces = _encode(model, record, [record.completion])
        return Entry("labelled", pieces, repr(record.prompt or record.completion), record.weight, clean=np.array([[record.good]]))
    if isinstance(record, Marking):
        unknown = {span.category for span in record.spans} - set(model.output_names)
        if unknown:
            raise ValueError(f"marks {sorted(unknown)}, but the reward model's outputs are {model.output_names} (`output_names=`)")
        pieces, clean = segment_pieces(model, record, segmenter)
        return Entry("marked", pieces, repr(record.prompt or record.completion), record.weight, clean=clean)
    raise ValueError(f"is a {type(record).__name__}, from which no reward is learned; let a judge turn it into another form")


def _encode(model: RewardModel, record: Answered, completions: Sequence[Text]) -> list[Piece]:
    """Encodes the completions of a record, whose own columns may hold what goes into a chat template."""
    columns = {name: [value] * len(completions) for name, value in template_columns(record.columns).items()}
    return model.encode([record.prompt] * len(completions), completions, columns)


def _piece(segment: Segment) -> Piece:
    ids = [*segment.prompt_ids, *segment.completion_ids[: segment.end]]
    return Piece(ids, len(segment.prompt_ids) + segment.start, len(ids))


def check_entries(entries: Mapping[int, Entry], tokenizer: Any) -> None:
    """Warns where much of the texts of records, by their places, is unknown to the reward model's tokenizer."""
    numbers = list(entries)
    texts = TokenRows([_all_ids(entry) for entry in entries.values()])
    texts.check_known(tokenizer, "`feedback`", lambda row: f"record {numbers[row]} of `feedback`")


def _all_ids(entry: Entry) -> list[int]:
    """Returns the tokens of the different texts of a record, one after the other."""
    return [token for ids in dict.fromkeys(tuple(piece.ids) for piece in entry.pieces) for token in ids]


class Group(NamedTuple):
    """The records of one kind in a batch. What stands where `present` or `judged` is False means nothing.

    Attributes:
        kind: as in `Entry`.
        rows: which rows of the data set they are, (B',) int64.
        places: which of the batch's pieces each has, (B', K) int64.
        present: (B', K) bool.
        weights: (B',) float32, of mean 1 over the whole data set.
        preferences: P(i ≻ j), (B', K, K) float32.
        judged: the pairs that were compared, each in one order, (B', K, K) bool.
        margins: (B', K, K) float32.
        ranks: (B', K) int64.
        clean: (B', K, C') bool, C' = 1 of labels.
    """

    kind: str
    rows: Tensor
    places: Tensor
    present: Tensor
    weights: Tensor
    preferences: Tensor
    judged: Tensor
    margins: Tensor
    ranks: Tensor
    clean: Tensor


@dataclass(frozen=True)
class FeedbackBatch:
    """Some records, and the texts that they are about; a text that occurs in several of them is there, and is read, once.

    Attributes:
        ids: (U, L) int64, right-padded.
        lengths: (U,) int64.
        piece_rows: the text of each piece, (I,) int64.
        starts: its first token, (I,) int64.
        ends: the place behind its last token, (I,) int64.
        groups: the records by kind.
    """

    ids: Tensor
    lengths: Tensor
    piece_rows: Tensor
    starts: Tensor
    ends: Tensor
    groups: list[Group]

    def scores(self, model: RewardModel) -> Tensor:
        """Returns the scores of the pieces, (I, C), in one pass."""
        return model.piece_scores(self.ids, self.lengths, self.piece_rows, self.starts, self.ends)


class FeedbackSet:
    """A data set of records.

    Args:
        entries: the records.
        num_outputs: C.
        left_out: the records of the source that are not among them.
        names: what error messages call each, N; by default its place.
        same_answers: what they call the records that were left out because their answers are the same tokens.

    Attributes:
        left_out: the same.
        num_tokens: (N,) int64, tokens of the different texts of each record, prompts included.
        pass_tokens: (N,) int64, the longest text of each record times the texts that a record has at most.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        num_outputs: int,
        left_out: LeftOut = LeftOut(),  # noqa: B008  (immutable)
        names: Sequence[str] = (),
        same_answers: Sequence[str] = (),
    ) -> None:
        self.same_answers = same_answers
        self.names = list(names) or [f"record {number}" for number in range(len(entries))]
        self.entries, self.num_outputs, self.left_out = list(entries), num_outputs, left_out
        texts: dict[tuple[int, ...], int] = {}
        pieces: dict[tuple[int, int, int], int] = {}
        self._places: list[list[int]] = []
        for entry in self.entries:
            rows = [texts.setdefault(tuple(piece.ids), len(texts)) for piece in entry.pieces]
            keys = [(row, piece.start, piece.end) for row, piece in zip(rows, entry.pieces, strict=True)]
            self._places.append([pieces.setdefault(key, len(pieces)) for key in keys])
        self.texts = TokenRows(list(texts))
        self._pieces = torch.tensor(list(pieces), dtype=torch.int64)  # (pieces, 3): text, start, end
        weights = torch.tensor([entry.weight for entry in self.entries], dtype=torch.float64)
        self.weights = (weights / weights.mean()).float()
        different = [{tuple(piece.ids) for piece in entry.pieces} for entry in self.entries]
        self.num_tokens = torch.tensor([sum(map(len, one)) for one in different])
        self.pass_tokens = max(map(len, different), default=0) * torch.tensor([entry.longest for entry in self.entries])

    def __len__(self) -> int:
        return len(self.entries)

    def select(self, rows: Tensor, device: torch.device) -> FeedbackBatch:
        """Returns the records `rows` (an index tensor on the CPU)."""
        numbers = rows.tolist()
        wanted = sorted({place for number in numbers for place in self._places[number]})
        local = {place: index for index, place in enumerate(wanted)}
        pieces = self._pieces[wanted]
        texts, piece_rows = torch.unique(pieces[:, 0], return_inverse=True)
        lengths = torch.from_numpy(self.texts.lengths[texts.numpy()])
        return FeedbackBatch(
            ids=self.texts.padded(texts.numpy(), left=False).to(device),
            lengths=lengths.to(device),
            piece_rows=piece_rows.to(device),
            starts=pieces[:, 1].to(device),
            ends=pieces[:, 2].to(device),
            groups=list(self._groups(numbers, local, device)),
        )

    def _groups(self, numbers: list[int], local: dict[int, int], device: torch.device) -> Iterator[Group]:
        """Puts the records of each kind into tables."""
        for kind in dict.fromkeys(self.entries[number].kind for number in numbers):
            rows = [number for number in numbers if self.entries[number].kind == kind]
            entries = [self.entries[number] for number in rows]
            width = max(len(entry.pieces) for entry in entries)
            outputs = max((entry.clean.shape[1] for entry in entries if entry.clean is not None), default=1)
            flat, square = (len(entries), width), (len(entries), width, width)
            places, ranks = torch.zeros(flat, dtype=torch.int64), torch.zeros(flat, dtype=torch.int64)
            present, judged = torch.zeros(flat, dtype=torch.bool), torch.zeros(square, dtype=torch.bool)
            preferences, margins = torch.zeros(square), torch.zeros(square)
            clean = torch.zeros((*flat, outputs), dtype=torch.bool)
            for row, (number, entry) in enumerate(zip(rows, entries, strict=True)):
                count = len(entry.pieces)
                places[row, :count] = torch.tensor([local[place] for place in self._places[number]])
                present[row, :count] = True
                for i, j, preference, margin in entry.pairs:
                    judged[row, i, j], preferences[row, i, j], margins[row, i, j] = True, preference, margin
                if entry.ranks:
                    ranks[row, :count] = torch.tensor(entry.ranks)
                if entry.clean is not None:
                    clean[row, :count] = torch.from_numpy(entry.clean)
            tables = (places, present, self.weights[rows], preferences, judged, margins, ranks, clean)
            yield Group(kind, torch.tensor(rows), *(table.to(device) for table in tables))

    def same_sides(self) -> npt.NDArray[np.bool_]:
        """Returns which records compare answers or segments that are all the same tokens, (N,)."""
        return np.array([entry.same_answers for entry in self.entries])

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data set from others, as JSON types."""
        said = [(one.kind, one.pairs, one.ranks, None if one.clean is None else one.clean.tolist()) for one in self.entries]
        checksum = zlib.crc32(repr((said, self._pieces.tolist())).encode(), self.texts.checksum())
        return {"num_items": len(self), "tokens": int(self.num_tokens.sum()), "checksum": checksum}
