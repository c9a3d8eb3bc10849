"""Rows that grow by one token per model step, as captured steps on buffers that outlast the decode loop."""

from weakref import finalize

from torch import Tensor

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.buckets import bucket
from textgym.agents.common.captured_rows import CapturedRows
from textgym.agents.common.kept_rows import fingerprint
from textgym.agents.common.prefill import Prefilled, prefill
from textgym.agents.common.trunks import Trunk

LEAST_COLUMNS = 64
WORTH_CAPTURING_ANEW = 1 / 2  # of the rows in use have ended


class CapturedDecoder:
    """What `TrunkDecoder` is, where steps can be captured. Arguments and attributes are the same.

    Buffers and steps come from `backbone.kept_rows` and go back there when nobody holds this decoder any more, so that from the second
    loop of like size on nothing is captured, but for numbers of rows that no loop has had for longer than a step.

    The sizes are buckets. Of the columns, and of the rows that there is room for, a fifth is unused at most: they are memory, and a step
    looks at all columns. The rows that a step runs have wider buckets, two for each doubling: each is a capture, and below a quarter to a
    third of the rows moving the others costs more than it saves.
    """

    def __init__(
        self, backbone: Backbone, trunk: Trunk, prompt_ids: Tensor, prompt_lengths: Tensor, index: Tensor, max_new_tokens: int
    ) -> None:
        self._backbone, self._trunk, self._max_new_tokens = backbone, trunk, max_new_tokens
        with backbone.running():
            self._model = fingerprint(backbone.model)
        prompts, self.logits = self._prefill(prompt_ids, prompt_lengths, index)
        self._use(self._buffers(len(index), prompt_ids.shape[1] + max_new_tokens, prompts))
        self._rows.clear(prompt_ids.shape[1])
        self._rows.add(prompts, self.logits, index)
        self.logits = self._rows.logits

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`; the logits stand where those before them stood."""
        self._rows.step(self._backbone, tokens)
        return self.logits

    def select(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self._rows.keep(rows)
        self.logits = self._rows.logits

    def admit(self, prompt_ids: Tensor, prompt_lengths: Tensor, index: Tensor) -> None:
        """Puts fresh rows behind the present ones; arguments as in `make_decoder`."""
        prompts, logits = self._prefill(prompt_ids, prompt_lengths, index)
        self._make_room(prompts, len(index))
        self._rows.add(prompts, logits, index)
        self.logits = self._rows.logits

    def worth_dropping(self, ended: int) -> bool:
        """Whether the other rows should go on alone: a step then runs fewer. One that no later loop will use must be worth its capture."""
        left = self._rows.count - ended
        if self._model is None:
            return ended >= WORTH_CAPTURING_ANEW * self._rows.count
        return self._rows.size_for(left) < self._rows.size_for(self._rows.count)

    def _prefill(self, prompt_ids: Tensor, prompt_lengths: Tensor, index: Tensor) -> tuple[Prefilled, Tensor]:
        """Returns the prompts and the logits after them, (rows, V)."""
        trunk = self._trunk.with_own_tables(prompt_ids.shape[1])
        prompts = prefill(self._backbone, trunk, prompt_ids, prompt_lengths)
        return prompts, self._backbone.logits(prompts.states.index_select(0, index))

    def _make_room(self, prompts: Prefilled, count: int) -> None:
        """Finds room for so many more rows: as it is, or without the columns that have become padding in every row, or elsewhere."""
        present, width = self._rows, prompts.keys[0].shape[2]
        rows = present.count + count
        enough = rows <= present.rows
        if enough and width <= present.filled <= present.columns - self._max_new_tokens:
            return
        first = present.first_column()
        filled = max(present.filled - first, width)
        if enough and filled + self._max_new_tokens <= present.columns:
            present.take_over(present, first, filled)
            return
        release = self._release
        self._use(self._buffers(rows, filled + self._max_new_tokens, prompts))
        self._rows.clear(filled)
        self._rows.take_over(present, first, filled)
        release()

    def _buffers(self, rows: int, columns: int, prompts: Prefilled) -> CapturedRows:
        """Returns buffers of at least that size, which nobody else has."""
        rows, columns = bucket(rows, 4), bucket(columns, 4, LEAST_COLUMNS)
        kept = self._backbone.kept_rows.take(self._model, rows, columns)
        if kept is not None:
            return kept
        limit = self._backbone.max_positions or columns
        return CapturedRows(self._trunk, prompts, self.logits, rows, columns, min(limit, columns) - 1)

    def _use(self, rows: CapturedRows) -> None:
        """Goes on with these buffers, which are given back by `_release`, or with the end of this decoder."""
        self._rows = rows
        self._release = finalize(self, self._backbone.kept_rows.give_back, self._model, rows)
        self._release.atexit = False
