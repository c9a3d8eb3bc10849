"""The decode loop: sampling whole completions with a key-value cache, one model step per token.

Row for row and token for token the numbers that come out are those of `textgym.agents.common.scoring` on the same ids.
"""

import warnings

import torch
from torch import Tensor

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.captured_decoder import CapturedDecoder
from textgym.agents.common.captured_step import WrongReplayError
from textgym.agents.common.decoders import Decoder, make_decoder
from textgym.agents.common.generation import DecodeOptions, Generation, without_filler
from textgym.agents.common.sampling import (
    draw,
    draw_epsilon_greedy,
    kept_tokens,
    pack_kept,
    packed_width,
    scale_logits,
    token_log_probs,
)
from textgym.agents.common.trunk_decoder import TrunkDecoder
from textgym.tokenizers import Decode

ADMITTING = (TrunkDecoder, CapturedDecoder)  # the decoders that take in rows on the way
ENDED_WORTH_DROPPING = 1 / 4  # of the rows in the batch; below, moving the caches costs more than the rows


@torch.no_grad()
def decode(
    backbone: Backbone,
    prompt_ids: Tensor,
    prompt_lengths: Tensor,
    options: DecodeOptions,
    generator: torch.Generator,
    to_texts: Decode,
) -> Generation:
    """Samples completions. On an accelerator nothing in the loop waits for the device, unless stop strings are given.

    All random numbers are drawn before the first token, one per row and step, so a row's completion depends neither on which other
    rows are in the batch nor on how many steps were taken.

    Args:
        backbone: the model.
        prompt_ids: (B, P) int64, left-padded.
        prompt_lengths: (B,) int64, at least 1.
        options: see `DecodeOptions`.
        generator: the source of randomness, on any device.
        to_texts: the ids of prompts and completions to texts without special tokens.

    Returns:
        B * `num_generations` rows.
    """
    random_state = generator.get_state()
    try:
        return _decode(backbone, prompt_ids, prompt_lengths, options, generator, to_texts)
    except WrongReplayError as error:
        warnings.warn(f"{error} Completions are sampled again, and decode steps launched one kernel at a time from now on.", stacklevel=2)
        backbone.kept_rows.failed = True
    generator.set_state(random_state)
    return _decode(backbone, prompt_ids, prompt_lengths, options, generator, to_texts)


def _decode(
    backbone: Backbone,
    prompt_ids: Tensor,
    prompt_lengths: Tensor,
    options: DecodeOptions,
    generator: torch.Generator,
    to_texts: Decode,
) -> Generation:
    backbone.without_dropout()
    # Inference mode spares every operation some bookkeeping. Models that this package does not run itself, and masks of others', may not
    # expect it.
    own = backbone.fast_trunk is not None and (options.action_mask is None or isinstance(options.action_mask, Tensor))
    # All in one `running`, because autocast keeps its copies of the weights no longer than that.
    with backbone.running():
        loop = _DecodeLoop(backbone, prompt_ids, prompt_lengths, options, generator, to_texts)
        with torch.inference_mode() if own else torch.no_grad():
            loop.run()
    return loop.result()


class _DecodeLoop:
    """The state of one `decode` call.

    What is drawn is written into one long line, token t of row i at place t * rows + i, so that a step writes all its rows at once
    wherever they stand. Behind the line is a cell for what rows draw that have ended and are still in the batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        options: DecodeOptions,
        generator: torch.Generator,
        to_texts: Decode,
    ) -> None:
        device = prompt_ids.device
        rows, steps = prompt_ids.shape[0] * options.num_generations, options.max_new_tokens
        self._backbone, self._options, self._to_texts = backbone, options, to_texts
        self._prompts = (prompt_ids, prompt_lengths)
        self._prompt_id_lists = without_filler(prompt_ids, prompt_lengths) if options.stop_strings else []
        self._num_rows = rows
        self._batch_size = min(options.max_batch_size or rows, rows)
        self._nowhere = steps * rows
        uniforms = torch.rand((steps, rows), generator=generator, device=generator.device, dtype=torch.float64).to(device)
        self._uniforms = torch.nn.functional.pad(uniforms.flatten(), (0, 1))
        self._is_eos = torch.zeros(backbone.vocab_size, dtype=torch.bool, device=device)
        self._is_eos[list(options.eos_token_ids)] = True
        self._masker = None if options.action_mask is None or isinstance(options.action_mask, Tensor) else options.action_mask
        self._fixed_mask = fixed_mask(options.action_mask, prompt_ids, backbone.vocab_size)
        self._ids = torch.full((steps * rows + 1,), options.fill_token_id, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(steps * rows + 1, dtype=torch.float32, device=device)
        self._drawn = torch.zeros(steps * rows + 1, dtype=torch.bool, device=device)
        masked = options.sampling.truncates or options.action_mask is not None or options.min_new_tokens > 0
        width = packed_width(backbone.vocab_size)
        self._kept = torch.zeros((steps * rows + 1, width), dtype=torch.uint8, device=device) if masked else None
        self._stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self._no_choice = torch.zeros((), dtype=torch.bool, device=device)
        self._watch = _FinishWatch(device)
        self._next_row = 0
        # Of the rows in the batch: where each writes next, whether it has ended, and what it may draw (None: anything).
        self._place: Tensor
        self._finished: Tensor
        self._legal: Tensor | None
        self._decoder: Decoder
        self._steps_left: int  # before the youngest row has ended
        self._start()

    def run(self) -> None:
        """Takes all steps."""
        while True:
            tokens = self._choose()
            if self._options.stop_strings:
                self._stop()
            # After so many steps every row has ended, whether an accelerator has said so already or not.
            self._steps_left -= 1
            ended = self._watch.ended(self._finished)
            if self._steps_left == 0 or (ended is not None and bool(ended.all())):
                if self._next_row == self._num_rows:
                    return
                del self._decoder  # the next one can use its memory
                self._start()
                continue
            if ended is not None and self._should_drop(int(ended.count_nonzero())):
                tokens = self._drop(ended, tokens)
            self._place = torch.where(self._finished, self._nowhere, self._place + self._num_rows)
            self._decoder.step(tokens)
            if self._masker is not None:
                self._legal = self._masker.step(tokens)
            self._admit()

    def result(self) -> Generation:
        """Collects the outcome, prompt-major."""
        if bool(self._no_choice):
            raise ValueError("`action_mask` (with `min_new_tokens` and EOS taken out) left a row without any legal token.")
        log_probs = self._by_row(self._log_probs)
        if not bool(log_probs.isfinite().all()):
            raise ValueError("`model` gave logits that are not finite (NaN or infinite): its weights are broken, or training diverged.")
        repeats = self._options.num_generations
        prompt_ids, prompt_lengths = self._prompts
        return Generation(
            ids=self._by_row(self._ids),
            lengths=self._by_row(self._drawn).sum(1),
            log_probs=log_probs,
            prompt_ids=prompt_ids.repeat_interleave(repeats, 0),
            prompt_lengths=prompt_lengths.repeat_interleave(repeats, 0),
            kept=None if self._kept is None else self._by_row(self._kept),
            stopped=self._stopped,
            eos_token_ids=self._options.eos_token_ids,
            decode=self._to_texts,
        )

    def _by_row(self, line: Tensor) -> Tensor:
        """(T * B + 1, ...) to (B, T, ...)."""
        return line[:-1].view(-1, self._num_rows, *line.shape[1:]).transpose(0, 1).contiguous()

    # -- the rows in the batch ---------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Fills an empty batch."""
        rows = self._take(self._batch_size)
        prompts, lengths, index = self._prompts_of(rows)
        steps = self._options.max_new_tokens
        self._decoder = make_decoder(self._backbone, prompts, lengths, index, steps)
        self._steps_left = steps
        self._place = torch.arange(rows.start, rows.stop, device=index.device)
        self._finished = torch.zeros(len(rows), dtype=torch.bool, device=index.device)
        self._legal = self._legal_of(rows)
        if self._masker is not None:
            if len(rows) == self._num_rows:
                self._legal = self._masker.start(*self._prompts, steps, self._options.num_generations)
            else:
                self._legal = self._masker.start(prompts.index_select(0, index), lengths.index_select(0, index), steps, 1)
        self._watch.forget()

    def _admit(self) -> None:
        """Puts waiting rows into the places that have become free, where decoder and mask can take them."""
        free = self._batch_size - len(self._finished)
        if not free or not self._admits_waiting_rows():
            return
        assert isinstance(self._decoder, ADMITTING), "asked just now"
        rows = self._take(free)
        prompts, lengths, index = self._prompts_of(rows)
        self._decoder.admit(prompts, lengths, index)
        self._steps_left = self._options.max_new_tokens
        self._place = torch.cat((self._place, torch.arange(rows.start, rows.stop, device=index.device)))
        self._finished = torch.cat((self._finished, self._finished.new_zeros(len(rows))))
        legal = self._legal_of(rows)
        if legal is not None:
            assert self._legal is not None, "a fixed mask is there for all rows"
            self._legal = torch.cat((self._legal, legal))

    def _take(self, count: int) -> range:
        """Returns the next rows that wait."""
        first = self._next_row
        self._next_row = min(first + count, self._num_rows)
        return range(first, self._next_row)

    def _prompts_of(self, rows: range) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the prompts of rows, each once, their lengths, and which one each row has."""
        repeats = self._options.num_generations
        first, last = rows.start // repeats, (rows.stop - 1) // repeats
        prompt_ids, prompt_lengths = (table[first : last + 1] for table in self._prompts)
        index = torch.arange(rows.start, rows.stop, device=prompt_ids.device).div(repeats, rounding_mode="floor") - first
        return prompt_ids, prompt_lengths, index

    def _legal_of(self, rows: range) -> Tensor | None:
        mask = self._fixed_mask
        if mask is None or mask.ndim == 1:
            return None if mask is None else mask.expand(len(rows), -1)
        index = torch.arange(rows.start, rows.stop, device=mask.device).div(self._options.num_generations, rounding_mode="floor")
        return mask.index_select(0, index)

    def _admits_waiting_rows(self) -> bool:
        return self._next_row < self._num_rows and self._masker is None and isinstance(self._decoder, ADMITTING)

    def _should_drop(self, ended: int) -> bool:
        if not ended:
            return False
        waiting = self._admits_waiting_rows()
        if isinstance(self._decoder, CapturedDecoder) and not waiting:
            return self._decoder.worth_dropping(ended)
        return ended >= ENDED_WORTH_DROPPING * len(self._finished) / (2 if waiting else 1)

    def _drop(self, ended: Tensor, tokens: Tensor) -> Tensor:
        """Goes on without the rows that are known to have ended, (rows,) bool; returns the tokens of the others."""
        running = (~ended).nonzero().squeeze(1).to(tokens.device, non_blocking=True)
        self._decoder.select(running)
        if self._masker is not None:
            self._masker.select(running)
        elif self._legal is not None:
            self._legal = self._legal.index_select(0, running)
        self._place = self._place.index_select(0, running)
        self._finished = self._finished.index_select(0, running)
        self._watch.forget()
        return tokens.index_select(0, running)

    # -- one token ---------------------------------------------------------------------------------------------------

    def _choose(self) -> Tensor:
        """Draws the next token of every row in the batch and writes it down; returns the tokens, (rows,)."""
        options, place = self._options, self._place
        legal = self._legal
        if options.min_new_tokens:
            may_end = ~self._is_eos | (place >= options.min_new_tokens * self._num_rows).unsqueeze(-1)
            legal = may_end if legal is None else legal & may_end
        logits = scale_logits(self._decoder.logits, options.sampling.temperature)
        kept = kept_tokens(logits, options.sampling, legal)
        if kept is not None:
            logits = logits.masked_fill(~kept, -torch.inf)
            self._no_choice |= ~(kept.any(-1) | self._finished).all()
        uniforms = self._uniforms.index_select(0, place)
        if options.greedy:
            tokens = logits.argmax(-1)
            log_probs = token_log_probs(logits, tokens)
        elif options.epsilon is not None:
            tokens, log_probs = draw_epsilon_greedy(logits, uniforms, options.epsilon)
        else:
            tokens, log_probs = draw(logits, uniforms)
        self._ids.index_copy_(0, place, tokens)
        self._log_probs.index_copy_(0, place, log_probs)
        self._drawn.index_fill_(0, place, True)
        if self._kept is not None:
            whole = torch.ones_like(logits, dtype=torch.bool) if kept is None else kept
            self._kept.index_copy_(0, place, pack_kept(whole))
        self._finished = self._is_eos.index_select(0, tokens) | (place >= (options.max_new_tokens - 1) * self._num_rows)
        return tokens

    def _stop(self) -> None:
        """Ends the rows whose text contains a stop string. Reads the tokens back, so this is the one part that waits for a device."""
        drawn = self._place < self._nowhere
        rows = self._place[drawn] % self._num_rows
        lengths = (self._place[drawn] // self._num_rows + 1).tolist()
        ids = self._ids[:-1].view(-1, self._num_rows)[: max(lengths, default=0), rows].T.tolist()
        prompts = [self._prompt_id_lists[row // self._options.num_generations] for row in rows.tolist()]
        texts = self._to_texts(prompts, [row[:length] for row, length in zip(ids, lengths, strict=True)])
        found = torch.tensor([any(stop in text for stop in self._options.stop_strings) for text in texts], device=rows.device)
        self._finished[drawn] |= found
        self._stopped[rows] = found


def fixed_mask(mask: object, prompt_ids: Tensor, vocab_size: int) -> Tensor | None:
    """Returns a mask that stays the same, (V,) or (B, V) bool; None where there is none, or one that follows the rows."""
    if not isinstance(mask, Tensor):
        return None
    prompts = prompt_ids.shape[0]
    if mask.shape not in ((vocab_size,), (prompts, vocab_size)):
        raise ValueError(
            f"`action_mask` must have the shape (V,) = ({vocab_size},) or (prompts, V) = ({prompts}, {vocab_size}), "
            f"got {tuple(mask.shape)}; for masks that change from step to step give an `ActionMasker`."
        )
    return mask.to(device=prompt_ids.device, dtype=torch.bool)


class _FinishWatch:
    """Knows, without making the host wait, which rows have ended.

    On the CPU looking costs nothing. On an accelerator the answer is sent to pinned memory and read some steps later: a few steps are
    run too many, whose tokens nobody reads.

    Args:
        device: where the rows are.
    """

    def __init__(self, device: torch.device) -> None:
        self._answer: Tensor | None = None
        self._event: torch.Event | None = None if device.type == "cpu" else torch.Event(device)

    def ended(self, finished: Tensor) -> Tensor | None:
        """Returns which of the rows are known to have ended, (rows,) bool on the CPU; None if no answer is there.

        May be late on an accelerator, never early.
        """
        if self._event is None:
            return finished
        if self._answer is None:
            self._answer = torch.empty(finished.shape, dtype=torch.bool, pin_memory=finished.device.type == "cuda")
            self._answer.copy_(finished, non_blocking=True)
            self._event.record()
            return None
        if not self._event.query():
            return None
        answer, self._answer = self._answer, None
        return answer

    def forget(self) -> None:
        """The rows have changed: what is on its way is about others."""
        self._answer = None
